// Attention within a step: what is written to the cache of keys and values, and what is read from it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine.h"

namespace qq {

static_assert(KvCache::kPage % kKvBlock == 0, "a block of attention lies in one page");

// What one thread needs for the rows of a group, all within its scratch.
struct Engine::AttentionRows {
    float *q, *acc, *scores, *top, *sum, *rescale;  // [rows, dim] twice, [rows, kKvBlock], [rows] three times
    float *turned, *centre_a, *centre_b;            // [rows, dim], and [rows, dim / 2] twice: with quantized keys
    float* centre;                                  // [dim]
    KvQueries codes;

    static size_t bytes(int64_t rows, int64_t dim) {
        return static_cast<size_t>(rows * (4 * dim + kKvBlock + 3 + 2 * (dim / kKvGroup)) + dim) * sizeof(float) +
               static_cast<size_t>(rows * dim) * sizeof(int16_t);
    }

    AttentionRows(float* scratch, int64_t rows, int64_t dim) {
        const auto take = [&](int64_t n) {
            float* part = scratch;
            scratch += n;
            return part;
        };
        q = take(rows * dim);
        acc = take(rows * dim);
        turned = take(rows * dim);
        scores = take(rows * kKvBlock);
        centre_a = take(rows * dim / 2);
        centre_b = take(rows * dim / 2);
        centre = take(dim);
        top = take(rows);
        sum = take(rows);
        rescale = take(rows);
        codes.scales = take(rows * (dim / kKvGroup));
        codes.offsets = take(rows * (dim / kKvGroup));
        codes.codes = reinterpret_cast<uint8_t*>(scratch);
    }
};

size_t Engine::attention_bytes() const {
    const ModelConfig& c = model_.config;
    return AttentionRows::bytes(kTokenGroup * (c.n_heads / c.n_kv_heads), c.head_dim);
}

// Cosines and sines [head_dim / 2, kKvBlock] of every pair at the positions within a block.
void Engine::make_block_turns() {
    for (const float frequency : rope_frequencies_) {
        for (int64_t j = 0; j < kKvBlock; ++j) {
            block_cos_.push_back(static_cast<float>(std::cos(static_cast<double>(frequency) * static_cast<double>(j))));
            block_sin_.push_back(static_cast<float>(std::sin(static_cast<double>(frequency) * static_cast<double>(j))));
        }
    }
}

// The centre of a head's keys, turned to the first position of a block: out [dim], where there are pairs.
void Engine::turn_centre(const KvHalf& keys, int64_t head, int64_t block, float* out) const {
    const int64_t dim = model_.config.head_dim, half = dim / 2;
    const float* centre = keys.centre.data() + head * dim;
    for (const int32_t i : keys.pairs[head]) {
        const float cosine = rope_cos_[block * half + i], sine = rope_sin_[block * half + i];
        out[i] = centre[i] * cosine - centre[i + half] * sine;
        out[i + half] = centre[i + half] * cosine + centre[i] * sine;
    }
}

void Engine::store_key(int64_t layer, int64_t head, int64_t position, float* x) {
    const int64_t dim = model_.config.head_dim, half = dim / 2;
    const KvHalf& keys = kv_.layout(layer).key;
    if (!keys.centre.empty()) {
        // Turned in the two steps in which scores get it back, so that what is taken out is exactly that.
        float centre[kLargestHead];
        const int64_t within = position % kKvBlock;
        turn_centre(keys, head, position - within, centre);
        for (const int32_t i : keys.pairs[head]) {
            const float cosine = block_cos_[i * kKvBlock + within], sine = block_sin_[i * kKvBlock + within];
            x[i] -= centre[i] * cosine - centre[i + half] * sine;
            x[i + half] -= centre[i + half] * cosine + centre[i] * sine;
        }
    }
    if (!keys.balance.empty()) multiply_by(x, keys.balance.data() + head * dim, dim);
    if (keys.hadamard) kernels_->hadamard(x, dim);
    kernels_->to_half(x, dim, kv_.key(layer, head, position));
    if (!keys.quantized()) return;
    uint8_t* page = kv_.key_page(layer, head, position);
    if (!kernels_->kv[static_cast<int>(keys.type)].store_key(x, dim, page, position % KvCache::kPage)) {
        report_not_finite(layer);
    }
}

void Engine::store_value(int64_t layer, int64_t head, int64_t position, float* x) {
    const int64_t dim = model_.config.head_dim;
    const KvHalf& values = kv_.layout(layer).value;
    if (!values.centre.empty()) {
        const float* centre = values.centre.data() + head * dim;
        for (int64_t i = 0; i < dim; ++i) x[i] -= centre[i];
    }
    if (!values.balance.empty()) multiply_by(x, values.balance.data() + head * dim, dim);
    if (values.hadamard) kernels_->hadamard(x, dim);
    kernels_->to_half(x, dim, kv_.value(layer, head, position));
    if (!values.quantized()) return;
    uint8_t* page = kv_.value_page(layer, head, position);
    if (!kernels_->kv[static_cast<int>(values.type)].store_value(x, dim, page, position % KvCache::kPage)) {
        report_not_finite(layer);
    }
}

void Engine::multiply_by(float* x, const float* factors, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] *= factors[i];
}

