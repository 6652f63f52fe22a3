// Rounding for a quantized cache on any CPU; kv_store.h says what it is for.
#pragma once

#include <cmath>
#include <cstdint>

#include "kv_block.h"

namespace qq {

namespace {

constexpr float kRoundFloat = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even integer

inline float nearest_code(float x, float inverse, float middle, float low, float high) {
    const float code = x * inverse + middle;
    return ((code < low ? low : code > high ? high : code) + kRoundFloat) - kRoundFloat;
}

// codes [32] = x * inverse + middle, rounded and kept within low … high
inline void nearest_codes(const float* x, float inverse, float middle, float low, float high, int8_t* codes) {
    for (int64_t i = 0; i < kKvGroup; ++i) {
        codes[i] = static_cast<int8_t>(nearest_code(x[i], inverse, middle, low, high));
    }
}

// The sum of squares of what int4 codes with this scale leave of a group of 32, added up as vectors of eight do it
inline float int4_error(const float* x, float scale) {
    const float inverse = 1.0f / scale;
    float sums[8] = {};
    for (int64_t i = 0; i < kKvGroup; i += 8) {
        for (int64_t j = 0; j < 8; ++j) {
            const float code = nearest_code(x[i + j], inverse, kInt4Middle, 0.0f, 15.0f);
            const float gap = x[i + j] - (code - kInt4Middle) * scale;
            sums[j] += gap * gap;
        }
    }
    for (int64_t half = 4; half > 0; half /= 2) {
        for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
    }
    return sums[0];
}

// The orthonormal Hadamard transform of x [n], n a power of two times an odd number: block by block.
inline void hadamard(float* x, int64_t n) {
    const int64_t size = n & -n;
    for (int64_t half = 1; half < size; half *= 2) {
        for (int64_t begin = 0; begin < n; begin += 2 * half) {
            for (int64_t i = begin; i < begin + half; ++i) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
        }
    }
    const float scale = 1.0f / sqrtf(static_cast<float>(size));
    for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

}  // namespace

}  // namespace qq
