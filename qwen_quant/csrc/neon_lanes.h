// NEON with the dot-product extension: four lanes, each with its own row of packed weights. With i8mm as well, panels
// multiply two rows with two tokens at a time.
#pragma once

#include <arm_neon.h>

#include "lanes.h"

namespace qq {

namespace {

constexpr int64_t kLanes = 4;
constexpr int kGroups = 2, kPackedTokens = 4, kGroupsAlone = 2;
using LaneFloats = float32x4_t;
using LaneInts = int32x4_t;

inline LaneFloats lanes_of(float x) { return vdupq_n_f32(x); }
inline LaneFloats load_lane_halves(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
inline LaneFloats to_floats(LaneInts x) { return vcvtq_f32_s32(x); }
inline LaneFloats multiply(LaneFloats a, LaneFloats b) { return vmulq_f32(a, b); }
inline LaneFloats multiply_add(LaneFloats a, LaneFloats b, LaneFloats c) { return vfmaq_f32(c, a, b); }
inline LaneFloats load_lanes(const float* p) { return vld1q_f32(p); }
inline void store_lanes(float* p, LaneFloats x) { vst1q_f32(p, x); }
inline LaneInts load_codes(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
inline LaneInts four_of_x(const uint8_t* p) { return vdupq_n_s32(load_i32(p)); }
inline LaneInts lane_bytes(const uint8_t* p) {
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(load_i32(p)));
    return vmovl_s16(vget_low_s16(vmovl_s8(bytes)));
}
// By a number that may be negative: to the right.
inline LaneInts shift_by(LaneInts x, int n) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x), vdupq_n_s32(n)));
}
template <int N>
inline LaneInts shift(LaneInts x) { return shift_by(x, N); }
inline LaneInts shift_right(LaneInts x, int n) { return shift_by(x, -n); }
inline LaneInts mask_bytes(LaneInts x, int mask) {
    return vandq_s32(x, vreinterpretq_s32_u8(vdupq_n_u8(static_cast<uint8_t>(mask))));
}
inline LaneInts either(LaneInts a, LaneInts b) { return vorrq_s32(a, b); }
inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

constexpr bool kSignedCodesFlipped = false, kSumsInShorts = false;
inline LaneInts iq4_levels(LaneInts codes) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(kIq4Levels), vreinterpretq_u8_s32(codes)));
}

using LaneScales = LaneInts;
inline LaneScales lane_scales(LaneInts x) { return x; }

#ifdef __ARM_FEATURE_MATMUL_INT8
// SignedSum of two tokens: an instruction multiplies 8 codes of two rows with 8 of two tokens, which takes two words of
// codes. The sums of integers are the same, so a token's product does not depend on how many there are.
struct MatrixSum {
    static constexpr int kFit = kBlock / 4, kParts = 1;
    LaneInts low, high;  // rows 0 and 1, rows 2 and 3: [row, token]
    LaneInts sum[2];
    static void split(LaneInts codes, LaneInts (&parts)[1]) { parts[0] = codes; }
    // From [row, 4 of k] twice to [2 rows, 8 of k] twice
    static void pair_words(LaneInts& a, LaneInts& b) {
        const LaneInts first = a;
        a = vzip1q_s32(first, b);
        b = vzip2q_s32(first, b);
    }
    static LaneInts load_pair(const uint8_t* x0, const uint8_t* x1) {
        return vreinterpretq_s32_u8(vcombine_u8(vld1_u8(x0), vld1_u8(x1)));
    }
    QQ_INLINE void restart(int32_t start0, int32_t start1) {
        const int32x2_t both = vset_lane_s32(start1, vdup_n_s32(start0), 1);
        low = high = vcombine_s32(both, both);
    }
    QQ_INLINE void begin(int32_t start0, int32_t start1) {
        restart(start0, start1);
        sum[0] = sum[1] = vdupq_n_s32(0);
    }
    QQ_INLINE void add(LaneInts first, LaneInts second, LaneInts x) {
        low = vmmlaq_s32(low, vreinterpretq_s8_s32(first), vreinterpretq_s8_s32(x));
        high = vmmlaq_s32(high, vreinterpretq_s8_s32(second), vreinterpretq_s8_s32(x));
    }
    QQ_INLINE void fold(NoScale) {
        sum[0] = vuzp1q_s32(low, high);
        sum[1] = vuzp2q_s32(low, high);
    }
    QQ_INLINE void fold(LaneScales scale) {
        sum[0] = vmlaq_s32(sum[0], vuzp1q_s32(low, high), scale);
        sum[1] = vmlaq_s32(sum[1], vuzp2q_s32(low, high), scale);
        low = high = vdupq_n_s32(0);
    }
    QQ_INLINE LaneFloats total(int token) const { return to_floats(sum[token]); }
};
template <>
constexpr bool kTwoTokens<MatrixSum> = true;
#endif

// The sum over groups of scale times the products of codes with x. All codes are below 128, so the instruction takes
// them as signed.
struct SignedSum {
    static constexpr int kFit = kBlock / 4;  // additions between two folds
#ifdef __ARM_FEATURE_MATMUL_INT8
    using InPanel = MatrixSum;
#else
    using InPanel = SignedSum;
#endif
    using InPanelOfHalves = InPanel;
    static constexpr int kParts = 1;
    static void split(LaneInts codes, LaneInts (&parts)[1]) { parts[0] = codes; }
    static LaneInts load(const uint8_t* x, const Q8Row&, int64_t i) { return four_of_x(x + i); }
    LaneInts dot, sum;
    QQ_INLINE void restart(int32_t start) { dot = vdupq_n_s32(start); }
    QQ_INLINE void begin(int32_t start) {
        restart(start);
        sum = vdupq_n_s32(0);
    }
    QQ_INLINE void add(LaneInts codes, LaneInts x) {
        dot = vdotq_s32(dot, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(x));
    }
    QQ_INLINE void add(const LaneInts (&parts)[1], LaneInts x) { add(parts[0], x); }
    QQ_INLINE void fold(NoScale) { sum = dot; }
    QQ_INLINE void fold(LaneScales scale) {
        sum = vmlaq_s32(sum, dot, scale);
        dot = vdupq_n_s32(0);
    }
    QQ_INLINE LaneFloats total() const { return to_floats(sum); }
};
template <int Largest>
using UnsignedSum = SignedSum;

}  // namespace

}  // namespace qq
