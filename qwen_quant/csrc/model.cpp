// The configuration out of a file's metadata.
#include <cmath>

#include "model.h"

namespace qq {

namespace {

enum class Bias { kAlways, kMaybe };  // of q, k and v
enum class Experts { kNone, kShared, kRouted };  // kShared: and one that sees every token

// What tells one architecture from another.
struct Architecture {
    const char* name;
    Bias bias;
    bool qk_norm;
    Experts experts;
    bool qwen1;  // q, k and v are one tensor, the head is its own, feed_forward_length counts gate and up together
};

constexpr Architecture kArchitectures[] = {
    {"qwen", Bias::kAlways, false, Experts::kNone, true},
    {"qwen2", Bias::kAlways, false, Experts::kNone, false},
    {"qwen2moe", Bias::kMaybe, false, Experts::kShared, false},
    {"qwen3", Bias::kMaybe, true, Experts::kNone, false},
    {"qwen3moe", Bias::kMaybe, true, Experts::kRouted, false},
};

const Architecture& find_architecture(const GgufFile& file) {
    const std::string name = file.get_string("general.architecture");
    for (const Architecture& a : kArchitectures) {
        if (name == a.name) return a;
    }
    file.fail("key 'general.architecture'", "'" + name + "' is not supported",
              "use a qwen, qwen2, qwen2moe, qwen3 or qwen3moe model");
}

constexpr int64_t kLimit = 1 << 24;  // of a width

// Reads `<architecture>.<name>` keys.
class ConfigReader {
public:
    ConfigReader(const GgufFile& file, const std::string& prefix) : file_(file), prefix_(prefix + ".") {}

    bool has(const char* name) const { return file_.has(prefix_ + name); }

    int64_t size(const char* name, int64_t limit) const {
        const int64_t value = file_.get_int(prefix_ + name);
        if (value < 1 || value > limit) fail(name, std::to_string(value) + " is out of range");
        return value;
    }

    int64_t size_or(const char* name, int64_t otherwise, int64_t limit) const {
        return has(name) ? size(name, limit) : otherwise;
    }

    bool flag(const char* name) const { return file_.get_bool(prefix_ + name); }

    double number(const char* name) const { return file_.get_float(prefix_ + name); }

    float positive(const char* name) const {
        const double value = number(name);
        if (!(value > 0) || !std::isfinite(value)) fail(name, "is not a positive number");
        return static_cast<float>(value);
    }

    std::string text(const char* name) const { return file_.get_string(prefix_ + name); }

    // The names, without the architecture, that begin with `start`.
    std::vector<std::string> names_under(const std::string& start) const {
        std::vector<std::string> found;
        for (const auto& [key, value] : file_.metadata()) {
            if (key.rfind(prefix_ + start, 0) == 0) found.push_back(key.substr(prefix_.size()));
        }
        return found;
    }

