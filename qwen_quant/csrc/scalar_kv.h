// The reference kernels of the quantized cache: one code at a time.
#pragma once

#include "kv_round.h"
// After kv_round.h:
#include "kv_store.h"

namespace qq {

namespace {

// Code of `lane` (a key of 16, a channel) and `index` (a channel, a token) in tiles that have `lanes` lanes.
template <KvType T>
int32_t code_at(const uint8_t* tiles, int64_t lanes, int64_t lane, int64_t index, int (*nibble)(int64_t)) {
    if (T == KvType::kInt8) return static_cast<int8_t>(tiles[(index / 2 * lanes + lane) * 2 + index % 2]);
    uint32_t word;
    std::memcpy(&word, tiles + (index / 8 * lanes + lane) * 4, 4);
    return static_cast<int32_t>(word >> nibble(index % 8) & 15u);
}

template <KvType T>
void kv_scores(const KvQueries& q, int64_t n_q, const KvTokens& keys, float* scores, int64_t ld) {
    const int64_t n_groups = keys.dim / kKvGroup;
    const QueryCode<T>* x = reinterpret_cast<const QueryCode<T>*>(q.codes);
    for (int64_t row = 0; row < n_q; ++row) {
        for (int64_t j = 0; j < keys.n; ++j) {
            const uint8_t* tiles = keys.codes + kv_codes_at(T, keys.dim, j & ~int64_t{15});
            float total = 0;
            for (int64_t g = 0; g < n_groups; ++g) {
                int32_t sum = 0;
                for (int64_t c = g * kKvGroup; c < (g + 1) * kKvGroup; ++c) {
                    sum += x[row * keys.dim + c] * code_at<T>(tiles, 16, j & 15, c, key_nibble);
                }
                const int64_t of_query = row * n_groups + g;
                const float scale = kv_scale(keys.scales[g * kKvBlock + j]) * q.scales[of_query];
                total += (static_cast<float>(sum) - q.offsets[of_query]) * scale;
            }
            scores[row * ld + j] = total;
        }
    }
}

template <KvType T>
void kv_values(const float* p, int64_t ld, const float* rescale, int64_t n_q, const KvTokens& values, float* acc) {
    const float middle = T == KvType::kInt8 ? 0.0f : kInt4Middle;
    for (int64_t row = 0; row < n_q; ++row) {
        for (int64_t g = 0; g < values.dim / kKvGroup; ++g) {
            float scales[kKvBlock];
            for (int64_t j = 0; j < values.n; ++j) scales[j] = kv_scale(values.scales[g * kKvBlock + j]);
            ScaledProbabilities scaled;
            scaled.set(p + row * ld, scales, values.n, middle);
            for (int64_t d = g * kKvGroup; d < (g + 1) * kKvGroup; ++d) {
                int32_t sum = 0;
                for (int64_t j = 0; j < values.n; ++j) {
                    sum += scaled.codes[j] * code_at<T>(values.codes, values.dim, d, j, value_nibble);
                }
                float& out = acc[row * values.dim + d];
                out = out * rescale[row] + (static_cast<float>(sum) - scaled.offset) * scaled.scale;
            }
        }
    }
}

void add_turned(const TurnedArgs& t, int64_t n_q, float* scores, int64_t ld) {
    for (int64_t row = 0; row < n_q; ++row) {
        for (int64_t i = 0; i < t.n_pairs; ++i) {
            const float a = t.a[row * t.n_pairs + i], b = t.b[row * t.n_pairs + i];
            for (int64_t j = 0; j < kKvBlock; ++j) {
                const int64_t at = t.pairs[i] * kKvBlock + j;
                scores[row * ld + j] += a * t.cosines[at] + b * t.sines[at];
            }
        }
    }
}

}  // namespace

}  // namespace qq
