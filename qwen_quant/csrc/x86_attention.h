// x86: attention over one block of the cache.
#pragma once

#include <immintrin.h>

#include <cmath>

#include "x86_elementwise.h"

namespace qq {

namespace {

inline float max_lanes(__m256 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

template <int Q>
inline void scores_tile(const float* q, const uint16_t* keys, int64_t n_keys, int64_t dim, float* scores,
                        int64_t ld_scores) {
    for (int64_t j = 0; j < n_keys; ++j) {
        const uint16_t* key = keys + j * dim;
        __m256 acc[Q];
        for (int i = 0; i < Q; ++i) acc[i] = _mm256_setzero_ps();
        int64_t d = 0;
        for (; d + 8 <= dim; d += 8) {
            const __m256 k = load_half8(key + d);
            for (int i = 0; i < Q; ++i) acc[i] = _mm256_fmadd_ps(k, _mm256_loadu_ps(q + i * dim + d), acc[i]);
        }
        for (int i = 0; i < Q; ++i) {
            float sum = sum_lanes(acc[i]);
            for (int64_t e = d; e < dim; ++e) sum += q[i * dim + e] * half_to_float(key[e]);
            scores[i * ld_scores + j] = sum;
        }
    }
}

void attend_scores(const float* q, int64_t n_q, const uint16_t* keys, int64_t n_keys, int64_t dim, float* scores,
                   int64_t ld) {
    int64_t i = 0;
    for (; i + 4 <= n_q; i += 4) scores_tile<4>(q + i * dim, keys, n_keys, dim, scores + i * ld, ld);
    for (; i + 2 <= n_q; i += 2) scores_tile<2>(q + i * dim, keys, n_keys, dim, scores + i * ld, ld);
    for (; i < n_q; ++i) scores_tile<1>(q + i * dim, keys, n_keys, dim, scores + i * ld, ld);
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
    for (; d + 16 <= dim; d += 16) {
        __m256 low[Q], high[Q];
        for (int i = 0; i < Q; ++i) {
            const __m256 factor = _mm256_set1_ps(rescale[i]);
            low[i] = _mm256_mul_ps(_mm256_loadu_ps(acc + i * dim + d), factor);
            high[i] = _mm256_mul_ps(_mm256_loadu_ps(acc + i * dim + d + 8), factor);
        }
        for (int64_t j = 0; j < n_keys; ++j) {
            const __m256 a = load_half8(values + j * dim + d), b = load_half8(values + j * dim + d + 8);
            for (int i = 0; i < Q; ++i) {
                const __m256 weight = _mm256_broadcast_ss(p + i * ld_p + j);
                low[i] = _mm256_fmadd_ps(weight, a, low[i]);
                high[i] = _mm256_fmadd_ps(weight, b, high[i]);
            }
        }
        for (int i = 0; i < Q; ++i) {
            _mm256_storeu_ps(acc + i * dim + d, low[i]);
            _mm256_storeu_ps(acc + i * dim + d + 8, high[i]);
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
