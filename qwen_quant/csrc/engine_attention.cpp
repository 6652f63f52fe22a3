// Attention within a step: what is written to the cache of keys and values, and what is read from it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention_rows.h"
#include "engine.h"

namespace qq {

static_assert(KvCache::kPage % kKvBlock == 0, "a block of attention lies in one page");

size_t Engine::attention_bytes() const {
    const ModelConfig& c = model_.config;
    return AttentionRows::bytes(kTokenGroup * (c.n_heads / c.n_kv_heads), c.head_dim);
}

void Engine::reserve_partial_sums(const std::vector<AttentionUnit>& units) {
    const bool divided = std::any_of(units.begin(), units.end(), [](const AttentionUnit& u) { return u.begin > 0; });
    if (!divided || done_chunks_.size() >= units.size()) return;
    const ModelConfig& c = model_.config;
    const int64_t stride = AttentionSums::floats(kTokenGroup * (c.n_heads / c.n_kv_heads), c.head_dim);
    const size_t room = units.size() + units.size() / 4;  // a context grows
    partial_sums_ = Buffer(room * static_cast<size_t>(stride) * sizeof(float));
    done_chunks_ = std::vector<DoneChunks>(room);
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

void Engine::attend(int id, const StepState& s, int64_t layer) {
    const std::vector<AttentionUnit>& units = s.attention;
    in_pieces(id, static_cast<int64_t>(units.size()), 1, [&](Range piece) {
        for (Range run{piece.begin, piece.begin}; run.begin < piece.end; run.begin = run.end) {
            do {
                ++run.end;
            } while (run.end < piece.end && units[run.end].begin > 0);
            attend_run(id, s, layer, run);
        }
    });
}

// Units of the same tokens and head, one after the other.
void Engine::attend_run(int id, const StepState& s, int64_t layer, Range run) {
    const AttentionUnit& unit = s.attention[run.begin];
    const Part& part = s.parts[unit.part];
    const ModelConfig& c = model_.config;
    const int64_t dim = c.head_dim, per_kv = c.n_heads / c.n_kv_heads, n_rows = (unit.t1 - unit.t0) * per_kv;
    const int64_t width = (c.n_heads + 2 * c.n_kv_heads) * dim, place = kv_.place(part.sequence, layer);
    const int64_t first = unit.begin, end = s.attention[run.end - 1].end, all = part.first + unit.t1;
    const AttentionRows rows(scratch_[id].attention.as<float>(), n_rows, dim);
    for (int64_t t = unit.t0; t < unit.t1; ++t) {
        std::memcpy(rows.q + (t - unit.t0) * per_kv * dim,
                    qkv_.as<float>() + (part.row + t) * width + unit.kv_head * per_kv * dim,
                    static_cast<size_t>(per_kv * dim) * sizeof(float));
    }
    if (kv_.layout(place).key.quantized()) prepare_queries(place, unit.kv_head, rows);

    const bool alone = first == 0 && end == all;
    // The unit that the sums of the chunk from position 0 on are kept by
    const size_t origin = static_cast<size_t>(run.begin - first / kAttentionChunk);
    for (int64_t begin = first; begin < end; begin += kAttentionChunk) {
        const AttentionUnit chunk{unit.part, unit.t0, unit.t1, unit.kv_head, begin, std::min(begin + kAttentionChunk, end)};
        if (!alone) {
            attend_chunk(part, place, chunk, end, rows, partial_sums(origin + begin / kAttentionChunk, n_rows));
        } else if (begin == 0) {
            attend_chunk(part, place, chunk, end, rows, rows.sums);
        } else {
            attend_chunk(part, place, chunk, end, rows, rows.chunk);
            rows.sums.merge(rows.chunk, n_rows, dim);
        }
    }
    if (alone) return write_attended(part, place, unit, rows.sums);

    std::atomic<int64_t>& done = done_chunks_[origin].count;
    const int64_t mine = chunks_before(end) - first / kAttentionChunk;
    if (done.fetch_add(mine) + mine < chunks_before(all)) return;
    done.store(0);  // the last one merges what all have left, and no thread comes back to this before the next barrier
    const AttentionSums sums = partial_sums(origin, n_rows);
    for (int64_t i = 1; i < chunks_before(all); ++i) sums.merge(partial_sums(origin + i, n_rows), n_rows, dim);
    write_attended(part, place, unit, sums);
}

void Engine::attend_chunk(const Part& part, int64_t layer, const AttentionUnit& chunk, int64_t readable,
                          const AttentionRows& rows, const AttentionSums& sums) {
    const ModelConfig& c = model_.config;
    const int64_t per_kv = c.n_heads / c.n_kv_heads, first = part.first + chunk.t0, head = chunk.kv_head;
    sums.clear(rows.n, c.head_dim);
    const int64_t half_from = kv_.half_from(layer, first);
    for (int64_t begin = chunk.begin, n; begin < chunk.end; begin += n) {
        const bool half = begin >= half_from;
        n = std::min(kKvBlock, (half ? chunk.end : std::min(half_from, chunk.end)) - begin);
        score_block(layer, head, begin, n, half, rows);
        const int64_t filled = half || !kv_.layout(layer).value.quantized() ? n : kKvBlock;
        for (int64_t row = 0; row < rows.n; ++row) {
            const int64_t valid = std::clamp<int64_t>(first + row / per_kv + 1 - begin, 0, n);
            rows.rescale[row] =
                kernels_->softmax_block(rows.scores + row * kKvBlock, valid, filled, sums.top + row, sums.sum + row);
        }
        add_values(layer, head, begin, n, half, begin + n < readable, rows, sums.acc);
    }
}

AttentionSums Engine::partial_sums(size_t unit, int64_t n_rows) const {
    const ModelConfig& c = model_.config;
    const int64_t stride = AttentionSums::floats(kTokenGroup * (c.n_heads / c.n_kv_heads), c.head_dim);
    return AttentionSums::at(partial_sums_.as<float>() + static_cast<int64_t>(unit) * stride, n_rows, c.head_dim);
}

void Engine::write_attended(const Part& part, int64_t layer, const AttentionUnit& unit, const AttentionSums& sums) {
    const ModelConfig& c = model_.config;
    const int64_t dim = c.head_dim, per_kv = c.n_heads / c.n_kv_heads;
    for (int64_t row = 0; row < (unit.t1 - unit.t0) * per_kv; ++row) {
        const int64_t token = part.row + unit.t0 + row / per_kv, head = unit.kv_head * per_kv + row % per_kv;
        float* out = attended_.as<float>() + (token * c.n_heads + head) * dim;
        const float scale = 1.0f / sums.sum[row];
        for (int64_t i = 0; i < dim; ++i) out[i] = sums.acc[row * dim + i] * scale;
        finish_row(layer, unit.kv_head, out);
    }
}

// Queries in the basis of the stored keys, as codes.
void Engine::prepare_queries(int64_t layer, int64_t kv_head, const AttentionRows& rows) {
    const int64_t dim = model_.config.head_dim;
    const KvHalf& keys = kv_.layout(layer).key;
    std::copy(rows.q, rows.q + rows.n * dim, rows.turned);
    for (int64_t row = 0; row < rows.n; ++row) {
        float* x = rows.turned + row * dim;
        if (!keys.balance.empty()) multiply_by(x, keys.inverse_balance.data() + kv_head * dim, dim);
        if (keys.hadamard) kernels_->hadamard(x, dim);
    }
    kernels_->kv[static_cast<int>(keys.type)].quantize_queries(rows.turned, rows.n, dim, rows.codes);
}

void Engine::score_block(int64_t layer, int64_t kv_head, int64_t begin, int64_t n, bool half_floats,
                         const AttentionRows& rows) {
    const int64_t dim = model_.config.head_dim, half = dim / 2;
    const KvHalf& keys = kv_.layout(layer).key;
    const uint8_t* ahead = is_single(rows.n) ? kv_.value_codes(layer, kv_head, begin) : nullptr;
    if (keys.quantized() && !half_floats) {
        KvTokens tokens = kv_.keys(layer, kv_head, begin, n);
        tokens.ahead = ahead;
        kernels_->kv[static_cast<int>(keys.type)].scores(rows.codes, rows.n, tokens, rows.scores, kKvBlock);
    } else {
        kernels_->attend_scores(keys.quantized() ? rows.turned : rows.q, rows.n, kv_.key(layer, kv_head, begin), n, dim,
                                rows.scores, kKvBlock, ahead);
    }
    if (keys.centre.empty() || keys.pairs[kv_head].empty()) return;
    // A query's product with the turned centre u, j positions on: of each pair (q1 u1 + q2 u2) cos + (q2 u1 - q1 u2) sin.
    const std::vector<int32_t>& pairs = keys.pairs[kv_head];
    const int64_t n_pairs = static_cast<int64_t>(pairs.size());
    turn_centre(keys, kv_head, begin, rows.centre);
    for (int64_t row = 0; row < rows.n; ++row) {
        const float* q = rows.q + row * dim;
        for (int64_t p = 0; p < n_pairs; ++p) {
            const int64_t i = pairs[p];
            const float u1 = rows.centre[i], u2 = rows.centre[i + half];
            rows.centre_a[row * n_pairs + p] = q[i] * u1 + q[i + half] * u2;
            rows.centre_b[row * n_pairs + p] = q[i + half] * u1 - q[i] * u2;
        }
    }
    const TurnedArgs turned{pairs.data(), n_pairs, block_cos_.data(), block_sin_.data(), rows.centre_a, rows.centre_b};
    kernels_->add_turned(turned, rows.n, rows.scores, kKvBlock);
}

void Engine::add_values(int64_t layer, int64_t kv_head, int64_t begin, int64_t n, bool half_floats, bool goes_on,
                        const AttentionRows& rows, float* acc) {
    const KvHalf& values = kv_.layout(layer).value;
    const uint8_t* ahead = goes_on && is_single(rows.n) ? kv_.key_codes(layer, kv_head, begin + n) : nullptr;
    if (half_floats || !values.quantized()) {
        kernels_->attend_values(rows.scores, kKvBlock, rows.rescale, rows.n, kv_.value(layer, kv_head, begin), n,
                                model_.config.head_dim, acc, ahead);
        return;
    }
    KvTokens tokens = kv_.values(layer, kv_head, begin, n);
    tokens.ahead = ahead;
    kernels_->kv[static_cast<int>(values.type)].values(rows.scores, kKvBlock, rows.rescale, rows.n, tokens, acc);
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
