// NEON: what attention over one block of the cache needs beside lanes (lane_attention.h), and its softmax.
#pragma once

#include <cmath>

#include "neon_lanes.h"

namespace qq {

namespace {

// sums[i] = the sum of all lanes of x[i]
template <int N>
QQ_INLINE void store_sums(const LaneFloats (&x)[N], float* sums) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sums[i] = vaddvq_f32(x[i]);
}

// exp(x) as x86_elementwise.h has it
inline LaneFloats exp4(LaneFloats x) {
    x = vminq_f32(vdupq_n_f32(88.0f), vmaxq_f32(vdupq_n_f32(-87.3f), x));  // both hand NaN on
    const LaneFloats n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(1.44269504f)));
    LaneFloats r = vfmsq_f32(x, n, vdupq_n_f32(0.693359375f));
    r = vfmsq_f32(r, n, vdupq_n_f32(-2.12194440e-4f));
    LaneFloats p = vdupq_n_f32(1.0f / 5040);
    constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (const float c : kTaylor) p = vfmaq_f32(vdupq_n_f32(c), p, r);
    const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(p, vreinterpretq_f32_s32(exponent));
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
