// x86: the widest vectors of floats that the instruction set has, and in their lanes the products of codes with int8
// activations, each lane with its own row of packed weights.
#pragma once

#include "lanes.h"
#include "x86_blocks.h"

namespace qq {

namespace {

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

#ifdef __AVX512VNNI__

constexpr int64_t kLanes = 16;
// 12 sums of integers, 12 of floats, and what feeds them
constexpr int kGroups = 2, kPackedTokens = 6, kGroupsAlone = 2;
using LaneFloats = __m512;
using LaneInts = __m512i;

inline LaneFloats lanes_of(float x) { return _mm512_set1_ps(x); }
inline LaneFloats load_lane_halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline LaneFloats load_lanes_of(LoadF32, const uint8_t* p) { return _mm512_loadu_ps(p); }
inline LaneFloats load_lanes_of(LoadF16, const uint8_t* p) { return load_lane_halves(p); }
inline LaneFloats load_lanes_of(LoadBF16, const uint8_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline LaneFloats to_floats(LaneInts x) { return _mm512_cvtepi32_ps(x); }
inline LaneFloats multiply(LaneFloats a, LaneFloats b) { return _mm512_mul_ps(a, b); }
inline LaneFloats multiply_add(LaneFloats a, LaneFloats b, LaneFloats c) { return _mm512_fmadd_ps(a, b, c); }
inline LaneFloats load_lanes(const float* p) { return _mm512_loadu_ps(p); }
inline __m256 eight_lanes(LaneFloats x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
inline void store_lanes(float* p, LaneFloats x) { _mm512_storeu_ps(p, x); }
inline LaneInts load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline LaneInts four_of_x(const uint8_t* p) { return _mm512_set1_epi32(load_i32(p)); }
inline LaneInts lane_bytes(const uint8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int N>
inline LaneInts shift(LaneInts x) {
    return N >= 0 ? _mm512_slli_epi32(x, N >= 0 ? N : 0) : _mm512_srli_epi32(x, N < 0 ? -N : 0);
}
inline LaneInts shift_right(LaneInts x, int n) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(n)); }
inline LaneInts mask_bytes(LaneInts x, int mask) {
    return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>(mask)));
}
inline LaneInts either(LaneInts a, LaneInts b) { return _mm512_or_si512(a, b); }

// The instruction wants one side unsigned: signed codes are kept with 128 added, which a start takes off again.
constexpr bool kSignedCodesFlipped = true, kSumsInShorts = false;
inline LaneInts iq4_levels(LaneInts codes) {
    const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kIq4Levels));
    const __m128i flipped = _mm_xor_si128(levels, _mm_set1_epi8(-128));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(flipped), codes);
}

// What the sum of a group's products is multiplied with.
using LaneScales = LaneFloats;
inline LaneScales lane_scales(LaneInts x) { return to_floats(x); }

// start + products of unsigned codes with x, four per lane at a time, and the sum over groups of scale times that
template <int Largest>
struct UnsignedSum {
    static constexpr int kFit = kBlock / 4;  // additions between two folds
    using InPanel = UnsignedSum;
    using InPanelOfHalves = UnsignedSum;
    static constexpr int kParts = 1;
    static void split(LaneInts codes, LaneInts (&parts)[1]) { parts[0] = codes; }
    static LaneInts load(const uint8_t* x, const Q8Row&, int64_t i) { return four_of_x(x + i); }
    LaneInts dot;
    LaneFloats sum;
    QQ_INLINE void restart(int32_t start) { dot = _mm512_set1_epi32(start); }
    QQ_INLINE void begin(int32_t start) {
        restart(start);
        sum = lanes_of(0.0f);
    }
    QQ_INLINE void add(LaneInts codes, LaneInts x) { dot = _mm512_dpbusd_epi32(dot, codes, x); }
    QQ_INLINE void add(const LaneInts (&parts)[1], LaneInts x) { add(parts[0], x); }
    QQ_INLINE void fold(NoScale) { sum = to_floats(dot); }
    QQ_INLINE void fold(LaneScales scale) {
        sum = multiply_add(to_floats(dot), scale, sum);
        dot = _mm512_setzero_si512();
    }
    QQ_INLINE LaneFloats total() const { return sum; }
};
using SignedSum = UnsignedSum<255>;

