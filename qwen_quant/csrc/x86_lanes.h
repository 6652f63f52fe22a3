// x86: the widest vectors of floats that the instruction set has, and in their lanes the products of codes with int8
// activations, each lane with its own row of packed weights.
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
constexpr int kGroupTile = 2, kPackedTokens = 6;  // 12 sums of integers, 12 of floats, and what feeds them
constexpr uint32_t kFlipQ8_0 = 0x80808080u;       // + 128 to every code: the instruction wants one side unsigned
using LaneFloats = __m512;
using LaneInts = __m512i;

inline LaneFloats lanes_of(float x) { return _mm512_set1_ps(x); }
inline LaneFloats load_lane_halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline LaneFloats load_lanes_of(LoadF32, const uint8_t* p) { return _mm512_loadu_ps(p); }
inline LaneFloats load_lanes_of(LoadF16, const uint8_t* p) { return load_lane_halves(p); }
inline LaneFloats load_lanes_of(LoadBF16, const uint8_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline LaneFloats to_floats(LaneInts x) { return _mm512_cvtepi32_ps(x); }
inline LaneFloats multiply(LaneFloats a, LaneFloats b) { return _mm512_mul_ps(a, b); }
inline LaneFloats multiply_add(LaneFloats a, LaneFloats b, LaneFloats c) { return _mm512_fmadd_ps(a, b, c); }
inline LaneFloats load_lanes(const float* p) { return _mm512_loadu_ps(p); }
inline __m256 eight_lanes(LaneFloats x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
inline void store_lanes(float* p, LaneFloats x) { _mm512_storeu_ps(p, x); }
inline LaneInts load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline LaneInts four_of_x(const uint8_t* p) { return _mm512_set1_epi32(load_i32(p)); }
inline LaneInts low_nibbles(LaneInts x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline LaneInts high_nibbles(LaneInts x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }

// start + products of codes from 0 to 255 with x, four per lane at a time
struct UnsignedSum {
    LaneInts sum;
    void begin(int32_t start) { sum = _mm512_set1_epi32(start); }
    void add(LaneInts codes, LaneInts x) { sum = _mm512_dpbusd_epi32(sum, codes, x); }
    LaneInts finish(int32_t) const { return sum; }
};
using NibbleSum = UnsignedSum;
using SumQ8_0 = UnsignedSum;
inline int32_t start_of_q8_0(const uint8_t* x, const XBlock& at) { return load_i32(x + at.minus_128); }

#else

constexpr int64_t kLanes = 8;
constexpr int kGroupTile = 1, kPackedTokens = 4;
constexpr uint32_t kFlipQ8_0 = 0;
using LaneFloats = __m256;
using LaneInts = __m256i;

inline LaneFloats lanes_of(float x) { return _mm256_set1_ps(x); }
inline LaneFloats load_lane_halves(const uint8_t* p) { return load_half8(p); }
template <class W>
inline LaneFloats load_lanes_of(W, const uint8_t* p) { return W::load8(p); }
inline LaneFloats to_floats(LaneInts x) { return _mm256_cvtepi32_ps(x); }
inline LaneFloats multiply(LaneFloats a, LaneFloats b) { return _mm256_mul_ps(a, b); }
inline LaneFloats multiply_add(LaneFloats a, LaneFloats b, LaneFloats c) { return _mm256_fmadd_ps(a, b, c); }
inline LaneFloats load_lanes(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 eight_lanes(LaneFloats x) { return x; }
inline void store_lanes(float* p, LaneFloats x) { _mm256_storeu_ps(p, x); }
inline LaneInts load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline LaneInts four_of_x(const uint8_t* p) { return _mm256_set1_epi32(load_i32(p)); }
inline LaneInts low_nibbles(LaneInts x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline LaneInts high_nibbles(LaneInts x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }

inline LaneInts add_pairs(LaneInts x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }

// start + products of codes from 0 to 15 with x: the eight sums of two products of a block fit into 16 bits.
struct NibbleSum {
    LaneInts pairs;
    void begin(int32_t) { pairs = _mm256_setzero_si256(); }
    void add(LaneInts codes, LaneInts x) { pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes, x)); }
    LaneInts finish(int32_t start) const { return _mm256_add_epi32(_mm256_set1_epi32(start), add_pairs(pairs)); }
};

// Signed codes: |w| * (x with the sign of w); two products reach 2 * 128 * 127 < 2^15, more do not fit.
struct SumQ8_0 {
    LaneInts sum;
    void begin(int32_t) { sum = _mm256_setzero_si256(); }
    void add(LaneInts codes, LaneInts x) {
        const LaneInts pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
        sum = _mm256_add_epi32(sum, add_pairs(pairs));
    }
    LaneInts finish(int32_t) const { return sum; }
};
inline int32_t start_of_q8_0(const uint8_t*, const XBlock&) { return 0; }

#endif

// Calls visit(r0, r1) for parts of the rows, multiples of `unit`, that stay in the second-level cache while all tokens
// pass by; the activations of one tile stay in the first-level cache while these rows pass by.
template <class Visit>
inline void for_each_part(const MatmulArgs& a, int64_t unit, Visit visit) {
    constexpr int64_t kPart = 256 << 10;
    const int64_t unit_bytes = unit * static_cast<int64_t>(a.row_bytes);
    const int64_t step = (kPart + unit_bytes - 1) / unit_bytes * unit;
    for (int64_t r = 0; r < a.n_rows; r += step) visit(r, r + step < a.n_rows ? r + step : a.n_rows);
}

}  // namespace

}  // namespace qq
