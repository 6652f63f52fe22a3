// x86: vectors with one row of packed weights per lane, and the products of a block of codes with 32 activations.
#pragma once

#include "x86_blocks.h"

namespace qq {

namespace {

inline int32_t load_i32(const uint8_t* p) {
    int32_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// Where a row of int8 activations holds what belongs to one block of 32; see q8_row_bytes.
struct XBlock {
    int64_t codes, scale, minus_8, minus_128, scaled_sum;

    explicit XBlock(int64_t k)
        : codes(0), scale(k), minus_8(k + k / 4), minus_128(k + k / 8 * 3), scaled_sum(k + k / 2) {}
    void next() {
        codes += kBlock;
        scale += 4;
        minus_8 += 4;
        minus_128 += 4;
        scaled_sum += 4;
    }
};

#ifdef __AVX512VNNI__

constexpr int64_t kLanes = 16;
constexpr int kPackedTokens = 8;
constexpr uint32_t kFlipQ8_0 = 0x80808080u;  // + 128 to every code: the instruction wants one side unsigned
using LaneFloats = __m512;
using LaneInts = __m512i;

inline LaneFloats lanes_of(float x) { return _mm512_set1_ps(x); }
inline LaneFloats load_lane_halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline LaneInts int_lanes_of(int32_t x) { return _mm512_set1_epi32(x); }
inline LaneFloats to_floats(LaneInts x) { return _mm512_cvtepi32_ps(x); }
inline LaneFloats multiply(LaneFloats a, LaneFloats b) { return _mm512_mul_ps(a, b); }
inline LaneFloats multiply_add(LaneFloats a, LaneFloats b, LaneFloats c) { return _mm512_fmadd_ps(a, b, c); }
inline void store_lanes(float* p, LaneFloats x) { _mm512_storeu_ps(p, x); }
inline LaneInts load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline LaneInts low_nibbles(LaneInts x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline LaneInts high_nibbles(LaneInts x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }

// sums [T] += codes [8 words] * x of T tokens, for codes from 0 to 255. Tokens take turns, because each sum has to wait
// for itself.
template <int T>
inline void add_dots(const LaneInts (&codes)[8], const uint8_t* const (&x)[T], int64_t at, LaneInts (&sums)[T]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            sums[t] = _mm512_dpbusd_epi32(sums[t], codes[i], _mm512_set1_epi32(load_i32(x[t] + at + 4 * i)));
        }
    }
}
template <int T>
inline void add_nibble_dots(const LaneInts (&codes)[8], const uint8_t* const (&x)[T], int64_t at, LaneInts (&sums)[T]) {
    add_dots(codes, x, at, sums);
}
template <int T>
inline void add_q8_0_dots(const LaneInts (&codes)[8], const uint8_t* const (&x)[T], int64_t at, LaneInts (&sums)[T]) {
    add_dots(codes, x, at, sums);
}
inline int32_t start_of_q8_0(const uint8_t* x, const XBlock& at) { return load_i32(x + at.minus_128); }

#else

constexpr int64_t kLanes = 8;
constexpr int kPackedTokens = 4;
constexpr uint32_t kFlipQ8_0 = 0;
using LaneFloats = __m256;
using LaneInts = __m256i;

inline LaneFloats lanes_of(float x) { return _mm256_set1_ps(x); }
inline LaneFloats load_lane_halves(const uint8_t* p) { return load_half8(p); }
inline LaneInts int_lanes_of(int32_t x) { return _mm256_set1_epi32(x); }
inline LaneFloats to_floats(LaneInts x) { return _mm256_cvtepi32_ps(x); }
inline LaneFloats multiply(LaneFloats a, LaneFloats b) { return _mm256_mul_ps(a, b); }
inline LaneFloats multiply_add(LaneFloats a, LaneFloats b, LaneFloats c) { return _mm256_fmadd_ps(a, b, c); }
inline void store_lanes(float* p, LaneFloats x) { _mm256_storeu_ps(p, x); }
inline LaneInts load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline LaneInts low_nibbles(LaneInts x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline LaneInts high_nibbles(LaneInts x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }

// start + codes [8 words] * x, for codes from 0 to 15: all eight sums of two products fit into 16 bits.
template <int T>
inline void add_nibble_dots(const LaneInts (&codes)[8], const uint8_t* const (&x)[T], int64_t at, LaneInts (&sums)[T]) {
    __m256i pairs[T];
    for (int t = 0; t < T; ++t) pairs[t] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const __m256i four = _mm256_set1_epi32(load_i32(x[t] + at + 4 * i));
            pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(codes[i], four));
        }
    }
    for (int t = 0; t < T; ++t) sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs[t], _mm256_set1_epi16(1)));
}

// Signed codes: |w| * (x with the sign of w); two products reach 2 * 128 * 127 < 2^15, more do not fit.
template <int T>
inline void add_q8_0_dots(const LaneInts (&codes)[8], const uint8_t* const (&x)[T], int64_t at, LaneInts (&sums)[T]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m256i magnitude = _mm256_abs_epi8(codes[i]);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const __m256i four = _mm256_set1_epi32(load_i32(x[t] + at + 4 * i));
            const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(four, codes[i]));
            sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
    }
}
inline int32_t start_of_q8_0(const uint8_t*, const XBlock&) { return 0; }

#endif

}  // namespace

}  // namespace qq