#else

constexpr int64_t kLanes = 8;
// 8 sums of integers and what feeds them; the floats wait in memory.
constexpr int kGroups = 2, kPackedTokens = 4, kGroupsAlone = 1;
using LaneFloats = __m256;
using LaneInts = __m256i;

inline LaneFloats lanes_of(float x) { return _mm256_set1_ps(x); }
inline LaneFloats load_lane_halves(const uint8_t* p) { return load_half8(p); }
template <class W>
inline LaneFloats load_lanes_of(W, const uint8_t* p) { return W::load8(p); }
inline LaneFloats to_floats(LaneInts x) { return _mm256_cvtepi32_ps(x); }
inline LaneFloats multiply(LaneFloats a, LaneFloats b) { return _mm256_mul_ps(a, b); }
inline LaneFloats multiply_add(LaneFloats a, LaneFloats b, LaneFloats c) { return _mm256_fmadd_ps(a, b, c); }
inline LaneFloats load_lanes(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 eight_lanes(LaneFloats x) { return x; }
inline void store_lanes(float* p, LaneFloats x) { _mm256_storeu_ps(p, x); }
inline LaneInts load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline LaneInts four_of_x(const uint8_t* p) { return _mm256_set1_epi32(load_i32(p)); }
inline LaneInts lane_bytes(const uint8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
template <int N>
inline LaneInts shift(LaneInts x) {
    return N >= 0 ? _mm256_slli_epi32(x, N >= 0 ? N : 0) : _mm256_srli_epi32(x, N < 0 ? -N : 0);
}
inline LaneInts shift_right(LaneInts x, int n) { return _mm256_srl_epi32(x, _mm_cvtsi32_si128(n)); }
inline LaneInts mask_bytes(LaneInts x, int mask) {
    return _mm256_and_si256(x, _mm256_set1_epi8(static_cast<char>(mask)));
}
inline LaneInts either(LaneInts a, LaneInts b) { return _mm256_or_si256(a, b); }

constexpr bool kSignedCodesFlipped = false, kSumsInShorts = true;
inline LaneInts iq4_levels(LaneInts codes) {
    const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kIq4Levels));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), codes);
}

// What sums of two products are multiplied with while they are added up: each lane's scale twice, in 16 bits.
using LaneScales = LaneInts;
inline LaneScales lane_scales(LaneInts x) {
    const __m128i twice = _mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13);
    return _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(twice));
}
inline LaneInts add_pairs(LaneInts x, LaneScales scale) { return _mm256_madd_epi16(x, scale); }
inline LaneInts add_pairs(LaneInts x, NoScale) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }

// Sums of integers stay in their registers: compilers may add in any order, and would keep all products for later.
inline LaneInts in_this_order(LaneInts sum) {
    asm("" : "+x"(sum));
    return sum;
}
inline LaneInts add_shorts(LaneInts a, LaneInts b) { return in_this_order(_mm256_add_epi16(a, b)); }

// start + the sum over groups of scale times the products of codes with x. Sums of two products wait in 16 bits until
// they are folded into `sum`.
struct LaneSum {
    LaneInts pairs, sum;
    // Offset times the scales of two groups of 16, side by side as the sums of their x are
    template <int Offset>
    static LaneInts scaled_offset(LaneInts first, LaneInts second) {
        const LaneInts both = _mm256_blend_epi16(first, _mm256_slli_epi32(second, 16), 0xaa);
        return _mm256_mullo_epi16(both, _mm256_set1_epi16(Offset));
    }
    QQ_INLINE void begin(int32_t start) {
        pairs = _mm256_setzero_si256();
        sum = _mm256_set1_epi32(start);
    }
    QQ_INLINE void begin(LaneInts offset, LaneInts minus_halves) {
        pairs = _mm256_setzero_si256();
        sum = in_this_order(_mm256_madd_epi16(offset, minus_halves));
    }
    template <class Scale>
    QQ_INLINE void fold(Scale scale) {
        sum = in_this_order(_mm256_add_epi32(sum, add_pairs(pairs, scale)));
        pairs = _mm256_setzero_si256();
    }
    QQ_INLINE LaneFloats total() const { return to_floats(sum); }
};

