// The values of one block of a quantized cache, whatever the instruction set; keys and what both share are in lane_kv.h.
#pragma once

#include "lane_kv.h"

namespace qq {

namespace {

// Probabilities of kKvBlock tokens times the tokens' scales for one group of channels, as int16 codes.
struct ScaledCodes {
    alignas(64) int16_t codes[kKvBlock];
    float scale, offset;

    template <KvType T>
    QQ_INLINE void set(const float* probabilities, const float* token_scales) {
        constexpr int n = kKvBlock / kLanes;
        LaneFloats products[n];
        LaneInts top = zero_sums();  // compared as integers, NaN is larger than every number
#pragma GCC unroll 16
        for (int v = 0; v < n; ++v) {
            products[v] = multiply(load_lanes(probabilities + v * kLanes), load_lanes(token_scales + v * kLanes));
            top = larger_bits(top, products[v]);
        }
        const LaneFloats largest = largest_lane(top), inverse = to_shorts(largest);
        LaneInts sum = zero_sums();
#pragma GCC unroll 16
        for (int v = 0; v < n; v += 2) {
            const LaneInts a = rounded(multiply(products[v], inverse)), b = rounded(multiply(products[v + 1], inverse));
            if (T == KvType::kInt4) sum = add_ints(sum, add_ints(a, b));
            store_shorts(codes + v * kLanes, a, b);
        }
        scale = first_lane(largest) * (1.0f / 32767.0f);  // NaN stays NaN
        offset = T == KvType::kInt4 ? kInt4Middle * total_of(to_floats(sum)) : 0.0f;
    }
};

// Channels [d, d + V * kLanes) of Q rows
template <KvType T, int Q, int V>
QQ_INLINE void add_value_columns(const ScaledCodes* scaled, const float* rescale, const KvTokens& values, int64_t d,
                                 float* acc) {
    const int64_t n = (values.n + 7) / 8 * 8;
    const int16_t* x[Q];
    for (int i = 0; i < Q; ++i) x[i] = scaled[i].codes;
    LaneInts sums[Q * V];
#pragma GCC unroll 16
    for (int i = 0; i < Q * V; ++i) sums[i] = zero_sums();
    const uint8_t* tile = values.codes + d * lane_bytes(T);
    for (int64_t j = 0; j < n; j += tile_depth(T), tile += values.dim * lane_bytes(T)) {
        add_tile<T, Q, V>(tile, x, j, sums);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) {
        const LaneFloats before = lanes_of(rescale[i]), scale = lanes_of(scaled[i].scale);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            float* out = acc + i * values.dim + d + v * kLanes;
            LaneFloats sum = to_floats(sums[i * V + v]);
            if (T == KvType::kInt4) sum = subtract(sum, lanes_of(scaled[i].offset));
            store_lanes(out, multiply_add(sum, scale, multiply(load_lanes(out), before)));
        }
    }
}

template <KvType T, int Q>
QQ_ALONE void kv_values_of(const float* p, int64_t ld, const float* rescale, const KvTokens& values, float* acc) {
    constexpr int V = Q * (kKvGroup / kLanes) <= 8 ? kKvGroup / kLanes : kVectors;  // 8 sums stay in registers
    const int64_t n = (values.n + 7) / 8 * 8, n_groups = values.dim / kKvGroup;
    ask_scales_ahead<T>(values);
    // Half of the codes are asked for now, half with the products: memory that has nothing to do is lost time.
    const int64_t half = n / tile_depth(T) * values.dim * lane_bytes(T) / 2;
    alignas(64) float scales[kKvBlock];
    ScaledCodes scaled[kLargestHead / kKvGroup][Q];  // all before the products, which would wait for each of them
    for (int64_t g = 0; g < n_groups; ++g) {
#pragma GCC unroll 8
        for (int64_t j = 0; j < kKvBlock; j += kLanes) {
            store_lanes(scales + j, lane_scales(values.scales + g * kKvBlock + j));
        }
        for (int i = 0; i < Q; ++i) scaled[g][i].template set<T>(p + i * ld, scales);
        ask_ahead(values, g * half / n_groups, (g + 1) * half / n_groups);
    }
    for (int64_t d = 0; d < values.dim; d += V * kLanes) {
        ask_ahead(values, half + d * half / values.dim, half + (d + V * kLanes) * half / values.dim);
        add_value_columns<T, Q, V>(scaled[d / kKvGroup], rescale, values, d, acc);
    }
}

template <KvType T>
void kv_values(const float* p, int64_t ld, const float* rescale, int64_t n_q, const KvTokens& values, float* acc) {
    int64_t i = 0;
    for (; i + 4 <= n_q; i += 4) kv_values_of<T, 4>(p + i * ld, ld, rescale + i, values, acc + i * values.dim);
    for (; i + 2 <= n_q; i += 2) kv_values_of<T, 2>(p + i * ld, ld, rescale + i, values, acc + i * values.dim);
    for (; i < n_q; ++i) kv_values_of<T, 1>(p + i * ld, ld, rescale + i, values, acc + i * values.dim);
}

}  // namespace

}  // namespace qq
