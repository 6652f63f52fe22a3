// x86: what attention over one block of the cache needs beside lanes (lane_attention.h), and its softmax.
#pragma once

#include <immintrin.h>

#include <cmath>

#include "x86_elementwise.h"
#include "x86_lanes.h"

namespace qq {

namespace {

inline float max_lanes(__m256 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// sum_lanes of eight vectors: the same additions in the same order, but for several of them at once.
inline __m256 sum_lanes_of_8(const __m256 (&v)[8]) {
    __m256 halves[4], quarters[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        halves[i] = _mm256_add_ps(_mm256_permute2f128_ps(v[i], v[i + 4], 0x20),
                                  _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
    }
    for (int i = 0; i < 2; ++i) {
        const __m256d a = _mm256_castps_pd(halves[2 * i]), b = _mm256_castps_pd(halves[2 * i + 1]);
        quarters[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                                    _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return _mm256_add_ps(_mm256_shuffle_ps(quarters[0], quarters[1], 0x88),
                         _mm256_shuffle_ps(quarters[0], quarters[1], 0xdd));
}

// sums[i] = the sum of all lanes of x[i]
template <int N>
QQ_INLINE void store_sums(const LaneFloats (&x)[N], float* sums) {
    if constexpr (N == 8) {
        __m256 folded[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) folded[i] = eight_lanes(x[i]);
        _mm256_storeu_ps(sums, sum_lanes_of_8(folded));
    } else {
        for (int i = 0; i < N; ++i) sums[i] = sum_lanes(eight_lanes(x[i]));
    }
}

float softmax_block(float* scores, int64_t valid, int64_t n, float* running_max, float* running_sum) {
    int64_t i = 0;
    __m256 top = _mm256_set1_ps(*running_max);
    for (; i + 8 <= valid; i += 8) top = _mm256_max_ps(top, _mm256_loadu_ps(scores + i));
    float largest = max_lanes(top);
    for (; i < valid; ++i) largest = scores[i] > largest ? scores[i] : largest;
    // Masked scores count as minus infinity, so that whole vectors can be taken; exp8 would leave them above zero.
    const __m256 shift = _mm256_set1_ps(largest);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256 sum = _mm256_setzero_ps();
    for (i = 0; i < n; i += 8) {
        const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(valid - i)), lane);
        const __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(scores + i), shift));
        const __m256 kept = _mm256_and_ps(e, _mm256_castsi256_ps(inside));
        sum = _mm256_add_ps(sum, kept);
        _mm256_storeu_ps(scores + i, kept);
    }
    const float rescale = largest > *running_max ? expf(*running_max - largest) : 1.0f;
    *running_max = largest;
    *running_sum = *running_sum * rescale + sum_lanes(sum);
    return rescale;
}

}  // namespace

}  // namespace qq
