#include "engine.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "pack_weights.h"
#include "probe.h"

namespace qq {

namespace {

const Kernels& kernels_or_fail(const std::string& isa) {
    if (const Kernels* k = find_kernels(isa.c_str())) return *k;
    std::string known;
    for (const char* const* name = available_isas(); *name; ++name) known += std::string(", ") + *name;
    throw RunError("isa '" + isa + "' is unknown or cannot run on this CPU; use one of auto" + known);
}

int thread_count(int asked) {
    if (asked < 0 || asked > 1024) {
        throw RunError("n_threads " + std::to_string(asked) + " is out of range; use 1 to 1024, or 0 for what is fastest");
    }
    return asked ? asked : fastest_thread_count(usable_cpus());
}

int64_t context_or_fail(const GgufFile& file, const ModelConfig& c, int64_t asked) {
    if (c.context_is_limit && asked > c.context) {
        throw RunError(file.path() + ": n_ctx " + std::to_string(asked) + " exceeds the context_length of " +
                       std::to_string(c.context) + ", beyond which a " + c.architecture +
                       " file does not say how to attend; use a smaller n_ctx");
    }
    return asked > 0 ? asked : c.context;
}

int64_t widest_input(const ModelConfig& c) {
    return std::max({c.hidden, c.intermediate, c.n_heads * c.head_dim});
}

// Floats per token between the feed-forward's gate and down projections, of all the token's experts.
int64_t gated_width(const ModelConfig& c) {
    return c.experts.count ? c.experts.used * c.experts.intermediate + c.experts.shared_intermediate : c.intermediate;
}

}  // namespace

Engine::Engine(std::shared_ptr<GgufFile> file, int n_threads, const std::string& isa, int64_t n_ctx,
               const std::string& cache_type_k, const std::string& cache_type_v)
    : file_(std::move(file)),
      kernels_(&kernels_or_fail(isa)),
      model_(load_model(*file_, *kernels_)),
      team_(thread_count(n_threads)),
      ranges_(team_.size()),
      kv_type_(cache_type_k == cache_type_v ? cache_type_k : cache_type_k + "/" + cache_type_v),
      kv_(choose_kv_layout(*file_, model_, *kernels_, team_, cache_type_k, cache_type_v), model_.config.n_kv_heads,
          model_.config.head_dim),
      n_ctx_(context_or_fail(*file_, model_.config, n_ctx)),
      scratch_(static_cast<size_t>(team_.size())),
      rope_frequencies_(inverse_frequencies(model_.config.rope, model_.config.head_dim)) {
    kv_.resize(1);
    packed_ = pack_weights(model_, *file_, *kernels_, team_);
    make_block_turns();
}

size_t Engine::weight_bytes() const {
    size_t total = 0;
    for (const GgufTensor& tensor : file_->tensors()) total += tensor.nbytes;
    return total;
}

size_t Engine::scratch_bytes() const {
    size_t total = (rope_cos_.size() + rope_sin_.size()) * sizeof(float) + kv_.scratch_bytes();
    for (const Buffer* b : {&hidden_, &qkv_, &attended_, &gate_, &up_, &residual_, &shared_floats_, &shared_int8_,
                            &router_logits_, &choices_, &gathered_floats_, &gathered_int8_, &gated_int8_,
                            &partial_sums_}) {
        total += b->bytes();
    }
    for (const Scratch& s : scratch_) {
        for (const Buffer* b : {&s.activations, &s.int8, &s.attention, &s.choices, &s.gated_int8}) total += b->bytes();
    }
    return total;
}

void Engine::reset() {
    std::fill(n_past_.begin(), n_past_.end(), 0);
    kv_.clear();
}

void Engine::truncate(int64_t n_tokens) {
    if (n_tokens < 0 || n_tokens > n_past()) {
        throw RunError("cannot keep " + std::to_string(n_tokens) + " tokens, the context holds " +
                       std::to_string(n_past()));
    }
    n_past_[0] = n_tokens;
}

void Engine::fork(int64_t n_sequences) {
    if (n_sequences < 1 || n_sequences > kChunk) {
        throw RunError(std::to_string(n_sequences) + " sequences are out of range; use 1 to " + std::to_string(kChunk));
    }
    kv_.resize(n_sequences);
    for (int64_t sequence = 1; sequence < n_sequences; ++sequence) kv_.share(sequence);
    n_past_.assign(static_cast<size_t>(n_sequences), n_past());
}

void Engine::begin_restore(int64_t n_tokens) {
    if (n_tokens < 1 || n_tokens > n_ctx_) {
        throw RunError(std::to_string(n_tokens) + " tokens do not fit into the context of " + std::to_string(n_ctx_));
    }
    reset();
    kv_.reserve(0, 0, n_tokens);
}

void Engine::begin(const std::vector<Segment>& segments) const {
    std::vector<bool> seen(n_past_.size());
    for (const Segment& s : segments) {
        if (s.sequence < 0 || s.sequence >= n_sequences() || seen[static_cast<size_t>(s.sequence)]) {
            throw RunError("sequence " + std::to_string(s.sequence) + " does not exist or is named twice; there are " +
                           std::to_string(n_sequences()));
        }
        seen[static_cast<size_t>(s.sequence)] = true;
        if (s.n_tokens < 1) throw RunError("no tokens given; a prompt needs at least one");
        if (s.n_logits < 0 || s.n_logits > s.n_tokens) {
            throw RunError("logits of " + std::to_string(s.n_logits) + " of " + std::to_string(s.n_tokens) +
                           " tokens were asked for");
        }
        check_tokens(s);
    }
}

void Engine::check_tokens(const Segment& s) const {
    const ModelConfig& c = model_.config;
    for (int64_t i = 0; i < s.n_tokens; ++i) {
        if (s.tokens[i] < 0 || s.tokens[i] >= c.n_vocab) {
            throw RunError("token id " + std::to_string(s.tokens[i]) + " at position " + std::to_string(i) +
                           " is outside the vocabulary of " + std::to_string(c.n_vocab) +
                           "; use the tokenizer stored in " + file_->path());
        }
    }
    const int64_t total = n_past_[static_cast<size_t>(s.sequence)] + s.n_tokens;
    if (total > n_ctx_) {
        throw RunError(file_->path() + ": " + std::to_string(total) + " tokens exceed the context of " +
                       std::to_string(n_ctx_) + "; shorten the prompt" +
                       (c.context_is_limit && n_ctx_ == c.context ? " or generate less"
                                                                  : ", generate less, or raise n_ctx (-c)"));
    }
}

std::vector<Segment> Engine::next_chunk(std::vector<Segment>& left) {
    std::vector<Segment> chunk;
    int64_t room = kChunk;
    while (room > 0 && !left.empty()) {
        Segment& s = left.front();
        const int64_t take = std::min(room, s.n_tokens), later = s.n_tokens - take;
        chunk.push_back({s.sequence, s.tokens, take, std::max<int64_t>(s.n_logits - later, 0)});
        s = {s.sequence, s.tokens + take, later, std::min(s.n_logits, later)};
        room -= take;
        if (later == 0) left.erase(left.begin());
    }
    return chunk;
}

void Engine::step(const std::vector<Segment>& chunk, float* logits) {
    StepState state{{}, 0, {}, {}, {}, logits};
    int64_t longest = 0;
    for (const Segment& s : chunk) {
        const int64_t row = state.n_tokens, first = n_past_[static_cast<size_t>(s.sequence)];
        state.tokens.insert(state.tokens.end(), s.tokens, s.tokens + s.n_tokens);
        state.parts.push_back({s.sequence, row, s.n_tokens, first});
        state.n_tokens += s.n_tokens;
        for (int64_t i = s.n_tokens - s.n_logits; i < s.n_tokens; ++i) state.wanted.push_back(row + i);
        kv_.reserve(s.sequence, first, first + s.n_tokens);
        kv_.begin_step(s.sequence, first, s.n_tokens);
        longest = std::max(longest, first + s.n_tokens);
    }
    if (state.n_tokens > kChunk) throw RunError("more tokens in one step than Engine::kChunk");
    state.attention = attention_work(state.parts, model_.config.n_kv_heads, team_.size());
    reserve_scratch(state.n_tokens);
    reserve_partial_sums(state.attention);
    extend_rope_tables(longest);
    not_finite_.store(-1);
    team_.run([&](int id) { walk(id, state); });
    const int64_t bad = not_finite_.load();
    if (bad >= 0) {
        throw RunError(file_->path() + ": " +
                       (bad == kAtOutput ? "a logit that is not finite" :
                                           "an activation that is not finite enters layer " +
                                               std::to_string(bad % model_.config.n_layers)) +
                       "; the weights are damaged or overflow, export the file again");
    }
    for (const Segment& s : chunk) n_past_[static_cast<size_t>(s.sequence)] += s.n_tokens;
}

void Engine::reserve_scratch(int64_t n_tokens) {
    if (n_tokens <= capacity_) return;
    const ModelConfig& c = model_.config;
    const size_t rows = static_cast<size_t>(n_tokens);
    const size_t width = static_cast<size_t>(widest_input(c));
    const size_t q_dim = static_cast<size_t>(c.n_heads * c.head_dim);
    const size_t kv_dim = static_cast<size_t>(c.n_kv_heads * c.head_dim);
    capacity_ = 0;
    hidden_ = Buffer(rows * c.hidden * sizeof(float));
    residual_ = Buffer(rows * c.hidden * sizeof(float));
    qkv_ = Buffer(rows * (q_dim + 2 * kv_dim) * sizeof(float));
    attended_ = Buffer(rows * q_dim * sizeof(float));
    gate_ = Buffer(rows * gated_width(c) * sizeof(float));
    up_ = Buffer(rows * gated_width(c) * sizeof(float));
    shared_floats_ = Buffer(rows * c.hidden * sizeof(float));
    shared_int8_ = Buffer(rows * int8_stride(width));
    for (Scratch& s : scratch_) {
        s.activations = Buffer(width * sizeof(float));
        s.int8 = Buffer(q8_row_bytes(width));
        s.attention = Buffer(attention_bytes());
    }
    if (c.experts.count > 0) reserve_expert_scratch(n_tokens);
    capacity_ = n_tokens;
}

// As transformers computes them: frequencies and angles in FP32.
void Engine::extend_rope_tables(int64_t n_tokens) {
    const int64_t half = model_.config.head_dim / 2;
    const int64_t have = static_cast<int64_t>(rope_cos_.size()) / half;
    if (n_tokens <= have) return;
    const int64_t wanted = (n_tokens + KvCache::kPage - 1) / KvCache::kPage * KvCache::kPage;
    rope_cos_.resize(static_cast<size_t>(wanted * half));
    rope_sin_.resize(static_cast<size_t>(wanted * half));
    const float magnitude = model_.config.rope.magnitude;
    for (int64_t i = 0; i < half; ++i) {
        for (int64_t position = have; position < wanted; ++position) {
            const double angle = static_cast<float>(position) * rope_frequencies_[i];
            rope_cos_[position * half + i] = static_cast<float>(std::cos(angle)) * magnitude;
            rope_sin_[position * half + i] = static_cast<float>(std::sin(angle)) * magnitude;
        }
    }
}

void Engine::report_not_finite(int64_t layer) {
    int64_t seen = not_finite_.load();
    while ((seen < 0 || layer < seen) && !not_finite_.compare_exchange_weak(seen, layer)) {}
}

}  // namespace qq
