// The feed-forward part of a step through a layer with experts. As in engine_step.cpp every function runs on all
// threads at once. Tokens are grouped by expert, so that an expert's weights are read once for all of them; a single
// token reads its own experts' weights, and needs two barriers.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine.h"

namespace qq {

namespace {

int64_t units_of(int64_t n_rows, int64_t unit) { return (n_rows + unit - 1) / unit; }

}  // namespace

void Engine::reserve_expert_scratch(int64_t n_tokens) {
    const int64_t hidden = model_.config.hidden;
    const ExpertConfig& e = model_.config.experts;
    const size_t tokens = static_cast<size_t>(n_tokens), pairs = tokens * static_cast<size_t>(e.used);
    const size_t choice_bytes = static_cast<size_t>(2 * e.used + 1) * sizeof(float);
    const size_t gated_int8_bytes =
        static_cast<size_t>(e.used) * int8_stride(e.intermediate) + int8_stride(e.shared_intermediate);
    router_logits_ = Buffer(tokens * static_cast<size_t>(e.count + 1) * sizeof(float));
    choices_ = Buffer(tokens * choice_bytes);
    gathered_floats_ = Buffer(pairs * static_cast<size_t>(hidden) * sizeof(float));
    gathered_int8_ = Buffer(pairs * int8_stride(hidden));
    gated_int8_ = Buffer(tokens * gated_int8_bytes);
    for (Scratch& s : scratch_) {
        s.choices = Buffer(choice_bytes);
        s.gated_int8 = Buffer(gated_int8_bytes);
        s.order.reserve(e.count, static_cast<int64_t>(pairs));
        s.batches.reserve(static_cast<size_t>(e.count) + 1);
    }
}

// hidden += the sum of each token's experts, times their weights
void Engine::feed_forward_experts(int id, const StepState& s, int64_t index) {
    const Layer& layer = model_.layers[index];
    const Mlp &first = layer.experts.front(), &shared = layer.shared_expert;
    bool int8 = false;
    for (const Matrix* m :
         {&layer.router, &layer.shared_gate, &first.gate, &first.up, &shared.gate, &shared.up}) {
        int8 = int8 || wants_int8(*m);
    }
    const Activations x = normalized(id, hidden_.as<float>(), s.n_tokens, layer.ffn_norm, index, int8);
    const Choices choices = route(id, s, layer, x);
    scratch_[id].order.sort(s.n_tokens, model_.config.experts.used, choices.experts, choices.weights);
    collect_batches(id, s, layer, x, choices);
    gate_experts(id);
    team_.barrier();
    quantize_gated(id, s);
    project_experts(id);
}

// One token: every thread chooses for itself. Several: each thread chooses for its share, and all meet.
Engine::Choices Engine::route(int id, const StepState& s, const Layer& layer, const Activations& x) {
    const ExpertConfig& e = model_.config.experts;
    const int64_t width = e.count + 1;  // the shared expert's gate stands behind the router's logits
    float* logits = router_logits_.as<float>();
    multiply(layer.router, share(e.count, id, team_.size()), x, s.n_tokens, logits, width);
    if (e.shared_intermediate > 0 && id == team_.size() - 1) {
        multiply(layer.shared_gate, {0, 1}, x, s.n_tokens, logits + e.count, width);
    }
    team_.barrier();

    const bool alone = s.n_tokens == 1;
    Choices c;
    c.experts = (alone ? scratch_[id].choices : choices_).as<int32_t>();
    c.weights = reinterpret_cast<float*>(c.experts + s.n_tokens * e.used);
    c.shared = c.weights + s.n_tokens * e.used;
    const Range tokens = alone ? Range{0, 1} : share(s.n_tokens, id, team_.size());
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
        const float* row = logits + t * width;
        choose_experts(row, e.count, e.used, e.normalize, c.experts + t * e.used, c.weights + t * e.used);
        if (e.shared_intermediate > 0) c.shared[t] = 1.0f / (1.0f + std::exp(-row[e.count]));
    }
    if (!alone) team_.barrier();
    return c;
}

