#include "model.h"

#include <cmath>
#include <unordered_set>

namespace qq {

namespace {

// What tells one architecture from another.
struct Architecture {
    const char* name;
    bool attention_bias, qk_norm;
};

constexpr Architecture kArchitectures[] = {
    {"qwen2", true, false},
    {"qwen3", false, true},
};

const Architecture& find_architecture(const GgufFile& file) {
    const std::string name = file.get_string("general.architecture");
    for (const Architecture& a : kArchitectures) {
        if (name == a.name) return a;
    }
    file.fail("key 'general.architecture'", "'" + name + "' is not supported", "use a qwen2 or qwen3 model");
}

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

ModelConfig read_config(const GgufFile& file) {
    const Architecture& architecture = find_architecture(file);
    const ConfigReader in(file, architecture.name);
    constexpr int64_t kLimit = 1 << 24;
    ModelConfig c{};
    c.architecture = architecture.name;
    c.attention_bias = architecture.attention_bias;
    c.qk_norm = architecture.qk_norm;
    c.n_layers = in.size("block_count", 4096);
    c.hidden = in.size("embedding_length", kLimit);
    c.intermediate = in.size("feed_forward_length", kLimit);
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
    c.rms_eps = in.positive("attention.layer_norm_rms_epsilon");
    c.context = in.size("context_length", int64_t{1} << 31);
    c.rope = read_rope(in, c.head_dim, c.context);
    if (in.has("attention.sliding_window")) {
        const int64_t window = file.get_int(c.architecture + ".attention.sliding_window");
        if (window > 0 && window < c.context) c.context = window;
    }
    return c;
}

class WeightLoader {
public:
    WeightLoader(const GgufFile& file, const Kernels& kernels) : file_(file), kernels_(kernels) {}

    bool has(const std::string& name) const { return file_.find_tensor(name) != nullptr; }

    Matrix matrix(const std::string& name, int64_t rows, int64_t cols) {
        const GgufTensor& tensor = find(name, {rows, cols});
        const TypeInfo* info = type_info(tensor.type);
        Matrix m;
        m.data = tensor.data;
        m.type = tensor.type;
        m.rows = tensor.shape[0];
        m.cols = cols;
        m.row_bytes = static_cast<size_t>(cols / info->block) * info->bytes;
        return m;
    }

    std::vector<float> vector(const std::string& name, int64_t n) {
        const GgufTensor& tensor = find(name, {n});
        std::vector<float> values(static_cast<size_t>(n));
        kernels_.types[tensor.type].dequantize(tensor.data, n, values.data());
        for (float v : values) {
            if (!std::isfinite(v)) fail(name, "holds a value that is not finite");
        }
        return values;
    }

    void check_all_used() const {
        for (const GgufTensor& tensor : file_.tensors()) {
            if (!used_.count(tensor.name)) fail(tensor.name, "has no place in this architecture");
        }
    }

private:
    [[noreturn]] void fail(const std::string& name, const std::string& problem) const {
        file_.fail("tensor '" + name + "'", problem, "export the file again from a complete, supported checkpoint");
    }

    // A negative dimension stands for "whatever the file says".
    const GgufTensor& find(const std::string& name, const std::vector<int64_t>& shape) {
        const GgufTensor* tensor = file_.find_tensor(name);
        if (!tensor) fail(name, "missing");
        bool equal = tensor->shape.size() == shape.size();
        for (size_t i = 0; equal && i < shape.size(); ++i) equal = shape[i] < 0 || tensor->shape[i] == shape[i];
        if (!equal) fail(name, "has shape " + text(tensor->shape) + ", the configuration asks for " + text(shape));
        if (!kernels_.types[tensor->type].matmul) {
            fail(name, std::string("type ") + type_info(tensor->type)->name + " is not supported");
        }
        used_.insert(name);
        return *tensor;
    }

    static std::string text(const std::vector<int64_t>& shape) {
        std::string out = "[";
        for (size_t i = 0; i < shape.size(); ++i) {
            out += (i ? ", " : "") + (shape[i] < 0 ? std::string("*") : std::to_string(shape[i]));
        }
        return out + "]";
    }

    const GgufFile& file_;
    const Kernels& kernels_;
    std::unordered_set<std::string> used_;
};

Layer load_layer(WeightLoader& load, const ModelConfig& c, int64_t index) {
    const std::string prefix = "blk." + std::to_string(index) + ".";
    const int64_t q_dim = c.n_heads * c.head_dim, kv_dim = c.n_kv_heads * c.head_dim;
    Layer layer;
    layer.attn_norm = load.vector(prefix + "attn_norm.weight", c.hidden);
    layer.q = load.matrix(prefix + "attn_q.weight", q_dim, c.hidden);
    layer.k = load.matrix(prefix + "attn_k.weight", kv_dim, c.hidden);
    layer.v = load.matrix(prefix + "attn_v.weight", kv_dim, c.hidden);
    layer.o = load.matrix(prefix + "attn_output.weight", c.hidden, q_dim);
    if (c.attention_bias) {
        layer.q_bias = load.vector(prefix + "attn_q.bias", q_dim);
        layer.k_bias = load.vector(prefix + "attn_k.bias", kv_dim);
        layer.v_bias = load.vector(prefix + "attn_v.bias", kv_dim);
    }
    if (c.qk_norm) {
        layer.q_norm = load.vector(prefix + "attn_q_norm.weight", c.head_dim);
        layer.k_norm = load.vector(prefix + "attn_k_norm.weight", c.head_dim);
    }
    layer.ffn_norm = load.vector(prefix + "ffn_norm.weight", c.hidden);
    layer.gate = load.matrix(prefix + "ffn_gate.weight", c.intermediate, c.hidden);
    layer.up = load.matrix(prefix + "ffn_up.weight", c.intermediate, c.hidden);
    layer.down = load.matrix(prefix + "ffn_down.weight", c.hidden, c.intermediate);
    return layer;
}

}  // namespace

Model load_model(const GgufFile& file, const Kernels& kernels) {
    Model model;
    model.config = read_config(file);
    ModelConfig& c = model.config;
    WeightLoader load(file, kernels);
    model.embedding = load.matrix("token_embd.weight", -1, c.hidden);
    c.n_vocab = model.embedding.rows;
    model.head = load.has("output.weight") ? load.matrix("output.weight", c.n_vocab, c.hidden) : model.embedding;
    model.output_norm = load.vector("output_norm.weight", c.hidden);
    for (int64_t i = 0; i < c.n_layers; ++i) model.layers.push_back(load_layer(load, c, i));
    load.check_all_used();
    return model;
}

}  // namespace qq
