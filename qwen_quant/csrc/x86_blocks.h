// x86: loading weights and activations, and the layout of each block type.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "half.h"
#include "kernels.h"

namespace qq {

namespace {

inline float sum_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline __m256 load_half8(const void* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

inline float half_scale(const uint8_t* p) { return _cvtsh_ss(load_u16(p)); }

struct LoadF32 {
    static constexpr int kBytes = 4;
    static __m256 load8(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
    static float load1(const uint8_t* p) {
        float value;
        std::memcpy(&value, p, sizeof value);
        return value;
    }
};

struct LoadF16 {
    static constexpr int kBytes = 2;
    static __m256 load8(const uint8_t* p) { return load_half8(p); }
    static float load1(const uint8_t* p) { return half_scale(p); }
};

struct LoadBF16 {
    static constexpr int kBytes = 2;
    static __m256 load8(const uint8_t* p) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    }
    static float load1(const uint8_t* p) { return bf16_to_float(load_u16(p)); }
};

inline __m256i nibbles(const uint8_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(raw), _mm_srli_epi16(raw, 4), 1);
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

// How 32 weights lie in a block: weight = scale * (code - kOffset) + minimum.
struct BlockQ8_0 {
    static constexpr int kBytes = 34;
    static constexpr int kOffset = 0;
    static constexpr bool kUnsigned = false, kHasMinimum = false;
    static __m256i codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2)); }
};

struct BlockQ4_0 {
    static constexpr int kBytes = 18;
    static constexpr int kOffset = 8;
    static constexpr bool kUnsigned = true, kHasMinimum = false;
    static __m256i codes(const uint8_t* p) { return nibbles(p + 2); }
};

struct BlockQ4_1 {
    static constexpr int kBytes = 20;
    static constexpr int kOffset = 0;
    static constexpr bool kUnsigned = true, kHasMinimum = true;
    static __m256i codes(const uint8_t* p) { return nibbles(p + 4); }
};
// A tile of rows is one stretch of memory read as several streams, too short for the hardware to foresee; so each
// asks for the same place some tiles on.
inline size_t prefetch_distance(size_t tile_bytes) {
    constexpr size_t kAhead = 2048;
    return (kAhead + tile_bytes - 1) / tile_bytes * tile_bytes;
}

}  // namespace

}  // namespace qq