// Lays out this thread's list of batches, the same for all: the experts that tokens chose, then the shared one.
void Engine::collect_batches(int id, const StepState& s, const Layer& layer, const Activations& x,
                             const Choices& choices) {
    const ExpertConfig& e = model_.config.experts;
    const bool alone = s.n_tokens == 1;
    const int64_t pairs = s.n_tokens * e.used;
    const ExpertOrder& order = scratch_[id].order;
    std::vector<ExpertBatch>& batches = scratch_[id].batches;
    batches.clear();
    const Activations routed = alone ? x : gathered(id, s, layer, x);
    uint8_t* int8 = (alone ? scratch_[id].gated_int8 : gated_int8_).data();
    const Activations gated{gate_.as<float>(), e.intermediate, int8, int8_stride(e.intermediate)};
    for (int64_t i = 0; i < e.count; ++i) {
        const int64_t begin = order.first[i], n = order.first[i + 1] - begin;
        if (n == 0) continue;
        batches.push_back({&layer.experts[i], n, order.tokens.data() + begin, order.weights.data() + begin,
                           routed.from_row(alone ? 0 : begin), gated.from_row(begin)});
    }
    if (e.shared_intermediate > 0) {
        const Activations behind = gated.from_row(pairs);
        batches.push_back({&layer.shared_expert, s.n_tokens, nullptr, choices.shared, x,
                           {behind.floats, e.shared_intermediate, behind.int8, int8_stride(e.shared_intermediate)}});
    }
}

// The rows of x that belong to each pair of token and expert, in the order of the experts.
Engine::Activations Engine::gathered(int id, const StepState& s, const Layer& layer, const Activations& x) {
    const int64_t hidden = model_.config.hidden, n_used = model_.config.experts.used;
    const Mlp& first = layer.experts.front();
    const bool int8 = wants_int8(first.gate) || wants_int8(first.up);
    const bool floats = !wants_int8(first.gate) || !wants_int8(first.up);
    const Activations out{gathered_floats_.as<float>(), hidden, gathered_int8_.data(), int8_stride(hidden)};
    const Range pairs = share(s.n_tokens * n_used, id, team_.size());
    for (int64_t i = pairs.begin; i < pairs.end; ++i) {
        const Activations from = x.from_row(scratch_[id].order.tokens[i]), to = out.from_row(i);
        if (floats) std::memcpy(to.floats, from.floats, static_cast<size_t>(hidden) * sizeof(float));
        if (int8) std::memcpy(to.int8, from.int8, out.int8_row_bytes);
    }
    team_.barrier();
    return out;
}

// silu(gate) * up of all batches. Their rows are laid end to end, each as long as its batch has tokens, and every
// thread takes an equal stretch: mostly whole experts when there are many tokens.
void Engine::gate_experts(int id) {
    const std::vector<ExpertBatch>& batches = scratch_[id].batches;
    int64_t length = 0;
    for (const ExpertBatch& b : batches) length += units_of(b.mlp->gate.rows, kRowUnit) * b.n;
    const Range mine = share(length, id, team_.size());
    int64_t at = 0;
    for (const ExpertBatch& b : batches) {
        const int64_t n_rows = b.mlp->gate.rows, units = units_of(n_rows, kRowUnit);
        // A unit belongs to the thread in whose stretch it begins.
        const auto row_at = [&](int64_t position) {
            return std::min(std::clamp<int64_t>((position - at + b.n - 1) / b.n, 0, units) * kRowUnit, n_rows);
        };
        const Range rows{row_at(mine.begin), row_at(mine.end)};
        at += units * b.n;
        if (rows.begin == rows.end) continue;
        float* gate = b.gated.floats;
        float* up = up_.as<float>() + (gate - gate_.as<float>());
        multiply(b.mlp->gate, rows, b.x, b.n, gate, n_rows);
        multiply(b.mlp->up, rows, b.x, b.n, up, n_rows);
        for (int64_t t = 0; t < b.n; ++t) {
            const int64_t first = t * n_rows + rows.begin;
            kernels_->swiglu(gate + first, up + first, rows.end - rows.begin);
        }
    }
}

void Engine::quantize_gated(int id, const StepState& s) {
    const bool alone = s.n_tokens == 1;
    int64_t row = 0;
    for (const ExpertBatch& b : scratch_[id].batches) {
        if (!wants_int8(b.mlp->down)) continue;
        for (int64_t t = 0; t < b.n; ++t, ++row) {
            if (!alone && row % team_.size() != id) continue;
            const Activations gated = b.gated.from_row(t);
            kernels_->quantize_row(gated.floats, gated.ld, gated.int8);
        }
    }
    if (!alone) team_.barrier();
}

// A thread's rows are its columns of the hidden state. They are added to in the order of the experts, whatever else
// is in the step.
void Engine::project_experts(int id) {
    const int64_t hidden = model_.config.hidden;
    const Range rows = share(hidden, id, team_.size(), kRowUnit);
    for (const ExpertBatch& b : scratch_[id].batches) {
        multiply(b.mlp->down, rows, b.gated, b.n, residual_.as<float>(), hidden);
        for (int64_t t = 0; t < b.n; ++t) {
            const float* from = residual_.as<float>() + t * hidden;
            float* to = hidden_.as<float>() + (b.tokens ? b.tokens[t] : t) * hidden;
            for (int64_t r = rows.begin; r < rows.end; ++r) to[r] += b.weights[t] * from[r];
        }
    }
}

}  // namespace qq
