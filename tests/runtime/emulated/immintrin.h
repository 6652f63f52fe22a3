// SIMDe in place of the compiler's intrinsics, and plain models of those that its releases lack: so AVX-512 kernels run on
// any CPU (test_avx512.py).
#pragma once

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/avx512/dpbf16.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstring>

#include "half.h"

namespace model {

// result[i] = convert(x[i]) for the N numbers that a vector of To holds
template <class To, class ToItem, class FromItem, int N, class From, class Convert>
To each(const From& from, Convert convert) {
    FromItem x[N];
    ToItem y[N];
    static_assert(sizeof(x) == sizeof(From) && sizeof(y) == sizeof(To), "whole vectors");
    std::memcpy(x, &from, sizeof x);
    for (int i = 0; i < N; ++i) y[i] = convert(x[i]);
    To to;
    std::memcpy(&to, y, sizeof to);
    return to;
}

template <class FromItem, class From>
simde__m512i widened(const From& from) {
    return each<simde__m512i, int32_t, FromItem, 16>(from, [](FromItem x) { return static_cast<int32_t>(x); });
}

}  // namespace model

#define __mmask16 simde__mmask16
#define __m512bh simde__m512bh
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC

static inline float _cvtsh_ss(uint16_t x) { return qq::half_to_float(x); }
static inline float _mm512_cvtss_f32(simde__m512 x) {
    float first;
    std::memcpy(&first, &x, sizeof first);
    return first;
}
static inline simde__m512 _mm512_cvtph_ps(simde__m256i x) {
    return model::each<simde__m512, float, uint16_t, 16>(x, [](uint16_t h) { return qq::half_to_float(h); });
}
static inline simde__m512i _mm512_cvtepu16_epi32(simde__m256i x) { return model::widened<uint16_t>(x); }
static inline simde__m512i _mm512_cvtepu8_epi32(simde__m128i x) { return model::widened<uint8_t>(x); }
static inline simde__m512i _mm512_cvtepi8_epi32(simde__m128i x) { return model::widened<int8_t>(x); }
static inline simde__m512 _mm512_cvtepi32_ps(simde__m512i x) {
    return model::each<simde__m512, float, int32_t, 16>(x, [](int32_t i) { return static_cast<float>(i); });
}
static inline simde__m512i _mm512_cvtps_epi32(simde__m512 x) {
    return model::each<simde__m512i, int32_t, float, 16>(x, [](float f) { return static_cast<int32_t>(nearbyintf(f)); });
}
static inline simde__m256 _mm512_extractf32x8_ps(simde__m512 x, int half) {
    simde__m256 part;
    std::memcpy(&part, reinterpret_cast<const char*>(&x) + half * 32, sizeof part);
    return part;
}
static inline int32_t _mm512_reduce_max_epi32(simde__m512i x) {
    int32_t items[16], most = INT32_MIN;
    std::memcpy(items, &x, sizeof items);
    for (const int32_t item : items) most = item > most ? item : most;
    return most;
}
// The first argument goes to the upper half.
static inline simde__m512bh _mm512_cvtne2ps_pbh(simde__m512 high, simde__m512 low) {
    const simde__m512 both[2] = {low, high};
    uint16_t y[32];
    for (int i = 0; i < 32; ++i) {
        float x;
        std::memcpy(&x, reinterpret_cast<const char*>(both) + 4 * i, sizeof x);
        y[i] = qq::float_to_bf16(x);
    }
    simde__m512bh result;
    std::memcpy(&result, y, sizeof result);
    return result;
}