void Engine::attend(int id, const Part& s, int64_t layer) {
    const ModelConfig& c = model_.config;
    // Groups begin at multiples in the context, so that all of a group read the same tokens in FP16.
    const int64_t ahead = s.first % kTokenGroup;
    const int64_t groups = (ahead + s.n_tokens + kTokenGroup - 1) / kTokenGroup;
    // Later tokens see more keys: taking every n-th group gives all threads the same mix.
    for (int64_t item = id; item < groups * c.n_kv_heads; item += team_.size()) {
        const int64_t t0 = item / c.n_kv_heads * kTokenGroup - ahead;
        attend_group(id, s, layer, item % c.n_kv_heads, std::max<int64_t>(t0, 0), std::min(t0 + kTokenGroup, s.n_tokens));
    }
}

// Tokens [t0, t1), and all query heads that share one key/value head: rows (token, head) of an online softmax.
void Engine::attend_group(int id, const Part& s, int64_t layer, int64_t kv_head, int64_t t0, int64_t t1) {
    const ModelConfig& c = model_.config;
    const int64_t dim = c.head_dim, per_kv = c.n_heads / c.n_kv_heads, n_rows = (t1 - t0) * per_kv;
    const int64_t width = (c.n_heads + 2 * c.n_kv_heads) * dim;
    const AttentionRows rows(scratch_[id].attention.as<float>(), n_rows, dim);
    for (int64_t t = t0; t < t1; ++t) {
        std::memcpy(rows.q + (t - t0) * per_kv * dim, qkv_.as<float>() + (s.row + t) * width + kv_head * per_kv * dim,
                    static_cast<size_t>(per_kv * dim) * sizeof(float));
    }
    if (kv_.layout(layer).key.quantized()) prepare_queries(layer, kv_head, n_rows, rows);
    std::fill(rows.acc, rows.acc + n_rows * dim, 0.0f);
    std::fill(rows.top, rows.top + n_rows, -std::numeric_limits<float>::infinity());
    std::fill(rows.sum, rows.sum + n_rows, 0.0f);

    const int64_t end = s.first + t1, half_from = kv_.half_from(layer, s.first + t0);
    for (int64_t begin = 0, n; begin < end; begin += n) {
        const bool half = begin >= half_from;
        n = std::min(kKvBlock, (half ? end : half_from) - begin);
        score_block(layer, kv_head, begin, n, half, n_rows, rows);
        const int64_t filled = half || !kv_.layout(layer).value.quantized() ? n : kKvBlock;
        for (int64_t row = 0; row < n_rows; ++row) {
            const int64_t visible = s.first + t0 + row / per_kv + 1;
            const int64_t valid = std::clamp<int64_t>(visible - begin, 0, n);
            rows.rescale[row] =
                kernels_->softmax_block(rows.scores + row * kKvBlock, valid, filled, rows.top + row, rows.sum + row);
        }
        add_values(layer, kv_head, begin, n, half, n_rows, rows);
    }
    for (int64_t row = 0; row < n_rows; ++row) {
        const int64_t t = t0 + row / per_kv, head = kv_head * per_kv + row % per_kv;
        float* out = attended_.as<float>() + ((s.row + t) * c.n_heads + head) * dim;
        const float scale = 1.0f / rows.sum[row];
        for (int64_t i = 0; i < dim; ++i) out[i] = rows.acc[row * dim + i] * scale;
        finish_row(layer, kv_head, out);
    }
}

