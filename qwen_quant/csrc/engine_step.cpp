// One step through the model. Every function here runs on all threads at once; rows of each weight matrix are divided
// among them, a thread that is done early takes from the others, and a barrier stands wherever a stage reads what other
// threads wrote.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine.h"
#include "packed.h"

namespace qq {

void Engine::walk(int id, const StepState& s) {
    embed(id, s);
    team_.barrier();
    for (int64_t layer = 0; layer < model_.config.n_layers; ++layer) {
        project_qkv(id, s, layer);
        team_.barrier();
        attend(id, s, layer);
        team_.barrier();
        project_residual(id, s, model_.layers[layer].o, attended_.as<float>());
        team_.barrier();
        if (model_.config.experts.count > 0) {
            feed_forward_experts(id, s, layer);
        } else {
            feed_forward(id, s, layer);
        }
        team_.barrier();
    }
    output(id, s);
}

void Engine::embed(int id, const StepState& s) {
    const Matrix& table = model_.embedding;
    const Range tokens = share(s.n_tokens, id, team_.size());
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
        float* out = hidden_.as<float>() + t * table.cols;
        const TypeKernels& kernels = kernels_->types[table.type];
        if (table.packed) {
            decode_packed_row(table.type, table.data, table.cols, s.tokens[t], kernels_->lanes, kernels.pack_flip, out);
        } else {
            kernels.dequantize(table.data + s.tokens[t] * table.row_bytes, table.cols, out);
        }
    }
}

// One token: every thread makes the whole row for itself, which is cheaper than meeting at another barrier.
// Several: each thread makes its share, and all meet.
Engine::Activations Engine::normalized(int id, const float* x, int64_t n_tokens, const std::vector<float>& weight,
                                       int64_t layer, bool int8) {
    const int64_t k = static_cast<int64_t>(weight.size());
    const bool alone = n_tokens == 1;
    Activations a;
    a.floats = alone ? scratch_[id].activations.as<float>() : shared_floats_.as<float>();
    a.ld = k;
    a.int8 = alone ? scratch_[id].int8.data() : shared_int8_.data();
    a.int8_row_bytes = int8_stride(k);
    const Range tokens = alone ? Range{0, 1} : share(n_tokens, id, team_.size());
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
        float* out = a.floats + t * k;
        const float mean = kernels_->rms_norm(x + t * k, weight.data(), k, model_.config.rms_eps, out);
        if (!std::isfinite(mean)) report_not_finite(layer);
        if (int8) kernels_->quantize_row(out, k, a.int8 + t * a.int8_row_bytes);
    }
    if (!alone) team_.barrier();
    return a;
}

Engine::Activations Engine::prepared(int id, float* x, int64_t k, int64_t n_tokens, bool int8) {
    const bool alone = n_tokens == 1;
    Activations a;
    a.floats = x;
    a.ld = k;
    a.int8 = alone ? scratch_[id].int8.data() : shared_int8_.data();
    a.int8_row_bytes = int8_stride(k);
    if (!int8) return a;
    const Range tokens = alone ? Range{0, 1} : share(n_tokens, id, team_.size());
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
        kernels_->quantize_row(x + t * k, k, a.int8 + t * a.int8_row_bytes);
    }
    if (!alone) team_.barrier();
    return a;
}

// y[t * ldy + r] for the given rows r of the weight
void Engine::multiply(const Matrix& weight, Range rows, const Activations& x, int64_t n_tokens, float* y,
                      int64_t ldy) {
    if (rows.begin >= rows.end) return;
    const bool int8 = wants_int8(weight);
    MatmulArgs args;
    args.weights = weight.data + rows.begin * weight.row_bytes;
    args.row_bytes = weight.row_bytes;
    args.n_rows = rows.end - rows.begin;
    args.k = weight.cols;
    args.x = int8 ? x.int8 : reinterpret_cast<const uint8_t*>(x.floats);
    args.x_row_bytes = int8 ? x.int8_row_bytes : static_cast<size_t>(x.ld) * sizeof(float);
    args.n_tokens = n_tokens;
    args.y = y + rows.begin;
    args.ldy = ldy;
    const TypeKernels& kernels = kernels_->types[weight.type];
    (weight.packed ? kernels.matmul_packed : kernels.matmul)(args);
}

// Whole heads go to one thread, which then finishes them: bias, QK-norm, RoPE, and the write to the cache.
void Engine::project_qkv(int id, const StepState& s, int64_t index) {
    const ModelConfig& c = model_.config;
    const Layer& layer = model_.layers[index];
    const bool int8 = wants_int8(layer.q) || wants_int8(layer.k) || wants_int8(layer.v);
    const Activations x = normalized(id, hidden_.as<float>(), s.n_tokens, layer.attn_norm, index, int8);

    const int64_t width = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim;
    in_pieces(id, c.n_heads + 2 * c.n_kv_heads, 1, [&](Range heads) {
        int64_t first = 0;  // head number at which this matrix begins
        for (const Matrix* w : {&layer.q, &layer.k, &layer.v}) {
            const int64_t n = w->rows / c.head_dim;
            const int64_t begin = std::clamp<int64_t>(heads.begin - first, 0, n);
            const int64_t end = std::clamp<int64_t>(heads.end - first, 0, n);
            multiply(*w, {begin * c.head_dim, end * c.head_dim}, x, s.n_tokens,
                     qkv_.as<float>() + first * c.head_dim, width);
            first += n;
        }
        for (int64_t unit = heads.begin; unit < heads.end; ++unit) {
            for (const Part& part : s.parts) finish_head(part, index, unit);
        }
    });
}

