// Attention over one block of the cache in FP16, whatever the instruction set: a header with its lanes is included before,
// and store_sums, which adds up the lanes of several vectors.
#pragma once

#include <type_traits>

#include "half.h"
#include "lanes.h"

namespace qq {

namespace {

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
    store_sums(acc, sums);
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
