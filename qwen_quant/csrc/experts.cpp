#include "experts.h"

#include <algorithm>
#include <cmath>

namespace qq {

void choose_experts(const float* logits, int64_t n_experts, int64_t n_used, bool normalize, int32_t* experts,
                    float* weights) {
    // `experts` is kept in order while all are looked at; a comparison with NaN is false, so each has a place.
    int64_t n = 0;
    for (int64_t e = 0; e < n_experts; ++e) {
        int64_t place = n;
        while (place > 0 && logits[e] > logits[experts[place - 1]]) --place;
        if (place == n_used) continue;
        if (n < n_used) ++n;
        for (int64_t i = n - 1; i > place; --i) experts[i] = experts[i - 1];
        experts[place] = static_cast<int32_t>(e);
    }
    const float largest = logits[experts[0]];
    float sum = 0;
    for (int64_t e = 0; e < n_experts; ++e) sum += std::exp(logits[e] - largest);
    float chosen = 0;
    for (int64_t i = 0; i < n_used; ++i) {
        weights[i] = std::exp(logits[experts[i]] - largest) / sum;
        chosen += weights[i];
    }
    for (int64_t i = 0; normalize && i < n_used; ++i) weights[i] /= chosen;
}

void ExpertOrder::reserve(int64_t n_experts, int64_t n_choices) {
    first.resize(static_cast<size_t>(n_experts) + 1);
    tokens.resize(static_cast<size_t>(n_choices));
    weights.resize(static_cast<size_t>(n_choices));
}

void ExpertOrder::sort(int64_t n_tokens, int64_t n_used, const int32_t* chosen, const float* chosen_weights) {
    const int64_t n = n_tokens * n_used;
    std::fill(first.begin(), first.end(), 0);
    for (int64_t i = 0; i < n; ++i) ++first[chosen[i] + 1];
    for (size_t e = 1; e < first.size(); ++e) first[e] += first[e - 1];
    for (int64_t i = 0; i < n; ++i) {
        const int64_t place = first[chosen[i]]++;
        tokens[place] = static_cast<int32_t>(i / n_used);
        weights[place] = chosen_weights[i];
    }
    // Every expert's beginning has moved to its end, which is where the next one begins.
    std::copy_backward(first.begin(), first.end() - 1, first.end());
    first[0] = 0;
}

}  // namespace qq
