// Attention over one block of a quantized cache, whatever the instruction set. A lane is a key, or a channel of the values.
// Codes are widened to 16 bits and multiplied with numbers of 16 bits, two products to a lane; only int4 keys stay bytes,
// as their queries are. A header with what the lanes do is included before (x86_kv.h, neon_kv.h).
#pragma once

#include "kv_block.h"
#include "lanes.h"

namespace qq {

namespace {

constexpr int kVectors = 16 / kLanes;  // for 16 keys, or 16 channels

constexpr int64_t tile_depth(KvType type) { return type == KvType::kInt8 ? 2 : 8; }
constexpr int64_t lane_bytes(KvType type) { return type == KvType::kInt8 ? 2 : 4; }  // of a lane in a tile

// Asks for bytes [begin, end) of the block that is wanted next, if any is.
inline void ask_ahead(const KvTokens& tokens, int64_t begin, int64_t end) {
    if (!tokens.ahead) return;
    for (int64_t at = begin; at < end; at += 64) prefetch(tokens.ahead + at);
}
template <KvType T>
inline void ask_scales_ahead(const KvTokens& tokens) {
    const int64_t codes = static_cast<int64_t>(kv_code_bytes(T, tokens.dim));
    ask_ahead(tokens, codes, codes + kKvBlock * tokens.dim / kKvGroup);
}

inline LaneInts two_codes(const int16_t* p) { return four_of_x(reinterpret_cast<const uint8_t*>(p)); }

// sums [Q][V] += products of a tile's codes with the pairs of 16-bit numbers at x[q]. A tile is V vectors wide and 2 (int8)
// or 8 (int4) codes deep.
template <KvType T, int Q, int V>
QQ_INLINE void add_tile(const uint8_t* tile, const int16_t* const (&x)[Q], int64_t at, LaneInts (&sums)[Q * V]) {
    LaneInts codes[V];
    const auto multiply_in = [&](int64_t offset) QQ_LAMBDA_INLINE {
#pragma GCC unroll 8  // here and below: or the sums would be kept in memory
        for (int q = 0; q < Q; ++q) {
            const LaneInts pair = two_codes(x[q] + at + offset);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[q * V + v] = add_products(sums[q * V + v], codes[v], pair);
        }
    };
    if constexpr (T == KvType::kInt8) {
        for (int v = 0; v < V; ++v) codes[v] = widened(tile + v * 2 * kLanes);
        multiply_in(0);
    } else {
        LaneInts words[V];
        for (int v = 0; v < V; ++v) words[v] = load_codes(tile + v * 4 * kLanes);
        for (int v = 0; v < V; ++v) codes[v] = nibbles_at<0>(words[v]);
        multiply_in(0);
        for (int v = 0; v < V; ++v) codes[v] = nibbles_at<4>(words[v]);
        multiply_in(2);
        for (int v = 0; v < V; ++v) codes[v] = nibbles_at<8>(words[v]);
        multiply_in(4);
        for (int v = 0; v < V; ++v) codes[v] = nibbles_at<12>(words[v]);
        multiply_in(6);
    }
}

// The same for 16 int4 keys with queries of 8 bits, four products to a lane: sums that whole_sums completes
template <int Q>
inline void add_byte_tile(const uint8_t* tile, const uint8_t* const (&x)[Q], int64_t at, LaneInts (&sums)[Q * kVectors]) {
    LaneInts words[kVectors], codes[kVectors];
    const auto multiply_in = [&](int64_t offset) {
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) {
            const LaneInts four = four_of_x(x[q] + at + offset);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                sums[q * kVectors + v] = add_byte_products(sums[q * kVectors + v], codes[v], four);
            }
        }
    };
    for (int v = 0; v < kVectors; ++v) words[v] = load_codes(tile + v * 4 * kLanes);
    for (int v = 0; v < kVectors; ++v) codes[v] = mask_bytes(words[v], 15);
    multiply_in(0);
    for (int v = 0; v < kVectors; ++v) codes[v] = mask_bytes(shift<-4>(words[v]), 15);
    multiply_in(4);
}