// Queries in the basis of the stored keys, as codes.
void Engine::prepare_queries(int64_t layer, int64_t kv_head, int64_t n_rows, const AttentionRows& rows) {
    const int64_t dim = model_.config.head_dim;
    const KvHalf& keys = kv_.layout(layer).key;
    std::copy(rows.q, rows.q + n_rows * dim, rows.turned);
    for (int64_t row = 0; row < n_rows; ++row) {
        float* x = rows.turned + row * dim;
        if (!keys.balance.empty()) multiply_by(x, keys.inverse_balance.data() + kv_head * dim, dim);
        if (keys.hadamard) kernels_->hadamard(x, dim);
    }
    kernels_->kv[static_cast<int>(keys.type)].quantize_queries(rows.turned, n_rows, dim, rows.codes);
}

void Engine::score_block(int64_t layer, int64_t kv_head, int64_t begin, int64_t n, bool half_floats, int64_t n_rows,
                         const AttentionRows& rows) {
    const int64_t dim = model_.config.head_dim, half = dim / 2;
    const KvHalf& keys = kv_.layout(layer).key;
    const uint8_t* ahead = is_single(n_rows) ? kv_.value_codes(layer, kv_head, begin) : nullptr;
    if (keys.quantized() && !half_floats) {
        KvTokens tokens = kv_.keys(layer, kv_head, begin, n);
        tokens.ahead = ahead;
        kernels_->kv[static_cast<int>(keys.type)].scores(rows.codes, n_rows, tokens, rows.scores, kKvBlock);
    } else {
        kernels_->attend_scores(keys.quantized() ? rows.turned : rows.q, n_rows, kv_.key(layer, kv_head, begin), n, dim,
                                rows.scores, kKvBlock, ahead);
    }
    if (keys.centre.empty() || keys.pairs[kv_head].empty()) return;
    // A query's product with the turned centre u, j positions on: of each pair (q1 u1 + q2 u2) cos + (q2 u1 - q1 u2) sin.
    const std::vector<int32_t>& pairs = keys.pairs[kv_head];
    const int64_t n_pairs = static_cast<int64_t>(pairs.size());
    turn_centre(keys, kv_head, begin, rows.centre);
    for (int64_t row = 0; row < n_rows; ++row) {
        const float* q = rows.q + row * dim;
        for (int64_t p = 0; p < n_pairs; ++p) {
            const int64_t i = pairs[p];
            const float u1 = rows.centre[i], u2 = rows.centre[i + half];
            rows.centre_a[row * n_pairs + p] = q[i] * u1 + q[i + half] * u2;
            rows.centre_b[row * n_pairs + p] = q[i + half] * u1 - q[i] * u2;
        }
    }
    const TurnedArgs turned{pairs.data(), n_pairs, block_cos_.data(), block_sin_.data(), rows.centre_a, rows.centre_b};
    kernels_->add_turned(turned, n_rows, rows.scores, kKvBlock);
}

void Engine::add_values(int64_t layer, int64_t kv_head, int64_t begin, int64_t n, bool half_floats, int64_t n_rows,
                        const AttentionRows& rows) {
    const KvHalf& values = kv_.layout(layer).value;
    const uint8_t* ahead = is_single(n_rows) ? kv_.key_codes(layer, kv_head, kv_.following(layer, begin, n)) : nullptr;
    if (half_floats || !values.quantized()) {
        kernels_->attend_values(rows.scores, kKvBlock, rows.rescale, n_rows, kv_.value(layer, kv_head, begin), n,
                                model_.config.head_dim, rows.acc, ahead);
        return;
    }
    KvTokens tokens = kv_.values(layer, kv_head, begin, n);
    tokens.ahead = ahead;
    kernels_->kv[static_cast<int>(values.type)].values(rows.scores, kKvBlock, rows.rescale, n_rows, tokens, rows.acc);
}

// From the basis of the stored values back to the model's.
void Engine::finish_row(int64_t layer, int64_t kv_head, float* out) {
    const int64_t dim = model_.config.head_dim;
    const KvHalf& values = kv_.layout(layer).value;
    if (!values.quantized()) return;
    if (values.hadamard) kernels_->hadamard(out, dim);
    if (!values.balance.empty()) multiply_by(out, values.inverse_balance.data() + kv_head * dim, dim);
    if (!values.centre.empty()) kernels_->add(out, values.centre.data() + kv_head * dim, dim);
}

}  // namespace qq
