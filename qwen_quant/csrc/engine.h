// Runs a model: one call per chunk of tokens, in which all threads walk through the layers together.
#pragma once

#include <atomic>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "attention_work.h"
#include "buffer.h"
#include "experts.h"
#include "gguf.h"
#include "kernels.h"
#include "kv_cache.h"
#include "model.h"
#include "threads.h"

namespace qq {

// Tokens that follow what a sequence holds, and how many of the last of them want logits.
struct Segment {
    int64_t sequence;
    const int32_t* tokens;
    int64_t n_tokens;
    int64_t n_logits;
};

struct AttentionRows;
struct AttentionSums;

class Engine {
public:
    static constexpr int64_t kChunk = 256;  // most tokens that one step takes

    // n_threads 0: as many as are fastest, of the CPUs that the process may use.
    // n_ctx 0: what the model was made for. Cache types as in kv_layout.h.
    Engine(std::shared_ptr<GgufFile> file, int n_threads, const std::string& isa, int64_t n_ctx,
           const std::string& cache_type_k, const std::string& cache_type_v);

    // Held by the caller for a whole request: one call to begin and the steps that follow, or a reset or truncate.
    std::mutex& request() { return request_; }

    // How many sequences there are: the first one, which is meant where none is named, and others, which now hold what
    // the first one holds. That is not computed or stored again.
    void fork(int64_t n_sequences);
    int64_t n_sequences() const { return static_cast<int64_t>(n_past_.size()); }

    // Checks a whole request, before its first chunk: each segment stands for a sequence of its own.
    void begin(const std::vector<Segment>& segments) const;
    // Takes the tokens of the next step off the front of `left`.
    static std::vector<Segment> next_chunk(std::vector<Segment>& left);
    // Appends them to their sequences. logits: [rows wanted, n_vocab], in the order of the segments.
    void step(const std::vector<Segment>& chunk, float* logits);
    void truncate(int64_t n_tokens);  // forgets what lies beyond the first n_tokens of the context
    // The longest context of at most n_tokens that truncate goes back to with the same logits as if nothing had followed.
    int64_t exact_past(int64_t n_tokens) const { return kv_.exact_past(n_tokens); }
    // Tokens at the end of a step that can always be taken back so.
    int64_t exact_rewind() const { return kv_.recent_bytes() ? kKvRecent : n_ctx_; }
    void reset();                     // forgets all sequences
    // The keys and values of the first n_tokens in one layer, as KvCache::layer_bytes describes them.
    size_t kv_layer_bytes(int64_t layer, int64_t n_tokens) const { return kv_.layer_bytes(layer, n_tokens); }
    void read_kv(int64_t layer, int64_t n_tokens, uint8_t* out) const { kv_.copy_out(layer, n_tokens, out); }
    // A context of n_tokens that comes from elsewhere, layer by layer; it is empty until the end.
    void begin_restore(int64_t n_tokens);
    void restore_layer(int64_t layer, int64_t n_tokens, const uint8_t* in) { kv_.copy_in(layer, n_tokens, in); }
    void end_restore(int64_t n_tokens) { n_past_[0] = n_tokens; }

    const ModelConfig& config() const { return model_.config; }
    const GgufFile& file() const { return *file_; }
    const Kernels& kernels() const { return *kernels_; }
    int64_t n_past() const { return n_past_[0]; }
    int64_t n_ctx() const { return n_ctx_; }
    int n_threads() const { return team_.size(); }
    size_t weight_bytes() const;
    size_t kv_bytes() const { return kv_.bytes(); }
    size_t kv_recent_bytes() const { return kv_.recent_bytes(); }
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
    struct Scratch {  // of one thread
        Buffer activations, int8, attention;
        Buffer choices, gated_int8;  // of a single token
        ExpertOrder order;
        std::vector<ExpertBatch> batches;
        uint32_t stage = 0;  // stages of shared ranges so far
    };
    struct StepState {
        std::vector<int32_t> tokens;
        int64_t n_tokens;
        std::vector<Part> parts;
        std::vector<AttentionUnit> attention;
        std::vector<int64_t> wanted;  // rows whose logits are asked for, ascending
        float* logits;
    };
    static constexpr int64_t kAtOutput = std::numeric_limits<int64_t>::max();  // in place of a layer