// The same in a panel, where each group has 16 codes: two words are folded at once, so that only one sum for each token
// and group of rows stays in a register.
template <int Largest>
struct TwoWordSum {
    static_assert(2 * 2 * 127 * Largest <= 32767, "two words have to fit into 16 bits");
    static constexpr int kParts = 1;
    LaneInts sum;
    static void split(LaneInts codes, LaneInts (&parts)[1]) { parts[0] = codes; }
    QQ_INLINE void begin() { sum = _mm256_setzero_si256(); }
    QQ_INLINE void begin(LaneInts offset, LaneInts minus_halves) {
        sum = in_this_order(_mm256_madd_epi16(offset, minus_halves));
    }
    QQ_INLINE void add(LaneInts codes0, LaneInts x0, LaneInts codes1, LaneInts x1, LaneScales scale) {
        const LaneInts pairs = _mm256_add_epi16(_mm256_maddubs_epi16(codes0, x0), _mm256_maddubs_epi16(codes1, x1));
        sum = in_this_order(_mm256_add_epi32(sum, add_pairs(pairs, scale)));
    }
    QQ_INLINE LaneFloats total() const { return to_floats(sum); }
};
template <int Largest>
constexpr bool kTwoWords<TwoWordSum<Largest>> = true;

// Codes from 0 to Largest; |x| <= 127
template <int Largest>
struct UnsignedSum : LaneSum {
    static constexpr int kFit = 32767 / (2 * 127 * Largest);
    using InPanel = UnsignedSum;
    using InPanelOfHalves = TwoWordSum<Largest>;
    static constexpr int kParts = 1;
    static void split(LaneInts codes, LaneInts (&parts)[1]) { parts[0] = codes; }
    static LaneInts load(const uint8_t* x, const Q8Row&, int64_t i) { return four_of_x(x + i); }
    QQ_INLINE void add(LaneInts codes, LaneInts x) { pairs = add_shorts(pairs, _mm256_maddubs_epi16(codes, x)); }
    QQ_INLINE void add(const LaneInts (&parts)[1], LaneInts x) { add(parts[0], x); }
};

// Signed codes for several tokens, with activations of 16 bits: two products at a time, but their sums always fit.
struct WideSum {
    static constexpr int kFit = kBlock / 4, kParts = 2;
    struct Four {
        LaneInts low, high;
    };
    LaneInts sum;
    static void split(LaneInts codes, LaneInts (&parts)[2]) {
        const __m128i low = _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13);
        const __m128i high = _mm_add_epi8(low, _mm_set1_epi16(2 << 8));
        parts[0] = _mm256_srai_epi16(_mm256_shuffle_epi8(codes, _mm256_broadcastsi128_si256(low)), 8);
        parts[1] = _mm256_srai_epi16(_mm256_shuffle_epi8(codes, _mm256_broadcastsi128_si256(high)), 8);
    }
    static Four load(const uint8_t* x, const Q8Row& at, int64_t i) {
        return {four_of_x(x + at.wide + 2 * i), four_of_x(x + at.wide + 2 * i + 4)};
    }
    QQ_INLINE void begin(int32_t) { sum = _mm256_setzero_si256(); }
    QQ_INLINE void add(const LaneInts (&parts)[2], const Four& x) {
        sum = in_this_order(_mm256_add_epi32(sum, _mm256_madd_epi16(parts[0], x.low)));
        sum = in_this_order(_mm256_add_epi32(sum, _mm256_madd_epi16(parts[1], x.high)));
    }
    QQ_INLINE void fold(NoScale) {}
    QQ_INLINE void fold(LaneScales scale) { sum = _mm256_mullo_epi32(sum, _mm256_srai_epi32(scale, 16)); }  // of all 32
    QQ_INLINE LaneFloats total() const { return to_floats(sum); }
};

// Signed codes: |w| * (x with the sign of w); two products reach 2 * 128 * 127 < 2^15, more do not fit.
struct SignedSum : LaneSum {
    static constexpr int kFit = 1;
    using InPanel = WideSum;
    using InPanelOfHalves = WideSum;
    QQ_INLINE void add(LaneInts codes, LaneInts x) {
        pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
    }
};

#endif

}  // namespace

}  // namespace qq
