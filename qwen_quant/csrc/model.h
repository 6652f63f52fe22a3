// A Qwen model as it lies in a GGUF file: its configuration, and weights that point into the mapping.
#pragma once

#include <string>
#include <vector>

#include "gguf.h"
#include "kernels.h"
#include "rope.h"

namespace qq {

struct ModelConfig {
    std::string architecture;
    int64_t n_layers, hidden, intermediate, n_heads, n_kv_heads, head_dim, n_vocab;
    int64_t context;  // tokens that the model attends over exactly: context_length, or a smaller sliding window
    RopeConfig rope;
    float rms_eps;
    bool attention_bias;  // q, k and v have biases (Qwen2)
    bool qk_norm;         // RMSNorm per head on q and k before RoPE (Qwen3)
};

// W [rows, cols], row after row, or packed (packed.h)
struct Matrix {
    const uint8_t* data = nullptr;
    uint32_t type = kF32;
    int64_t rows = 0, cols = 0;
    size_t row_bytes = 0;
    bool packed = false;
};

struct Layer {
    std::vector<float> attn_norm, ffn_norm;
    std::vector<float> q_norm, k_norm;           // [head_dim], empty without QK-norm
    std::vector<float> q_bias, k_bias, v_bias;   // empty without bias
    Matrix q, k, v, o, gate, up, down;
};

struct Model {
    ModelConfig config;
    Matrix embedding, head;
    std::vector<float> output_norm;
    std::vector<Layer> layers;
};

// Throws FormatError for anything that would not run exactly: an unknown architecture or RoPE scaling, a tensor that
// is missing, has another shape, a type without kernels, or no place in the architecture.
Model load_model(const GgufFile& file, const Kernels& kernels);

}  // namespace qq
