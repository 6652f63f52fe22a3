// x86: rounding for a quantized cache, in vectors of eight; the same operations in the same order as kv_round.h has.
#pragma once

#include <cmath>

#include "kv_block.h"
#include "x86_blocks.h"

namespace qq {

namespace {

constexpr float kRoundFloat = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even integer

inline __m256 near_codes(__m256 x, __m256 inverse, float middle, float low, float high) {
    const __m256 code = _mm256_add_ps(_mm256_mul_ps(x, inverse), _mm256_set1_ps(middle));
    return _mm256_min_ps(_mm256_max_ps(code, _mm256_set1_ps(low)), _mm256_set1_ps(high));
}

// codes [32] = x * inverse + middle, rounded and kept within low … high
inline void nearest_codes(const float* x, float inverse, float middle, float low, float high, int8_t* codes) {
    __m256i q[4];
    for (int i = 0; i < 4; ++i) {
        q[i] = _mm256_cvtps_epi32(near_codes(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(inverse), middle, low, high));
    }
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the 128-bit halves of the packs
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32(packed, order));
}

// The sum of squares of what int4 codes with this scale leave of a group of 32
inline float int4_error(const float* x, float scale) {
    const __m256 inverse = _mm256_set1_ps(1.0f / scale), step = _mm256_set1_ps(scale), middle = _mm256_set1_ps(kInt4Middle);
    __m256 sums = _mm256_setzero_ps();
    for (int i = 0; i < 4; ++i) {
        const __m256 value = _mm256_loadu_ps(x + 8 * i);
        const __m256 code = _mm256_round_ps(near_codes(value, inverse, kInt4Middle, 0.0f, 15.0f),
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256 gap = _mm256_sub_ps(value, _mm256_mul_ps(_mm256_sub_ps(code, middle), step));
        sums = _mm256_add_ps(sums, _mm256_mul_ps(gap, gap));
    }
    return sum_lanes(sums);
}

// Sums and differences of neighbours, of neighbouring pairs, and of the halves of eight
inline __m256 turn_eight(__m256 x) {
    const __m256 minus = _mm256_set1_ps(-0.0f);
    const __m256 zero = _mm256_setzero_ps();
    const __m256 ones = _mm256_blend_ps(zero, minus, 0xaa), twos = _mm256_blend_ps(zero, minus, 0xcc);
    const __m256 fours = _mm256_blend_ps(zero, minus, 0xf0);
    x = _mm256_add_ps(_mm256_permute_ps(x, 0xb1), _mm256_xor_ps(x, ones));
    x = _mm256_add_ps(_mm256_permute_ps(x, 0x4e), _mm256_xor_ps(x, twos));
    return _mm256_add_ps(_mm256_permute2f128_ps(x, x, 1), _mm256_xor_ps(x, fours));
}

// The orthonormal Hadamard transform of x [n], n a multiple of 8, a power of two times an odd number: block by block.
void hadamard(float* x, int64_t n) {
    const int64_t size = n & -n;
    const __m256 scale = _mm256_set1_ps(1.0f / sqrtf(static_cast<float>(size)));
    for (int64_t i = 0; i < n; i += 8) _mm256_storeu_ps(x + i, turn_eight(_mm256_loadu_ps(x + i)));
    for (int64_t half = 8; half < size; half *= 2) {
        for (int64_t begin = 0; begin < n; begin += 2 * half) {
            for (int64_t i = begin; i < begin + half; i += 8) {
                const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + half);
                _mm256_storeu_ps(x + i, _mm256_add_ps(a, b));
                _mm256_storeu_ps(x + i + half, _mm256_sub_ps(a, b));
            }
        }
    }
    for (int64_t i = 0; i < n; i += 8) _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), scale));
}

}  // namespace

}  // namespace qq
