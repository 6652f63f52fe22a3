// Models with experts: which of them a token goes through, and which tokens go through each.
#pragma once

#include <cstdint>
#include <vector>

namespace qq {

// The `n_used` experts with the largest of a token's logits [n_experts], the largest first and of equals the one with
// the lower index, and their weights: the softmax over all experts, divided by their sum if `normalize`
// (Shazeer et al. 2017, arXiv:1701.06538, as Qwen-MoE and llama.cpp compute it). A NaN among the
// logits makes every weight NaN.
void choose_experts(const float* logits, int64_t n_experts, int64_t n_used, bool normalize, int32_t* experts,
                    float* weights);

// The choices of all tokens of a step, ordered by expert and then by token.
struct ExpertOrder {
    std::vector<int64_t> first;   // [n_experts + 1]: where an expert's tokens begin
    std::vector<int32_t> tokens;  // [n_tokens * n_used]
    std::vector<float> weights;   // of the expert in the token's output

    void reserve(int64_t n_experts, int64_t n_choices);
    // experts and weights [n_tokens, n_used]. Allocates nothing.
    void sort(int64_t n_tokens, int64_t n_used, const int32_t* chosen, const float* chosen_weights);
};

}  // namespace qq
