// Runs a model: one call per chunk of tokens, in which all threads walk through the layers together.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "buffer.h"
#include "experts.h"
#include "gguf.h"
#include "kernels.h"
#include "kv_cache.h"
#include "model.h"
#include "threads.h"

namespace qq {

enum class Logits { kNone, kLast, kAll };

class Engine {
public:
    static constexpr int64_t kChunk = 256;  // most tokens that one step takes

    // n_threads 0: as many as are fastest, of the CPUs that the process may use.
    // n_ctx 0: what the model was made for. Cache types as in kv_layout.h.
    Engine(std::shared_ptr<GgufFile> file, int n_threads, const std::string& isa, int64_t n_ctx,
           const std::string& cache_type_k, const std::string& cache_type_v);

    // Held by the caller for a whole request: one call to begin and the steps that follow, or a reset or truncate.
    std::mutex& request() { return request_; }

    // Checks tokens and context for a whole request, before its first chunk, and forgets what lies beyond n_past.
    void begin(const int32_t* tokens, int64_t n_tokens, int64_t n_past);
    // Appends up to kChunk tokens to the context. logits: [n_vocab] or [n_tokens, n_vocab] as asked.
    void step(const int32_t* tokens, int64_t n_tokens, Logits which, float* logits);
    void truncate(int64_t n_tokens);  // forgets what lies beyond the first n_tokens of the context
    void reset();
    // The keys and values of the first n_tokens in one layer, as KvCache::layer_bytes describes them.
    size_t kv_layer_bytes(int64_t layer, int64_t n_tokens) const { return kv_.layer_bytes(layer, n_tokens); }
    void read_kv(int64_t layer, int64_t n_tokens, uint8_t* out) const { kv_.copy_out(layer, n_tokens, out); }
    // A context of n_tokens that comes from elsewhere, layer by layer; it is empty until the end.
    void begin_restore(int64_t n_tokens);
    void restore_layer(int64_t layer, int64_t n_tokens, const uint8_t* in) { kv_.copy_in(layer, n_tokens, in); }
    void end_restore(int64_t n_tokens) { n_past_ = n_tokens; }

    const ModelConfig& config() const { return model_.config; }
    const GgufFile& file() const { return *file_; }
    const Kernels& kernels() const { return *kernels_; }
    int64_t n_past() const { return n_past_; }
    int64_t n_ctx() const { return n_ctx_; }
    int n_threads() const { return team_.size(); }
    size_t weight_bytes() const;
    size_t kv_bytes() const { return kv_.bytes(); }
    const std::string& kv_type() const { return kv_type_; }
    double kv_bytes_per_token() const { return kv_.bytes_per_token(); }
    size_t scratch_bytes() const;

private:
    // Rows of activations as float and, where a weight wants them, as int8.
    struct Activations {
        float* floats;
        int64_t ld;  // floats per row
        uint8_t* int8;
        size_t int8_row_bytes;

        Activations from_row(int64_t row) const {
            return {floats + row * ld, ld, int8 + static_cast<size_t>(row) * int8_row_bytes, int8_row_bytes};
        }
    };
    // Of each token [n_tokens]: its experts and their weights [used], and the weight of the shared expert.
    struct Choices {
        int32_t* experts;
        float* weights;
        float* shared;
    };
    // Tokens that go through one expert together.
    struct ExpertBatch {
        const Mlp* mlp;
        int64_t n;
        const int32_t* tokens;  // [n] of the step; nullptr: all of them
        const float* weights;   // [n]: how much of the expert's output they take
        Activations x;          // [n, hidden]
        Activations gated;      // [n, the expert's intermediate]: what its down projection reads
    };
    static constexpr int64_t kRowUnit = 16;    // threads take whole groups of packed rows, whatever these have in lanes
    static constexpr int64_t kTokenGroup = 4;  // tokens that share each read of a key and value
    struct AttentionRows;
    struct Scratch {  // of one thread
        Buffer activations, int8, attention;
        Buffer choices, gated_int8;  // of a single token
        ExpertOrder order;
        std::vector<ExpertBatch> batches;
    };
    struct StepState {
        const int32_t* tokens;
        int64_t n_tokens;
        int64_t first;  // position of tokens[0]
        Logits which;
        float* logits;
    };

