// x86: what attention over one block of a quantized cache does in lanes (lane_kv.h).
#pragma once

#include "x86_kv_round.h"
#include "x86_lanes.h"
// After x86_kv_round.h:
#include "kv_store.h"

namespace qq {

namespace {

#ifdef __AVX512VNNI__
inline LaneInts zero_sums() { return _mm512_setzero_si512(); }
inline LaneInts add_products(LaneInts sum, LaneInts a, LaneInts b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline LaneInts widened(const uint8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <int Shift>
inline LaneInts nibbles_at(LaneInts words) {
    return _mm512_and_si512(_mm512_srli_epi16(words, Shift), _mm512_set1_epi16(15));
}
// Sums of products of bytes, four to a lane, that are added up where the products are
inline LaneInts add_byte_products(LaneInts sum, LaneInts codes, LaneInts x) {
    return _mm512_dpbusd_epi32(sum, codes, x);
}
inline LaneInts whole_sums(LaneInts sum) { return sum; }
inline LaneFloats lane_scales(const uint8_t* p) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(bytes, _mm512_set1_epi32(kScaleLowest)), kScaleShift));
}
inline LaneFloats subtract(LaneFloats a, LaneFloats b) { return _mm512_sub_ps(a, b); }
inline LaneInts rounded(LaneFloats x) { return _mm512_cvtps_epi32(x); }
inline LaneInts add_ints(LaneInts a, LaneInts b) { return _mm512_add_epi32(a, b); }
inline LaneInts larger_bits(LaneInts a, LaneFloats b) { return _mm512_max_epi32(a, _mm512_castps_si512(b)); }
// In all lanes
inline LaneFloats largest_lane(LaneInts x) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(x)));
}
inline float first_lane(LaneFloats x) { return _mm512_cvtss_f32(x); }
// 32767 / x, zero where that is too large
inline LaneFloats to_shorts(LaneFloats x) {
    const __mmask16 usable = _mm512_cmp_ps_mask(x, lanes_of(1e-30f), _CMP_NLE_UQ);
    return _mm512_maskz_div_ps(usable, lanes_of(32767.0f), x);
}
inline void store_shorts(int16_t* p, LaneInts a, LaneInts b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(a));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kLanes), _mm512_cvtsepi32_epi16(b));
}
#else
inline LaneInts zero_sums() { return _mm256_setzero_si256(); }
inline LaneInts add_products(LaneInts sum, LaneInts a, LaneInts b) {
    return in_this_order(_mm256_add_epi32(sum, _mm256_madd_epi16(a, b)));
}
inline LaneInts widened(const uint8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int Shift>
inline LaneInts nibbles_at(LaneInts words) {
    return _mm256_and_si256(_mm256_srli_epi16(words, Shift), _mm256_set1_epi16(15));
}
// The same in halves of 16 bits: 8 sums of two products of codes up to 15 with x up to 127 fit, which are 32 channels.
inline LaneInts add_byte_products(LaneInts sum, LaneInts codes, LaneInts x) {
    return add_shorts(sum, _mm256_maddubs_epi16(codes, x));
}
inline LaneInts whole_sums(LaneInts sum) { return add_pairs(sum, NoScale()); }
inline LaneFloats lane_scales(const uint8_t* p) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(bytes, _mm256_set1_epi32(kScaleLowest)), kScaleShift));
}
inline LaneFloats subtract(LaneFloats a, LaneFloats b) { return _mm256_sub_ps(a, b); }
inline LaneInts rounded(LaneFloats x) { return _mm256_cvtps_epi32(x); }
inline LaneInts add_ints(LaneInts a, LaneInts b) { return _mm256_add_epi32(a, b); }
inline LaneInts larger_bits(LaneInts a, LaneFloats b) { return _mm256_max_epi32(a, _mm256_castps_si256(b)); }
inline LaneFloats largest_lane(LaneInts x) {
    x = _mm256_max_epi32(x, _mm256_permute2x128_si256(x, x, 1));
    x = _mm256_max_epi32(x, _mm256_shuffle_epi32(x, 0x4e));
    return _mm256_castsi256_ps(_mm256_max_epi32(x, _mm256_shuffle_epi32(x, 0xb1)));
}
inline float first_lane(LaneFloats x) { return _mm256_cvtss_f32(x); }
inline LaneFloats to_shorts(LaneFloats x) {
    const __m256 usable = _mm256_cmp_ps(x, lanes_of(1e-30f), _CMP_NLE_UQ);
    return _mm256_and_ps(usable, _mm256_div_ps(lanes_of(32767.0f), x));
}
inline void store_shorts(int16_t* p, LaneInts a, LaneInts b) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
#endif

inline float total_of(LaneFloats x) { return sum_lanes(eight_lanes(x)); }

}  // namespace

}  // namespace qq
