// Writing to a quantized cache: plain loops that every instruction set compiles for itself. What a compiler does not turn
// into vectors comes from a header that is included before this one, for any CPU kv_round.h: nearest_codes, int4_error and
// hadamard.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kv_block.h"

namespace qq {

namespace {

constexpr int kStepsDown = 4;  // scales at and below the covering one that int4 tries

// The largest magnitude among n values as bits of a float: NaN is larger than every number and is not lost.
inline uint32_t largest_bits(const float* x, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

// Codes of a group of 32 in -127 … 127; returns the scale's byte.
inline uint8_t round_int8(const float* x, float largest, int8_t* codes) {
    const uint8_t byte = covering_scale(largest / 127.0f);
    nearest_codes(x, 1.0f / kv_scale(byte), 0.0f, -127.0f, 127.0f, codes);
    return byte;
}

// Codes of a group of 32 in 0 … 15 by the scale of least error; returns its byte.
inline uint8_t round_int4(const float* x, float largest, int8_t* codes) {
    const int covering = covering_scale(largest / (kInt4Middle + 0.5f));
    int best = covering;
    float least = int4_error(x, kv_scale(static_cast<uint8_t>(covering)));
    for (int step = 1; step < kStepsDown && step <= covering; ++step) {
        const float error = int4_error(x, kv_scale(static_cast<uint8_t>(covering - step)));
        if (error < least) {
            least = error;
            best = covering - step;
        }
    }
    nearest_codes(x, 1.0f / kv_scale(static_cast<uint8_t>(best)), kInt4Middle, 0.0f, 15.0f, codes);
    return static_cast<uint8_t>(best);
}

// The codes of x [dim], and its scales where the page has them. False when x is not finite.
template <KvType T>
inline bool round_token(const float* x, int64_t dim, int8_t* codes, uint8_t* page, int64_t slot) {
    uint8_t* scales = page + kv_scales_at(T, dim, slot);
    for (int64_t g = 0; g < dim / kKvGroup; ++g) {
        const float* group = x + g * kKvGroup;
        const uint32_t bits = largest_bits(group, kKvGroup);
        if (bits >= 0x7f800000u) return false;
        const float largest = bits_to_float(bits);
        int8_t* out = codes + g * kKvGroup;
        scales[g * kKvBlock] = T == KvType::kInt8 ? round_int8(group, largest, out) : round_int4(group, largest, out);
    }
    return true;
}

// Where in its four bytes the nibble of the i-th of eight codes begins.
inline int key_nibble(int64_t i) { return static_cast<int>(8 * (i & 3) + (i & 4)); }
inline int value_nibble(int64_t i) { return static_cast<int>(16 * (i & 1) + 4 * (i >> 1)); }

template <KvType T>
bool store_key(const float* x, int64_t dim, uint8_t* page, int64_t slot) {
    int8_t codes[kLargestHead];
    if (!round_token<T>(x, dim, codes, page, slot)) return false;
    uint8_t* tile = page + kv_codes_at(T, dim, slot & ~int64_t{15});
    const int64_t key = slot & 15;
    if (T == KvType::kInt8) {
        for (int64_t c = 0; c < dim; c += 2) std::memcpy(tile + (c / 2 * 16 + key) * 2, codes + c, 2);
        return true;
    }
    for (int64_t c = 0; c < dim; c += 8) {
        uint32_t lower, upper;
        std::memcpy(&lower, codes + c, 4);
        std::memcpy(&upper, codes + c + 4, 4);
        const uint32_t word = lower | upper << 4;
        std::memcpy(tile + (c / 8 * 16 + key) * 4, &word, 4);
    }
    return true;
}

template <KvType T>
bool store_value(const float* x, int64_t dim, uint8_t* page, int64_t slot) {
    int8_t codes[kLargestHead];
    if (!round_token<T>(x, dim, codes, page, slot)) return false;
    constexpr int64_t kTokens = T == KvType::kInt8 ? 2 : 8;  // that lie side by side
    uint8_t* tile = page + kv_codes_at(T, dim, slot - slot % kTokens);
    const int64_t token = slot % kTokens;
    if (T == KvType::kInt8) {
        for (int64_t d = 0; d < dim; ++d) tile[2 * d + token] = static_cast<uint8_t>(codes[d]);
        return true;
    }
    const int shift = value_nibble(token);
    for (int64_t d = 0; d < dim; ++d) {
        uint32_t word;
        std::memcpy(&word, tile + 4 * d, 4);
        word = (word & ~(15u << shift)) | static_cast<uint32_t>(codes[d]) << shift;
        std::memcpy(tile + 4 * d, &word, 4);
    }
    return true;
}

// What queries are multiplied with keys as
template <KvType T>
using QueryCode = typename std::conditional<T == KvType::kInt8, int16_t, int8_t>::type;

// Rows of queries [n_q, dim] as codes.
template <KvType T>
void quantize_queries(const float* q, int64_t n_q, int64_t dim, const KvQueries& out) {
    constexpr float kLargest = T == KvType::kInt8 ? 32767.0f : 127.0f;
    QueryCode<T>* codes = reinterpret_cast<QueryCode<T>*>(out.codes);
    for (int64_t g = 0; g < n_q * dim / kKvGroup; ++g, q += kKvGroup, codes += kKvGroup) {
        const float largest = bits_to_float(largest_bits(q, kKvGroup));
        const float inverse = largest > 1e-30f ? kLargest / largest : 0.0f;
        int32_t sum = 0;
        for (int64_t i = 0; i < kKvGroup; ++i) {
            const int32_t code = static_cast<int32_t>((q[i] * inverse + kRoundFloat) - kRoundFloat);
            codes[i] = static_cast<QueryCode<T>>(code);
            sum += code;
        }
        out.scales[g] = largest / kLargest;  // NaN stays NaN
        out.offsets[g] = T == KvType::kInt4 ? kInt4Middle * static_cast<float>(sum) : 0.0f;
    }
}

// Probabilities of up to kKvBlock tokens times the tokens' scales for one group of channels, as int16 codes.
struct ScaledProbabilities {
    alignas(64) int16_t codes[kKvBlock];
    float scale, offset;

    void set(const float* probabilities, const float* token_scales, int64_t n, float middle) {
        alignas(64) float products[kKvBlock];
        for (int64_t j = 0; j < n; ++j) products[j] = probabilities[j] * token_scales[j];
        const float largest = bits_to_float(largest_bits(products, n));
        const float inverse = largest > 1e-30f ? 32767.0f / largest : 0.0f;
        int32_t sum = 0;
        for (int64_t j = 0; j < n; ++j) {
            const int32_t code = static_cast<int32_t>((products[j] * inverse + kRoundFloat) - kRoundFloat);
            codes[j] = static_cast<int16_t>(code);
            sum += code;
        }
        scale = largest / 32767.0f;
        offset = middle * static_cast<float>(sum);
    }
};

}  // namespace

}  // namespace qq
