// What lies in the cache of keys and values, layer by layer: see qwen_quant/grids/kv_layout.py for the arithmetic.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf.h"
#include "kv_block.h"
#include "model.h"
#include "threads.h"

namespace qq {

// The keys, or the values, of one layer.
struct KvHalf {
    KvType type = KvType::kF16;
    bool hadamard = false;
    std::vector<float> centre;   // [n_kv_heads, head_dim], empty: none; of keys before RoPE
    std::vector<float> balance;  // [n_kv_heads, head_dim], empty: ones
    std::vector<float> inverse_balance;
    std::vector<std::vector<int32_t>> pairs;  // of keys, for each head: channels i whose pair (i, i + half) has a centre

    bool quantized() const { return type != KvType::kF16; }
};

struct KvLayer {
    KvHalf key, value;

    bool quantized() const { return key.quantized() || value.quantized(); }
};

// The layout for cache types f16, int8, int4 or auto of keys and of values. A file's calibrated layout is used wherever
// it has one, and auto asks for its bits too; without it centres and balances come from the weights (`team` shares the
// layers), and int4 is rotated. Throws RunError for types that are unknown or that the model's heads do not fit, FormatError for a broken layout.
std::vector<KvLayer> choose_kv_layout(const GgufFile& file, const Model& model, const Kernels& kernels, ThreadTeam& team,
                                      const std::string& key_type, const std::string& value_type);

}  // namespace qq