    void reserve_scratch(int64_t n_tokens);
    void reserve_expert_scratch(int64_t n_tokens);
    void extend_rope_tables(int64_t n_tokens);
    void make_block_turns();
    size_t attention_bytes() const;  // of one thread

    // What each thread runs.
    void walk(int id, const StepState& s);
    void embed(int id, const StepState& s);
    void project_qkv(int id, const StepState& s, int64_t layer);
    void finish_head(const StepState& s, int64_t layer, int64_t unit);
    void store_key(int64_t layer, int64_t head, int64_t position, float* x);    // both leave x changed
    void store_value(int64_t layer, int64_t head, int64_t position, float* x);
    void attend(int id, const StepState& s, int64_t layer);
    void attend_group(int id, const StepState& s, int64_t layer, int64_t kv_head, int64_t t0, int64_t t1);
    void prepare_queries(int64_t layer, int64_t kv_head, int64_t n_rows, const AttentionRows& rows);
    // Whether these rows belong to one token, for which each key and value comes from memory once: the values of a block
    // are then asked for while its keys are read, and the next block's keys while its values are.
    bool is_single(int64_t n_rows) const { return n_rows == model_.config.n_heads / model_.config.n_kv_heads; }
    void score_block(int64_t layer, int64_t kv_head, int64_t begin, int64_t n, int64_t n_rows,
                     const AttentionRows& rows);
    void add_values(int64_t layer, int64_t kv_head, int64_t begin, int64_t n, int64_t n_rows,
                    const AttentionRows& rows);
    void finish_row(int64_t layer, int64_t kv_head, float* out);
    void turn_centre(const KvHalf& keys, int64_t head, int64_t block, float* out) const;
    static void multiply_by(float* x, const float* factors, int64_t n);
    void project_residual(int id, const StepState& s, const Matrix& weight, float* source);
    void feed_forward(int id, const StepState& s, int64_t layer);
    void feed_forward_experts(int id, const StepState& s, int64_t layer);
    Choices route(int id, const StepState& s, const Layer& layer, const Activations& x);
    void collect_batches(int id, const StepState& s, const Layer& layer, const Activations& x, const Choices& choices);
    Activations gathered(int id, const StepState& s, const Layer& layer, const Activations& x);
    void gate_experts(int id);
    void quantize_gated(int id, const StepState& s);
    void project_experts(int id);
    void output(int id, const StepState& s);

    Activations normalized(int id, const float* x, int64_t n_tokens, const std::vector<float>& weight, int64_t layer,
                           bool int8);
    Activations prepared(int id, float* x, int64_t k, int64_t n_tokens, bool int8);
    void multiply(const Matrix& weight, Range rows, const Activations& x, int64_t n_tokens, float* y, int64_t ldy);
    bool wants_int8(const Matrix& m) const { return kernels_->types[m.type].int8_activations; }
    void report_not_finite(int64_t layer);

    std::shared_ptr<GgufFile> file_;
    const Kernels* kernels_;
    Model model_;
    ThreadTeam team_;
    Buffer packed_;  // the weights that are not read from the mapping
    std::string kv_type_;
    KvCache kv_;
    int64_t n_ctx_;
    int64_t n_past_ = 0;

    int64_t capacity_ = 0;              // tokens that the buffers below are made for
    Buffer hidden_, qkv_, attended_, gate_, up_, residual_;
    Buffer shared_floats_, shared_int8_;
    Buffer router_logits_, choices_, gathered_floats_, gathered_int8_, gated_int8_;  // with experts
    std::vector<Scratch> scratch_;
    std::vector<float> rope_frequencies_;     // radians per position [head_dim / 2]
    std::vector<float> rope_cos_, rope_sin_;  // [positions, head_dim / 2]
    std::vector<float> block_cos_, block_sin_;  // [head_dim / 2, kKvBlock]
    std::atomic<int64_t> not_finite_{-1};     // first layer that saw something not finite, n_layers for the output
    std::mutex request_;
};

}  // namespace qq
