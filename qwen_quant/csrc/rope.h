// Rotary position embeddings: the frequencies, with the context extension that the file asks for.
#pragma once

#include <cstdint>
#include <vector>

namespace qq {

enum class RopeScalingType { kNone, kLinear, kYarn };

struct RopeConfig {
    float theta;
    RopeScalingType scaling = RopeScalingType::kNone;
    double factor = 1;  // how many times the trained context
    double original_context = 0;  // YaRN: the trained context
    // YaRN: a frequency that turns more often than beta_fast within it stays, below beta_slow it is divided.
    double beta_fast = 32, beta_slow = 1;
    float magnitude = 1;  // multiplies cos and sin
};

// Radians per position [head_dim / 2], computed in transformers' order: last bits count at large positions.
// YaRN: Peng et al. 2023, arXiv:2309.00071.
std::vector<float> inverse_frequencies(const RopeConfig& rope, int64_t head_dim);

}  // namespace qq
