// NEON: exponentials, and SwiGLU.
#pragma once

#include <cstring>

#include "neon_lanes.h"

namespace qq {

namespace {

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

inline LaneFloats swiglu4(LaneFloats gate, LaneFloats up) {
    const LaneFloats denominator = vaddq_f32(vdupq_n_f32(1.0f), exp4(vnegq_f32(gate)));
    return vmulq_f32(vdivq_f32(gate, denominator), up);
}

void swiglu(float* gate, const float* up, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_lanes(gate + i, swiglu4(load_lanes(gate + i), load_lanes(up + i)));
    if (i == n) return;
    float rest[2][kLanes] = {};
    const size_t bytes = static_cast<size_t>(n - i) * sizeof(float);
    std::memcpy(rest[0], gate + i, bytes);
    std::memcpy(rest[1], up + i, bytes);
    store_lanes(rest[0], swiglu4(load_lanes(rest[0]), load_lanes(rest[1])));
    std::memcpy(gate + i, rest[0], bytes);
}

}  // namespace

}  // namespace qq
