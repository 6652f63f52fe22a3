// NEON: what attention over one block of the cache needs beside lanes (lane_attention.h), and its softmax.
#pragma once

#include <cmath>

#include "neon_elementwise.h"

namespace qq {

namespace {

// sums[i] = the sum of all lanes of x[i]
template <int N>
QQ_INLINE void store_sums(const LaneFloats (&x)[N], float* sums) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sums[i] = vaddvq_f32(x[i]);
}

float softmax_block(float* scores, int64_t valid, int64_t n, float* running_max, float* running_sum) {
    int64_t i = 0;
    LaneFloats top = vdupq_n_f32(*running_max);
    for (; i + kLanes <= valid; i += kLanes) top = vmaxq_f32(top, load_lanes(scores + i));
    float largest = vmaxvq_f32(top);
    for (; i < valid; ++i) largest = scores[i] > largest ? scores[i] : largest;
    const LaneFloats shift = vdupq_n_f32(largest);
    LaneFloats sum = vdupq_n_f32(0.0f);
    for (i = 0; i + kLanes <= valid; i += kLanes) {
        const LaneFloats e = exp4(vsubq_f32(load_lanes(scores + i), shift));
        sum = vaddq_f32(sum, e);
        store_lanes(scores + i, e);
    }
    if (i < valid) {  // a part of a vector, and zeros
        float rest[kLanes] = {};
        std::memcpy(rest, scores + i, static_cast<size_t>(valid - i) * sizeof(float));
        store_lanes(rest, exp4(vsubq_f32(load_lanes(rest), shift)));
        for (int64_t j = valid - i; j < kLanes; ++j) rest[j] = 0.0f;
        sum = vaddq_f32(sum, load_lanes(rest));
        std::memcpy(scores + i, rest, static_cast<size_t>(valid - i) * sizeof(float));
    }
    for (i = valid; i < n; ++i) scores[i] = 0.0f;
    const float rescale = largest > *running_max ? std::exp(*running_max - largest) : 1.0f;
    *running_max = largest;
    *running_sum = *running_sum * rescale + vaddvq_f32(sum);
    return rescale;
}

}  // namespace

}  // namespace qq
