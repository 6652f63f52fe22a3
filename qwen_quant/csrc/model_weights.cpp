// The weights of a model: every tensor found, its shape and type checked, none left over.
#include <cmath>
#include <numeric>
#include <unordered_set>

#include "model.h"

namespace qq {

namespace {

class WeightLoader {
public:
    WeightLoader(const GgufFile& file, const Kernels& kernels) : file_(file), kernels_(kernels) {}

    bool has(const std::string& name) const { return file_.find_tensor(name) != nullptr; }

    Matrix matrix(const std::string& name, int64_t rows, int64_t cols) {
        const GgufTensor& tensor = find(name, {rows, cols});
        return rows_of(tensor, 0, tensor.shape[0], cols);
    }

    // Matrices that follow one another in one tensor [sum of rows, cols].
    std::vector<Matrix> fused(const std::string& name, const std::vector<int64_t>& rows, int64_t cols) {
        const GgufTensor& tensor = find(name, {std::accumulate(rows.begin(), rows.end(), int64_t{0}), cols});
        std::vector<Matrix> parts;
        int64_t first = 0;
        for (const int64_t n : rows) {
            parts.push_back(rows_of(tensor, first, n, cols));
            first += n;
        }
        return parts;
    }

    // A tensor [count, rows, cols] as its matrices.
    std::vector<Matrix> stacked(const std::string& name, int64_t count, int64_t rows, int64_t cols) {
        const GgufTensor& tensor = find(name, {count, rows, cols});
        std::vector<Matrix> parts;
        for (int64_t i = 0; i < count; ++i) parts.push_back(rows_of(tensor, i * rows, rows, cols));
        return parts;
    }

    // A tensor [cols] as a matrix of one row.
    Matrix row(const std::string& name, int64_t cols) { return rows_of(find(name, {cols}), 0, 1, cols); }

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

    static Matrix rows_of(const GgufTensor& tensor, int64_t first, int64_t rows, int64_t cols) {
        const TypeInfo* info = type_info(tensor.type);
        Matrix m;
        m.row_bytes = static_cast<size_t>(cols / info->block) * info->bytes;
        m.data = tensor.data + static_cast<size_t>(first) * m.row_bytes;
        m.type = tensor.type;
        m.rows = rows;
        m.cols = cols;
        return m;
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

void load_qkv(WeightLoader& load, const ModelConfig& c, const std::string& prefix, Layer& layer) {
    const int64_t q_dim = c.n_heads * c.head_dim, kv_dim = c.n_kv_heads * c.head_dim;
    if (c.fused_qkv) {
        const std::vector<Matrix> parts = load.fused(prefix + "attn_qkv.weight", {q_dim, kv_dim, kv_dim}, c.hidden);
        layer.q = parts[0];
        layer.k = parts[1];
        layer.v = parts[2];
        const std::vector<float> bias = load.vector(prefix + "attn_qkv.bias", q_dim + 2 * kv_dim);
        layer.q_bias.assign(bias.begin(), bias.begin() + q_dim);
        layer.k_bias.assign(bias.begin() + q_dim, bias.end() - kv_dim);
        layer.v_bias.assign(bias.end() - kv_dim, bias.end());
        return;
    }
    layer.q = load.matrix(prefix + "attn_q.weight", q_dim, c.hidden);
    layer.k = load.matrix(prefix + "attn_k.weight", kv_dim, c.hidden);
    layer.v = load.matrix(prefix + "attn_v.weight", kv_dim, c.hidden);
    if (c.attention_bias) {
        layer.q_bias = load.vector(prefix + "attn_q.bias", q_dim);
        layer.k_bias = load.vector(prefix + "attn_k.bias", kv_dim);
        layer.v_bias = load.vector(prefix + "attn_v.bias", kv_dim);
    }
}

// `suffix`: "" of a dense layer, "_shexp" of the shared expert.
Mlp load_mlp(WeightLoader& load, const ModelConfig& c, const std::string& prefix, const std::string& suffix,
             int64_t intermediate) {
    return {load.matrix(prefix + "ffn_gate" + suffix + ".weight", intermediate, c.hidden),
            load.matrix(prefix + "ffn_up" + suffix + ".weight", intermediate, c.hidden),
            load.matrix(prefix + "ffn_down" + suffix + ".weight", c.hidden, intermediate)};
}

void load_experts(WeightLoader& load, const ModelConfig& c, const std::string& prefix, Layer& layer) {
    const ExpertConfig& e = c.experts;
    layer.router = load.matrix(prefix + "ffn_gate_inp.weight", e.count, c.hidden);
    const std::vector<Matrix> gate = load.stacked(prefix + "ffn_gate_exps.weight", e.count, e.intermediate, c.hidden);
    const std::vector<Matrix> up = load.stacked(prefix + "ffn_up_exps.weight", e.count, e.intermediate, c.hidden);
    const std::vector<Matrix> down = load.stacked(prefix + "ffn_down_exps.weight", e.count, c.hidden, e.intermediate);
    for (size_t i = 0; i < gate.size(); ++i) layer.experts.push_back({gate[i], up[i], down[i]});
    if (e.shared_intermediate == 0) return;
    layer.shared_gate = load.row(prefix + "ffn_gate_inp_shexp.weight", c.hidden);
    layer.shared_expert = load_mlp(load, c, prefix, "_shexp", e.shared_intermediate);
}

Layer load_layer(WeightLoader& load, const ModelConfig& c, int64_t index) {
    const std::string prefix = "blk." + std::to_string(index) + ".";
    Layer layer;
    layer.attn_norm = load.vector(prefix + "attn_norm.weight", c.hidden);
    load_qkv(load, c, prefix, layer);
    layer.o = load.matrix(prefix + "attn_output.weight", c.hidden, c.n_heads * c.head_dim);
    if (c.qk_norm) {
        layer.q_norm = load.vector(prefix + "attn_q_norm.weight", c.head_dim);
        layer.k_norm = load.vector(prefix + "attn_k_norm.weight", c.head_dim);
    }
    layer.ffn_norm = load.vector(prefix + "ffn_norm.weight", c.hidden);
    if (c.experts.count > 0) {
        load_experts(load, c, prefix, layer);
    } else {
        layer.mlp = load_mlp(load, c, prefix, "", c.intermediate);
    }
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
    model.head = c.own_head || load.has("output.weight") ? load.matrix("output.weight", c.n_vocab, c.hidden) : model.embedding;
    model.output_norm = load.vector("output_norm.weight", c.hidden);
    for (int64_t i = 0; i < c.n_layers; ++i) model.layers.push_back(load_layer(load, c, i));
    load.check_all_used();
    return model;
}

}  // namespace qq