// The products of a group of 32 channels of 16 keys with Q queries
template <KvType T, int Q>
inline void add_group(const uint8_t* tile, const KvQueries& q, int64_t row, int64_t dim, int64_t channel,
                      LaneInts (&sums)[Q * kVectors]) {
#pragma GCC unroll 16
    for (int i = 0; i < Q * kVectors; ++i) sums[i] = zero_sums();
    if constexpr (T == KvType::kInt8) {
        const int16_t* x[Q];
        for (int i = 0; i < Q; ++i) x[i] = reinterpret_cast<const int16_t*>(q.codes) + (row + i) * dim + channel;
        for (int64_t c = 0; c < kKvGroup; c += 2, tile += 16 * lane_bytes(T)) {
            add_tile<T, Q, kVectors>(tile, x, c, sums);
        }
    } else {
        const uint8_t* x[Q];
        for (int i = 0; i < Q; ++i) x[i] = q.codes + (row + i) * dim + channel;
        for (int64_t c = 0; c < kKvGroup; c += 8, tile += 16 * lane_bytes(T)) add_byte_tile<Q>(tile, x, c, sums);
#pragma GCC unroll 16
        for (int i = 0; i < Q * kVectors; ++i) sums[i] = whole_sums(sums[i]);
    }
}

template <KvType T, int Q>
QQ_ALONE void kv_scores_of(const KvQueries& q, int64_t row, const KvTokens& keys, float* scores, int64_t ld) {
    const int64_t n_groups = keys.dim / kKvGroup, n_tiles = (keys.n + 15) / 16;
    constexpr int64_t kGroupBytes = kKvGroup / tile_depth(T) * 16 * lane_bytes(T);
    ask_scales_ahead<T>(keys);
    const uint8_t* tile = keys.codes;
    for (int64_t at = 0; at < n_tiles; ++at) {
        const int64_t key = 16 * at;
        LaneFloats total[Q * kVectors];
#pragma GCC unroll 16
        for (int i = 0; i < Q * kVectors; ++i) total[i] = lanes_of(0.0f);
        for (int64_t g = 0; g < n_groups; ++g) {
            ask_ahead(keys, (at * n_groups + g) * kGroupBytes, (at * n_groups + g + 1) * kGroupBytes);
            LaneInts sums[Q * kVectors];
            add_group<T, Q>(tile, q, row, keys.dim, g * kKvGroup, sums);
            tile += kGroupBytes;
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                const LaneFloats scale = lane_scales(keys.scales + g * kKvBlock + key + v * kLanes);
#pragma GCC unroll 8
                for (int i = 0; i < Q; ++i) {
                    const int64_t of_query = (row + i) * n_groups + g;
                    LaneFloats sum = to_floats(sums[i * kVectors + v]);
                    if (T == KvType::kInt4) sum = subtract(sum, lanes_of(q.offsets[of_query]));
                    LaneFloats& all = total[i * kVectors + v];
                    all = multiply_add(sum, multiply(scale, lanes_of(q.scales[of_query])), all);
                }
            }
        }
        for (int i = 0; i < Q; ++i) {
            float* out = scores + (row + i) * ld + key;
            for (int v = 0; v < kVectors; ++v) store_lanes(out + v * kLanes, total[i * kVectors + v]);
        }
    }
}

template <KvType T>
void kv_scores(const KvQueries& q, int64_t n_q, const KvTokens& keys, float* scores, int64_t ld) {
    int64_t row = 0;
    for (; row + 4 <= n_q; row += 4) kv_scores_of<T, 4>(q, row, keys, scores, ld);
    for (; row + 2 <= n_q; row += 2) kv_scores_of<T, 2>(q, row, keys, scores, ld);
    for (; row < n_q; ++row) kv_scores_of<T, 1>(q, row, keys, scores, ld);
}

// scores [n_q, ld] += cosines [kKvBlock] of each pair times its a, and sines times its b; a and b are [n_q, n_pairs].
void add_turned(const TurnedArgs& t, int64_t n_q, float* scores, int64_t ld) {
    for (int64_t row = 0; row < n_q; ++row) {
        for (int64_t begin = 0; begin < kKvBlock; begin += 4 * kLanes) {
            float* out = scores + row * ld + begin;
            LaneFloats sums[4];
            for (int v = 0; v < 4; ++v) sums[v] = load_lanes(out + v * kLanes);
            for (int64_t i = 0; i < t.n_pairs; ++i) {
                const LaneFloats a = lanes_of(t.a[row * t.n_pairs + i]), b = lanes_of(t.b[row * t.n_pairs + i]);
                const float* cosine = t.cosines + t.pairs[i] * kKvBlock + begin;
                const float* sine = t.sines + t.pairs[i] * kKvBlock + begin;
                for (int v = 0; v < 4; ++v) {
                    sums[v] = multiply_add(a, load_lanes(cosine + v * kLanes), sums[v]);
                    sums[v] = multiply_add(b, load_lanes(sine + v * kLanes), sums[v]);
                }
            }
            for (int v = 0; v < 4; ++v) store_lanes(out + v * kLanes, sums[v]);
        }
    }
}

}  // namespace

}  // namespace qq
