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

// What a row of int8 activations holds for one block of 32; see q8_row_bytes.
struct BlockOfX {
    const uint8_t* codes;
    const uint8_t* derived;  // the block's entry in the first array after the codes
    int64_t stride;          // bytes from one of these arrays to the next

    BlockOfX(const uint8_t* row, int64_t k, int64_t b)
        : codes(row + b * kBlock), derived(row + k + b * 4), stride(k / kBlock * 4) {}
    float scale() const { return LoadF32::load1(derived); }
    int32_t sum_times_minus_8() const { return load_i32(derived + 2 * stride); }
    int32_t sum_times_minus_128() const { return load_i32(derived + 3 * stride); }
    float scaled_sum() const { return LoadF32::load1(derived + 4 * stride); }
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
inline LaneFloats to_floats(LaneInts x) { return _mm512_cvtepi32_ps(x); }
inline LaneFloats multiply(LaneFloats a, LaneFloats b) { return _mm512_mul_ps(a, b); }
inline LaneFloats multiply_add(LaneFloats a, LaneFloats b, LaneFloats c) { return _mm512_fmadd_ps(a, b, c); }
inline void store_lanes(float* p, LaneFloats x) { _mm512_storeu_ps(p, x); }
inline LaneInts load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline LaneInts low_nibbles(LaneInts x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline LaneInts high_nibbles(LaneInts x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }

// start + codes [8 words] * x, for codes from 0 to 255
inline LaneInts dot_words(const LaneInts (&codes)[8], int32_t start, const uint8_t* x) {
    LaneInts sum = _mm512_set1_epi32(start);
    for (int i = 0; i < 8; ++i) sum = _mm512_dpbusd_epi32(sum, codes[i], _mm512_set1_epi32(load_i32(x + 4 * i)));
    return sum;
}
inline LaneInts dot_nibbles(const LaneInts (&codes)[8], int32_t start, const uint8_t* x) {
    return dot_words(codes, start, x);
}
inline LaneInts dot_q8_0(const LaneInts (&codes)[8], const BlockOfX& x) {
    return dot_words(codes, x.sum_times_minus_128(), x.codes);
}

#else

constexpr int64_t kLanes = 8;
constexpr int kPackedTokens = 4;
constexpr uint32_t kFlipQ8_0 = 0;
using LaneFloats = __m256;
using LaneInts = __m256i;

inline LaneFloats lanes_of(float x) { return _mm256_set1_ps(x); }
inline LaneFloats load_lane_halves(const uint8_t* p) { return load_half8(p); }
inline LaneFloats to_floats(LaneInts x) { return _mm256_cvtepi32_ps(x); }
inline LaneFloats multiply(LaneFloats a, LaneFloats b) { return _mm256_mul_ps(a, b); }
inline LaneFloats multiply_add(LaneFloats a, LaneFloats b, LaneFloats c) { return _mm256_fmadd_ps(a, b, c); }
inline void store_lanes(float* p, LaneFloats x) { _mm256_storeu_ps(p, x); }
inline LaneInts load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline LaneInts low_nibbles(LaneInts x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline LaneInts high_nibbles(LaneInts x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }

// start + codes [8 words] * x, for codes from 0 to 15: all eight sums of two products fit into 16 bits.
inline LaneInts dot_nibbles(const LaneInts (&codes)[8], int32_t start, const uint8_t* x) {
    __m256i pairs = _mm256_setzero_si256();
    for (int i = 0; i < 8; ++i) {
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes[i], _mm256_set1_epi32(load_i32(x + 4 * i))));
    }
    return _mm256_add_epi32(_mm256_set1_epi32(start), _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Signed codes: |w| * (x with the sign of w); two products reach 2 * 128 * 127 < 2^15, more do not fit.
inline LaneInts dot_q8_0(const LaneInts (&codes)[8], const BlockOfX& x) {
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < 8; ++i) {
        const __m256i four = _mm256_set1_epi32(load_i32(x.codes + 4 * i));
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes[i]), _mm256_sign_epi8(four, codes[i]));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sum;
}

#endif

}  // namespace

}  // namespace qq
