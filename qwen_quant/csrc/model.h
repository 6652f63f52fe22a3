// A Qwen model as it lies in a GGUF file: its configuration, and weights that point into the mapping.
#pragma once

#include <string>
#include <vector>

#include "gguf.h"
#include "kernels.h"
#include "rope.h"

namespace qq {

// Models with experts have them in every layer.
struct ExpertConfig {
    int64_t count = 0;  // 0: a dense model
    int64_t used = 0;   // of each token
    int64_t intermediate = 0;
    int64_t shared_intermediate = 0;  // of the expert that sees every token, 0 without one (Qwen2-MoE has one)
    bool normalize = false;           // the weights of a token's experts sum to 1 (Qwen3-MoE)
};

struct ModelConfig {
    std::string architecture;
    int64_t n_layers, hidden, n_heads, n_kv_heads, head_dim, n_vocab;
    int64_t intermediate;  // of a dense model's layers
    int64_t context;  // tokens that the model attends over exactly: context_length, or a smaller sliding window
    bool context_is_limit;  // beyond it the arithmetic changes (Qwen 1: dynamic NTK, LogN), which files do not describe
    RopeConfig rope;
    float rms_eps;
    bool attention_bias;  // q, k and v have biases
    bool fused_qkv;       // q, k and v are one tensor (Qwen 1)
    bool own_head;        // the head is never the embedding (Qwen 1)
    bool qk_norm;         // RMSNorm per head on q and k before RoPE (Qwen3)
    ExpertConfig experts;
};

// W [rows, cols], row after row, or packed (packed.h)
struct Matrix {
    const uint8_t* data = nullptr;
    uint32_t type = kF32;
    int64_t rows = 0, cols = 0;
    size_t row_bytes = 0;  // once packed, of a row's share of its group
    bool packed = false;
};

// down(silu(gate(x)) * up(x))
struct Mlp {
    Matrix gate, up, down;
};

struct Layer {
    std::vector<float> attn_norm, ffn_norm;
    std::vector<float> q_norm, k_norm;           // [head_dim], empty without QK-norm
    std::vector<float> q_bias, k_bias, v_bias;   // empty without bias
    Matrix q, k, v, o;
    Mlp mlp;                   // of a dense layer
    std::vector<Mlp> experts;  // of a sparse layer
    Mlp shared_expert;
    Matrix router;       // [experts, hidden]
    Matrix shared_gate;  // [1, hidden]: how much of the shared expert a token takes
};

struct Model {
    ModelConfig config;
    Matrix embedding, head;
    std::vector<float> output_norm;
    std::vector<Layer> layers;
};

// Both throw FormatError for anything that would not run exactly: an unknown architecture or RoPE scaling, a tensor that
// is missing, has another shape, a type without kernels, or no place in the architecture.
ModelConfig read_config(const GgufFile& file);  // n_vocab is left to the embedding's shape
Model load_model(const GgufFile& file, const Kernels& kernels);

}  // namespace qq
