#include "rope.h"

#include <algorithm>
#include <cmath>

namespace qq {

namespace {

constexpr double kPi = 3.14159265358979323846;

// Index of the frequency that turns `turns` times within the trained context.
double frequency_index(const RopeConfig& rope, int64_t head_dim, double turns) {
    return static_cast<double>(head_dim) * std::log(rope.original_context / (turns * 2 * kPi)) /
           (2 * std::log(static_cast<double>(rope.theta)));
}

}  // namespace

std::vector<float> inverse_frequencies(const RopeConfig& rope, int64_t head_dim) {
    std::vector<float> frequencies(static_cast<size_t>(head_dim / 2));
    const float factor = static_cast<float>(rope.factor);
    double first = 0, width = 1;
    if (rope.scaling == RopeScalingType::kYarn) {
        first = std::max(0.0, std::floor(frequency_index(rope, head_dim, rope.beta_fast)));
        const double last = std::min(static_cast<double>(head_dim - 1),
                                     std::ceil(frequency_index(rope, head_dim, rope.beta_slow)));
        width = std::max(0.001, last - first);
    }
    for (size_t i = 0; i < frequencies.size(); ++i) {
        const float period = std::pow(rope.theta, static_cast<float>(2 * i) / static_cast<float>(head_dim));
        const float kept = 1.0f / period;
        if (rope.scaling == RopeScalingType::kNone) {
            frequencies[i] = kept;
        } else if (rope.scaling == RopeScalingType::kLinear) {
            frequencies[i] = kept / factor;
        } else {
            const float ramp = (static_cast<float>(i) - static_cast<float>(first)) / static_cast<float>(width);
            const float share = 1.0f - std::clamp(ramp, 0.0f, 1.0f);  // of the kept frequency
            frequencies[i] = 1.0f / (factor * period) * (1.0f - share) + kept * share;
        }
    }
    return frequencies;
}

}  // namespace qq