void Engine::finish_head(const Part& part, int64_t index, int64_t unit) {
    const ModelConfig& c = model_.config;
    const Layer& layer = model_.layers[index];
    const int64_t dim = c.head_dim, width = (c.n_heads + 2 * c.n_kv_heads) * dim;
    const bool is_q = unit < c.n_heads, is_v = unit >= c.n_heads + c.n_kv_heads;
    const int64_t head = is_q ? unit : is_v ? unit - c.n_heads - c.n_kv_heads : unit - c.n_heads;
    const std::vector<float>& bias = is_q ? layer.q_bias : is_v ? layer.v_bias : layer.k_bias;
    const std::vector<float>& norm = is_q ? layer.q_norm : layer.k_norm;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    const int64_t place = kv_.place(part.sequence, index);
    if (!is_q) kv_.begin_head(place, is_v, head);
    for (int64_t t = 0; t < part.n_tokens; ++t) {
        const int64_t position = part.first + t;
        float* x = qkv_.as<float>() + (part.row + t) * width + unit * dim;
        if (!bias.empty()) kernels_->add(x, bias.data() + head * dim, dim);
        if (is_v) {
            store_value(place, head, position, x);
            continue;
        }
        if (!norm.empty()) kernels_->rms_norm(x, norm.data(), dim, c.rms_eps, x);
        kernels_->rope(x, rope_cos_.data() + position * (dim / 2), rope_sin_.data() + position * (dim / 2), dim / 2);
        if (is_q) {
            for (int64_t i = 0; i < dim; ++i) x[i] *= scale;
        } else {
            store_key(place, head, position, x);
        }
    }
    if (!is_q) kv_.end_head(place, is_v, head);
}

// hidden += weight @ source
void Engine::project_residual(int id, const StepState& s, const Matrix& weight, float* source) {
    const Activations x = prepared(id, source, weight.cols, s.n_tokens, wants_int8(weight));
    in_pieces(id, weight.rows, kRowUnit, [&](Range rows) {
        multiply(weight, rows, x, s.n_tokens, residual_.as<float>(), weight.rows);
        for (int64_t t = 0; t < s.n_tokens; ++t) {
            const int64_t at = t * weight.rows + rows.begin;
            kernels_->add(hidden_.as<float>() + at, residual_.as<float>() + at, rows.end - rows.begin);
        }
    });
}

void Engine::feed_forward(int id, const StepState& s, int64_t index) {
    const Layer& layer = model_.layers[index];
    const Mlp& mlp = layer.mlp;
    const int64_t n = model_.config.intermediate;
    const bool int8 = wants_int8(mlp.gate) || wants_int8(mlp.up);
    const Activations x = normalized(id, hidden_.as<float>(), s.n_tokens, layer.ffn_norm, index, int8);
    in_pieces(id, n, kRowUnit, [&](Range rows) {
        multiply(mlp.gate, rows, x, s.n_tokens, gate_.as<float>(), n);
        multiply(mlp.up, rows, x, s.n_tokens, up_.as<float>(), n);
        for (int64_t t = 0; t < s.n_tokens; ++t) {
            const int64_t at = t * n + rows.begin;
            kernels_->swiglu(gate_.as<float>() + at, up_.as<float>() + at, rows.end - rows.begin);
        }
    });
    team_.barrier();
    project_residual(id, s, mlp.down, gate_.as<float>());
}

void Engine::output(int id, const StepState& s) {
    const int64_t n = static_cast<int64_t>(s.wanted.size());
    if (n == 0) return;
    const ModelConfig& c = model_.config;
    float* hidden = hidden_.as<float>();
    const bool in_a_row = s.wanted.back() - s.wanted.front() == n - 1;
    if (!in_a_row) {  // the others are not needed any more
        if (id == 0) {
            for (int64_t i = 0; i < n; ++i) {
                std::memmove(hidden + i * c.hidden, hidden + s.wanted[i] * c.hidden,
                             static_cast<size_t>(c.hidden) * sizeof(float));
            }
        }
        team_.barrier();
    }
    const float* x = hidden + (in_a_row ? s.wanted.front() * c.hidden : 0);
    const Activations last = normalized(id, x, n, model_.output_norm, kAtOutput, wants_int8(model_.head));
    in_pieces(id, c.n_vocab, kRowUnit, [&](Range rows) {
        multiply(model_.head, rows, last, n, s.logits, c.n_vocab);
        for (int64_t t = 0; t < n; ++t) {
            const float* logits = s.logits + t * c.n_vocab;
            bool finite = true;
            for (int64_t r = rows.begin; r < rows.end; ++r) finite &= std::isfinite(logits[r]);
            if (!finite) report_not_finite(kAtOutput);
        }
    });
}

}  // namespace qq
