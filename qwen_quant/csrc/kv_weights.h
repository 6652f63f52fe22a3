// Centres and balances of a cache that nobody calibrated, from the weights: see qwen_quant/quantize/kv_weights.py for the
// arithmetic.
#pragma once

#include <vector>

#include "kernels.h"
#include "model.h"

namespace qq {

struct KvBasis {
    std::vector<float> key_centre, key_balance, value_centre, value_balance;  // [n_kv_heads, head_dim], centres may be empty
};

KvBasis basis_of_weights(const Layer& layer, const ModelConfig& config, const Kernels& kernels);

}  // namespace qq
