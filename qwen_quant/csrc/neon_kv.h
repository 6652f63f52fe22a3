// NEON: what attention over one block of a quantized cache does in lanes (lane_kv.h).
#pragma once

#include "kv_block.h"
#include "neon_lanes.h"

namespace qq {

namespace {

inline LaneInts zero_sums() { return vdupq_n_s32(0); }
inline LaneInts add_products(LaneInts sum, LaneInts a, LaneInts b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
    return vaddq_s32(sum, vpaddq_s32(low, high));
}
inline LaneInts widened(const uint8_t* p) {
    return vreinterpretq_s32_s16(vmovl_s8(vreinterpret_s8_u8(vld1_u8(p))));
}
template <int Shift>
inline LaneInts nibbles_at(LaneInts words) {
    const uint16x8_t shifted = vshlq_u16(vreinterpretq_u16_s32(words), vdupq_n_s16(-Shift));
    return vreinterpretq_s32_u16(vandq_u16(shifted, vdupq_n_u16(15)));
}
inline LaneInts add_byte_products(LaneInts sum, LaneInts codes, LaneInts x) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(x));
}
inline LaneInts whole_sums(LaneInts sum) { return sum; }
inline LaneFloats lane_scales(const uint8_t* p) {
    const uint16x8_t bytes = vmovl_u8(vreinterpret_u8_s32(vdup_n_s32(load_i32(p))));
    const uint32x4_t bits = vaddw_u16(vdupq_n_u32(kScaleLowest), vget_low_u16(bytes));
    return vreinterpretq_f32_u32(vshlq_n_u32(bits, kScaleShift));
}
inline LaneFloats subtract(LaneFloats a, LaneFloats b) { return vsubq_f32(a, b); }
inline LaneInts rounded(LaneFloats x) { return vcvtnq_s32_f32(x); }
inline LaneInts add_ints(LaneInts a, LaneInts b) { return vaddq_s32(a, b); }
inline LaneInts larger_bits(LaneInts a, LaneFloats b) { return vmaxq_s32(a, vreinterpretq_s32_f32(b)); }
// In all lanes
inline LaneFloats largest_lane(LaneInts x) { return vreinterpretq_f32_s32(vdupq_n_s32(vmaxvq_s32(x))); }
inline float first_lane(LaneFloats x) { return vgetq_lane_f32(x, 0); }
// 32767 / x, zero where that is too large
inline LaneFloats to_shorts(LaneFloats x) {
    const uint32x4_t tiny = vcleq_f32(x, vdupq_n_f32(1e-30f));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(vdivq_f32(vdupq_n_f32(32767.0f), x)), tiny));
}
inline void store_shorts(int16_t* p, LaneInts a, LaneInts b) { vst1q_s16(p, vcombine_s16(vqmovn_s32(a), vqmovn_s32(b))); }
inline float total_of(LaneFloats x) { return vaddvq_f32(x); }

}  // namespace

}  // namespace qq