    void check_tokens(const Segment& segment) const;
    void reserve_scratch(int64_t n_tokens);
    void reserve_expert_scratch(int64_t n_tokens);
    void extend_rope_tables(int64_t n_tokens);
    void make_block_turns();
    size_t attention_bytes() const;  // of one thread
    void reserve_partial_sums(const std::vector<AttentionUnit>& units);

    // What each thread runs.
    void walk(int id, const StepState& s);
    void embed(int id, const StepState& s);
    void project_qkv(int id, const StepState& s, int64_t layer);
    void finish_head(const Part& part, int64_t layer, int64_t unit);
    // Below `layer` is a sequence's, as KvCache::place numbers them, but for attend and attend_run.
    void store_key(int64_t layer, int64_t head, int64_t position, float* x);    // both leave x changed
    void store_value(int64_t layer, int64_t head, int64_t position, float* x);
    void attend(int id, const StepState& s, int64_t layer);
    void attend_run(int id, const StepState& s, int64_t layer, Range run);
    // Of one chunk alone; this thread reads on up to `readable`.
    void attend_chunk(const Part& part, int64_t layer, const AttentionUnit& chunk, int64_t readable,
                      const AttentionRows& rows, const AttentionSums& sums);
    AttentionSums partial_sums(size_t unit, int64_t n_rows) const;
    void write_attended(const Part& part, int64_t layer, const AttentionUnit& unit, const AttentionSums& sums);
    void prepare_queries(int64_t layer, int64_t kv_head, const AttentionRows& rows);
    // Whether these rows belong to one token, for which each key and value comes from memory once: the values of a block
    // are then asked for while its keys are read, and the next block's keys while its values are, if it goes on there.
    bool is_single(int64_t n_rows) const { return n_rows == model_.config.n_heads / model_.config.n_kv_heads; }
    // Both take n tokens from `begin` on, quantized unless `half_floats`.
    void score_block(int64_t layer, int64_t kv_head, int64_t begin, int64_t n, bool half_floats,
                     const AttentionRows& rows);
    void add_values(int64_t layer, int64_t kv_head, int64_t begin, int64_t n, bool half_floats, bool goes_on,
                    const AttentionRows& rows, float* acc);
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
    // Calls work(range) for pieces of n items, cut at multiples of `step`, until all threads together have done them.
    template <class Work>
    void in_pieces(int id, int64_t n, int64_t step, Work work) {
        const uint32_t stage = ++scratch_[id].stage;
        for (Range piece; ranges_.take(id, stage, n, step, piece);) work(piece);
    }

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
    SharedRanges ranges_;
    Buffer packed_;  // the weights that are not read from the mapping
    std::string kv_type_;
    KvCache kv_;
    int64_t n_ctx_;
    std::vector<int64_t> n_past_ = {0};  // of each sequence

    int64_t capacity_ = 0;              // tokens that the buffers below are made for
    Buffer hidden_, qkv_, attended_, gate_, up_, residual_;
    Buffer shared_floats_, shared_int8_;
    Buffer router_logits_, choices_, gathered_floats_, gathered_int8_, gated_int8_;  // with experts
    std::vector<Scratch> scratch_;
    // Of attention that is divided by positions, by the unit: sums, and by the first unit of the same tokens and head how
    // many chunks are done.
    struct DoneChunks {
        std::atomic<int64_t> count{0};
    };
    Buffer partial_sums_;
    std::vector<DoneChunks> done_chunks_;
    std::vector<float> rope_frequencies_;     // radians per position [head_dim / 2]
    std::vector<float> rope_cos_, rope_sin_;  // [positions, head_dim / 2]
    std::vector<float> block_cos_, block_sin_;  // [head_dim / 2, kKvBlock]
    std::atomic<int64_t> not_finite_{-1};     // first place that saw something not finite: as KvCache::place, or kAtOutput
    std::mutex request_;
};

}  // namespace qq
