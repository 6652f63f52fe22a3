// x86: attention over one block of the cache.
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

// Q queries and J keys
template <int Q, int J>
inline void scores_tile(const float* q, const uint16_t* keys, int64_t dim, float* scores, int64_t ld_scores) {
    LaneFloats acc[Q * J];
#pragma GCC unroll 8  // here and below: or the sums would be kept in memory
    for (int i = 0; i < Q * J; ++i) acc[i] = lanes_of(0.0f);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
        LaneFloats key[J];
        for (int j = 0; j < J; ++j) key[j] = load_lane_halves(reinterpret_cast<const uint8_t*>(keys + j * dim + d));
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) {
            const LaneFloats query = load_lanes(q + i * dim + d);
            for (int j = 0; j < J; ++j) acc[i * J + j] = multiply_add(key[j], query, acc[i * J + j]);
        }
    }
    alignas(32) float sums[Q * J];
    if constexpr (Q * J == 8) {
        __m256 folded[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) folded[i] = eight_lanes(acc[i]);
        _mm256_store_ps(sums, sum_lanes_of_8(folded));
    } else {
        for (int i = 0; i < Q * J; ++i) sums[i] = sum_lanes(eight_lanes(acc[i]));
    }
    for (int i = 0; i < Q; ++i) {
        for (int j = 0; j < J; ++j) {
            float sum = sums[i * J + j];
            for (int64_t e = d; e < dim; ++e) sum += q[i * dim + e] * half_to_float(keys[j * dim + e]);
            scores[i * ld_scores + j] = sum;
        }
    }
}

template <int Q>
inline void scores_of(const float* q, const uint16_t* keys, int64_t n_keys, int64_t dim, float* scores, int64_t ld) {
    constexpr int J = 8 / Q;
    int64_t j = 0;
    for (; j + J <= n_keys; j += J) scores_tile<Q, J>(q, keys + j * dim, dim, scores + j, ld);
    for (; j < n_keys; ++j) scores_tile<Q, 1>(q, keys + j * dim, dim, scores + j, ld);
}

void attend_scores(const float* q, int64_t n_q, const uint16_t* keys, int64_t n_keys, int64_t dim, float* scores,
                   int64_t ld) {
    int64_t i = 0;
    for (; i + 8 <= n_q; i += 8) scores_of<8>(q + i * dim, keys, n_keys, dim, scores + i * ld, ld);
    for (; i + 4 <= n_q; i += 4) scores_of<4>(q + i * dim, keys, n_keys, dim, scores + i * ld, ld);
    for (; i + 2 <= n_q; i += 2) scores_of<2>(q + i * dim, keys, n_keys, dim, scores + i * ld, ld);
    for (; i < n_q; ++i) scores_of<1>(q + i * dim, keys, n_keys, dim, scores + i * ld, ld);
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
    const float rescale = valid > 0 ? expf(*running_max - largest) : 1.0f;
    *running_max = largest;
    *running_sum = *running_sum * rescale + sum_lanes(sum);
    return rescale;
}

template <int Q>
inline void values_tile(const float* p, int64_t ld_p, const float* rescale, const uint16_t* values, int64_t n_keys,
                        int64_t dim, float* acc) {
    int64_t d = 0;
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
        LaneFloats low[Q], high[Q];
        for (int i = 0; i < Q; ++i) {
            const LaneFloats factor = lanes_of(rescale[i]);
            low[i] = multiply(load_lanes(acc + i * dim + d), factor);
            high[i] = multiply(load_lanes(acc + i * dim + d + kLanes), factor);
        }
        for (int64_t j = 0; j < n_keys; ++j) {
            const uint8_t* value = reinterpret_cast<const uint8_t*>(values + j * dim + d);
            const LaneFloats a = load_lane_halves(value), b = load_lane_halves(value + 2 * kLanes);
            for (int i = 0; i < Q; ++i) {
                const LaneFloats weight = lanes_of(p[i * ld_p + j]);
                low[i] = multiply_add(weight, a, low[i]);
                high[i] = multiply_add(weight, b, high[i]);
            }
        }
        for (int i = 0; i < Q; ++i) {
            store_lanes(acc + i * dim + d, low[i]);
            store_lanes(acc + i * dim + d + kLanes, high[i]);
        }
    }
    for (; d < dim; ++d) {
        for (int i = 0; i < Q; ++i) {
            float sum = acc[i * dim + d] * rescale[i];
            for (int64_t j = 0; j < n_keys; ++j) sum += p[i * ld_p + j] * half_to_float(values[j * dim + d]);
            acc[i * dim + d] = sum;
        }
    }
}

void attend_values(const float* p, int64_t ld_p, const float* rescale, int64_t n_q, const uint16_t* values,
                   int64_t n_keys, int64_t dim, float* acc) {
    int64_t i = 0;
    for (; kLanes == 16 && i + 8 <= n_q; i += 8) {  // needs more than 16 registers
        values_tile<8>(p + i * ld_p, ld_p, rescale + i, values, n_keys, dim, acc + i * dim);
    }
    for (; i + 4 <= n_q; i += 4) {
        values_tile<4>(p + i * ld_p, ld_p, rescale + i, values, n_keys, dim, acc + i * dim);
    }
    for (; i + 2 <= n_q; i += 2) {
        values_tile<2>(p + i * ld_p, ld_p, rescale + i, values, n_keys, dim, acc + i * dim);
    }
    for (; i < n_q; ++i) values_tile<1>(p + i * ld_p, ld_p, rescale + i, values, n_keys, dim, acc + i * dim);
}

}  // namespace

}  // namespace qq