    [[noreturn]] void fail(const char* name, const std::string& problem) const {
        file_.fail("key '" + prefix_ + name + "'", problem, "export the file again from a supported checkpoint");
    }

private:
    const GgufFile& file_;
    std::string prefix_;
};

// Every key that a file may hold under `rope.scaling.`: one that is not understood would change the arithmetic.
constexpr const char* kRopeScalingKeys[] = {
    "type", "factor", "original_context_length", "finetuned", "attn_factor",
    "yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor", "yarn_attn_factor",
};

void check_rope_keys(const ConfigReader& in, int64_t head_dim) {
    if (in.has("rope.dimension_count") && in.size("rope.dimension_count", 1 << 16) != head_dim) {
        in.fail("rope.dimension_count", "partial rotation is not supported");
    }
    for (const std::string& name : in.names_under("rope.scaling.")) {
        bool known = false;
        for (const char* key : kRopeScalingKeys) known = known || name == std::string("rope.scaling.") + key;
        if (!known) in.fail(name.c_str(), "is not known");
    }
    for (const char* name : {"rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"}) {
        if (in.has(name) && in.positive(name) != 1) in.fail(name, "other values than 1 are not supported");
    }
}

// As llama.cpp reads these keys, for which no type means linear, and a factor of 0 none.
RopeConfig read_rope(const ConfigReader& in, int64_t head_dim, int64_t context) {
    check_rope_keys(in, head_dim);
    RopeConfig rope;
    rope.theta = in.positive("rope.freq_base");
    const std::string type = in.has("rope.scaling.type") ? in.text("rope.scaling.type") : "linear";
    if (type == "linear") {
        rope.scaling = RopeScalingType::kLinear;
    } else if (type == "yarn") {
        rope.scaling = RopeScalingType::kYarn;
    } else if (type != "none") {
        in.fail("rope.scaling.type", "'" + type + "' is not supported");
    }
    const char* factor = in.has("rope.scaling.factor") ? "rope.scaling.factor" : "rope.scale_linear";
    if (rope.scaling != RopeScalingType::kNone && in.has(factor)) {
        const double value = in.number(factor);
        if (value != 0 && !(value >= 1 && value < 1e6)) in.fail(factor, "is out of range");
        rope.factor = value == 0 ? 1 : value;
    }
    rope.magnitude = in.has("rope.scaling.attn_factor") ? in.positive("rope.scaling.attn_factor") : 1.0f;
    if (rope.scaling != RopeScalingType::kYarn) return rope;
    rope.magnitude *= static_cast<float>(1 + 0.1 * std::log(rope.factor));  // the paper's; attn_factor comes on top
    rope.original_context =
        static_cast<double>(in.size_or("rope.scaling.original_context_length", context, int64_t{1} << 31));
    if (in.has("rope.scaling.yarn_beta_fast")) rope.beta_fast = in.positive("rope.scaling.yarn_beta_fast");
    if (in.has("rope.scaling.yarn_beta_slow")) rope.beta_slow = in.positive("rope.scaling.yarn_beta_slow");
    if (rope.beta_fast < rope.beta_slow) in.fail("rope.scaling.yarn_beta_slow", "is above yarn_beta_fast");
    if (rope.theta <= 1) in.fail("rope.freq_base", "is not above 1, as YaRN needs");
    return rope;
}

// Of the feed-forward lengths, `feed_forward_length` stands for those that are missing, as in llama.cpp.
ExpertConfig read_experts(const ConfigReader& in, Experts kind) {
    ExpertConfig e;
    e.count = in.size("expert_count", 1 << 12);
    e.used = in.size("expert_used_count", 1 << 12);
    if (e.used > e.count) {
        in.fail("expert_used_count", std::to_string(e.used) + " is more than the " + std::to_string(e.count) +
                                         " experts of expert_count");
    }
    e.intermediate = in.has("expert_feed_forward_length") ? in.size("expert_feed_forward_length", kLimit)
                                                          : in.size("feed_forward_length", kLimit) / e.used;
    if (kind == Experts::kShared) {
        e.shared_intermediate = in.has("expert_shared_feed_forward_length")
                                    ? in.size("expert_shared_feed_forward_length", kLimit)
                                    : in.size("feed_forward_length", kLimit);
    }
    e.normalize = kind == Experts::kRouted;
    if (in.has("expert_weights_norm") && in.flag("expert_weights_norm") != e.normalize) {
        in.fail("expert_weights_norm", "is not this architecture's");
    }
    if (in.has("expert_weights_scale") && in.positive("expert_weights_scale") != 1) {
        in.fail("expert_weights_scale", "other values than 1 are not supported");
    }
    constexpr int64_t kSoftmax = 1;  // llama.cpp's number
    if (in.has("expert_gating_func") && in.size("expert_gating_func", 1 << 8) != kSoftmax) {
        in.fail("expert_gating_func", "is not softmax");
    }
    return e;
}

int64_t read_dense_intermediate(const ConfigReader& in, bool qwen1) {
    const int64_t length = in.size("feed_forward_length", kLimit);
    if (!qwen1) return length;
    if (length % 2 != 0) in.fail("feed_forward_length", "is odd, but counts gate and up together");
    return length / 2;
}

}  // namespace

ModelConfig read_config(const GgufFile& file) {
    const Architecture& architecture = find_architecture(file);
    const ConfigReader in(file, architecture.name);
    ModelConfig c{};
    c.architecture = architecture.name;
    c.attention_bias = architecture.bias == Bias::kAlways ||
                       (architecture.bias == Bias::kMaybe && file.find_tensor("blk.0.attn_q.bias"));
    c.qk_norm = architecture.qk_norm;
    c.fused_qkv = c.own_head = c.context_is_limit = architecture.qwen1;
    c.n_layers = in.size("block_count", 4096);
    c.hidden = in.size("embedding_length", kLimit);
    if (architecture.experts == Experts::kNone) {
        c.intermediate = read_dense_intermediate(in, architecture.qwen1);
    } else {
        c.experts = read_experts(in, architecture.experts);
    }
    c.n_heads = in.size("attention.head_count", 1 << 16);
    c.n_kv_heads = in.size_or("attention.head_count_kv", c.n_heads, 1 << 16);
    if (c.n_heads % c.n_kv_heads != 0) in.fail("attention.head_count_kv", "does not divide the number of heads");
    if (!in.has("attention.key_length") && c.hidden % c.n_heads != 0) {
        in.fail("attention.head_count", "does not divide the embedding length");
    }
    c.head_dim = in.size_or("attention.key_length", c.hidden / c.n_heads, 1 << 16);
    if (in.size_or("attention.value_length", c.head_dim, 1 << 16) != c.head_dim) {
        in.fail("attention.value_length", "differs from the key length");
    }
    if (c.head_dim % 2 != 0) in.fail("attention.key_length", "is odd");
    if (in.has("attention.causal") && !in.flag("attention.causal")) {
        in.fail("attention.causal", "attention to later tokens is not supported");
    }
    c.rms_eps = in.positive("attention.layer_norm_rms_epsilon");
    c.context = in.size("context_length", int64_t{1} << 31);
    c.rope = read_rope(in, c.head_dim, c.context);
    if (in.has("attention.sliding_window")) {
        const int64_t window = file.get_int(c.architecture + ".attention.sliding_window");
        if (window > 0 && window < c.context) c.context = window;
    }
    return c;
}

}  // namespace qq
