// x86: attention over one block of the cache.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <type_traits>

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

// Asks for FP16 numbers [begin, end) of what is wanted next, if anything is.
inline void ask_ahead(const uint8_t* ahead, int64_t begin, int64_t end) {
    if (!ahead) return;
    for (int64_t at = 2 * begin / 64 * 64; at < 2 * end; at += 64) prefetch(ahead + at);
}

// Pointers to N rows that move along together, three to a register: x86 adds a stride once or twice by itself. More
// registers than there are would be kept in memory.
template <int N, class T>
struct MovingRows {
    T* bases[(N + 2) / 3];
    int64_t stride;

    QQ_INLINE MovingRows(T* first, int64_t s) : stride(s) {
        for (int b = 0; b < (N + 2) / 3; ++b) bases[b] = first + 3 * b * s;
    }
    QQ_INLINE T* row(int i) const { return bases[i / 3] + i % 3 * stride; }
    QQ_INLINE void move(int64_t n) {
#pragma GCC unroll 3
        for (T*& base : bases) {
            base += n;
            asm("" : "+r"(base));  // or the compiler would make one pointer for each row
        }
    }
};

// Q queries and J keys
template <int Q, int J>
inline void scores_tile(const float* q, const uint16_t* keys, int64_t dim, float* scores, int64_t ld_scores) {
    LaneFloats acc[Q * J];
#pragma GCC unroll 8  // here and below: or the sums would be kept in memory
    for (int i = 0; i < Q * J; ++i) acc[i] = lanes_of(0.0f);
    MovingRows<Q, const float> queries(q, dim);
    MovingRows<J, const uint16_t> halves(keys, dim);
    const int64_t whole = dim / kLanes * kLanes;
    for (int64_t d = 0; d < whole; d += kLanes) {
        LaneFloats key[J];
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) key[j] = load_lane_halves(reinterpret_cast<const uint8_t*>(halves.row(j)));
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) {
            const LaneFloats query = load_lanes(queries.row(i));
#pragma GCC unroll 8
            for (int j = 0; j < J; ++j) acc[i * J + j] = multiply_add(key[j], query, acc[i * J + j]);
        }
        queries.move(kLanes);
        halves.move(kLanes);
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
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) scores[i * ld_scores + j] = sums[i * J + j];
    }
    if (whole == dim) return;
    for (int i = 0; i < Q; ++i) {
        for (int j = 0; j < J; ++j) {
            float& sum = scores[i * ld_scores + j];
            for (int64_t e = whole; e < dim; ++e) sum += q[i * dim + e] * half_to_float(keys[j * dim + e]);
        }
    }
}

template <int Q>
QQ_ALONE void scores_of(const float* q, const uint16_t* keys, int64_t n_keys, int64_t dim, float* scores, int64_t ld,
                        const uint8_t* ahead) {
    constexpr int J = 8 / Q;
    int64_t j = 0;
    for (; j + J <= n_keys; j += J) {
        ask_ahead(ahead, j * dim, (j + J) * dim);
        scores_tile<Q, J>(q, keys + j * dim, dim, scores + j, ld);
    }
    for (; j < n_keys; ++j) scores_tile<Q, 1>(q, keys + j * dim, dim, scores + j, ld);
}

void attend_scores(const float* q, int64_t n_q, const uint16_t* keys, int64_t n_keys, int64_t dim, float* scores,
                   int64_t ld, const uint8_t* ahead) {
    int64_t i = 0;
    const auto take = [&](auto rows) {
        constexpr int Q = decltype(rows)::value;
        for (; i + Q <= n_q; i += Q) {
            scores_of<Q>(q + i * dim, keys, n_keys, dim, scores + i * ld, ld, i == 0 ? ahead : nullptr);
        }
    };
    take(std::integral_constant<int, 8>());
    take(std::integral_constant<int, 4>());
    take(std::integral_constant<int, 2>());
    take(std::integral_constant<int, 1>());
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

// Channels [d, d + V * kLanes) of Q rows: Q * V sums, so many that no addition waits for the one before it.
template <int Q, int V>
QQ_INLINE void add_value_columns(const float* p, int64_t ld_p, const float* rescale, const uint16_t* values,
                                 int64_t n_keys, int64_t dim, float* acc) {
    LaneFloats sums[Q * V];
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) {
        const LaneFloats factor = lanes_of(rescale[i]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[i * V + v] = multiply(load_lanes(acc + i * dim + v * kLanes), factor);
    }
    for (int64_t j = 0; j < n_keys; ++j, values += dim) {
        LaneFloats weights[Q];
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) weights[i] = lanes_of(p[i * ld_p + j]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const LaneFloats value = load_lane_halves(reinterpret_cast<const uint8_t*>(values + v * kLanes));
#pragma GCC unroll 8
            for (int i = 0; i < Q; ++i) sums[i * V + v] = multiply_add(weights[i], value, sums[i * V + v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store_lanes(acc + i * dim + v * kLanes, sums[i * V + v]);
    }
}

template <int Q>
QQ_ALONE void values_tile(const float* p, int64_t ld_p, const float* rescale, const uint16_t* values, int64_t n_keys,
                          int64_t dim, float* acc, const uint8_t* ahead) {
    constexpr int V = 8 / Q;
    int64_t d = 0;
    for (; d + V * kLanes <= dim; d += V * kLanes) {
        ask_ahead(ahead, d * n_keys, (d + V * kLanes) * n_keys);
        add_value_columns<Q, V>(p, ld_p, rescale, values + d, n_keys, dim, acc + d);
    }
    for (; d + kLanes <= dim; d += kLanes) add_value_columns<Q, 1>(p, ld_p, rescale, values + d, n_keys, dim, acc + d);
    for (; d < dim; ++d) {
        for (int i = 0; i < Q; ++i) {
            float sum = acc[i * dim + d] * rescale[i];
            for (int64_t j = 0; j < n_keys; ++j) sum += p[i * ld_p + j] * half_to_float(values[j * dim + d]);
            acc[i * dim + d] = sum;
        }
    }
}

void attend_values(const float* p, int64_t ld_p, const float* rescale, int64_t n_q, const uint16_t* values,
                   int64_t n_keys, int64_t dim, float* acc, const uint8_t* ahead) {
    int64_t i = 0;
    const auto take = [&](auto rows) {
        constexpr int Q = decltype(rows)::value;
        for (; i + Q <= n_q; i += Q) {
            values_tile<Q>(p + i * ld_p, ld_p, rescale + i, values, n_keys, dim, acc + i * dim,
                           i == 0 ? ahead : nullptr);
        }
    };
    if constexpr (kLanes == 16) take(std::integral_constant<int, 8>());  // needs more than 16 registers
    take(std::integral_constant<int, 4>());
    take(std::integral_constant<int, 2>());
    take(std::integral_constant<int, 1>());
}

}  // namespace

}  // namespace qq
