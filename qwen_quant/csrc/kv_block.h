// Where quantized keys and values lie within a page of the cache: in the order in which vectors of 16-bit products want
// them. Shared by all instruction sets, so nothing here may be merged by a linker.
//
// int8 keys    [block / 16][dim / 2][16 keys][2 channels]       int8 values  [block / 2][dim][2 tokens]
// int4 keys    [block / 16][dim / 8][16 keys][8 channels]       int4 values  [block / 8][dim][8 tokens]
//
// for each block of the page, followed by the block's scales, one for 32 channels of a token: bytes [dim / 32][block],
// floats of 5 exponent and 3 mantissa bits. The 8 codes in the 4 bytes of int4 are, of keys, the lower nibbles of the bytes
// and then the upper ones; of values nibbles 0 to 3 of a first 16-bit word for the even ones of the eight, of a second for
// the odd ones, so that each shift leaves pairs of neighbours.
#pragma once

#include <cstddef>
#include <cstdint>

#include "half.h"

namespace qq {

enum class KvType : uint8_t { kF16, kInt8, kInt4 };

constexpr int64_t kKvPage = 256;  // tokens
constexpr int64_t kKvGroup = 32;  // channels of a token that share a scale
constexpr int64_t kKvBlock = 64;  // tokens that attention takes at once; divides a page
constexpr int64_t kKvUnit = 64;   // quantized heads are multiples of this
constexpr int64_t kKvRecent = 32;  // positions in a stretch: a token reads its own stretch in FP16; divides a block
constexpr int64_t kLargestHead = 1024;
constexpr float kInt4Middle = 7.5f;

constexpr int32_t kScaleShift = 20;               // bits of a float's mantissa that a scale byte lacks
constexpr int32_t kScaleLowest = (127 - 20) << 3;  // the bytes begin at 2^-20

static inline float kv_scale(uint8_t byte) {
    return bits_to_float((static_cast<uint32_t>(byte) + static_cast<uint32_t>(kScaleLowest)) << kScaleShift);
}

// The smallest stored scale that is not below x >= 0, saturating at both ends.
static inline uint8_t covering_scale(float x) {
    const int32_t rounded = static_cast<int32_t>((float_to_bits(x) + ((1u << kScaleShift) - 1)) >> kScaleShift);
    const int32_t byte = rounded - kScaleLowest;
    return static_cast<uint8_t>(byte < 0 ? 0 : byte > 255 ? 255 : byte);
}

// Bytes of the codes of one head's keys or values in a block, and with their scales.
static inline size_t kv_code_bytes(KvType type, int64_t dim) {
    const size_t values = static_cast<size_t>(kKvBlock * dim);
    return type == KvType::kF16 ? 2 * values : type == KvType::kInt8 ? values : values / 2;
}
static inline size_t kv_block_bytes(KvType type, int64_t dim) {
    const size_t scales = type == KvType::kF16 ? 0 : static_cast<size_t>(kKvBlock * dim / kKvGroup);
    return kv_code_bytes(type, dim) + scales;
}
// In a page
static inline size_t kv_head_bytes(KvType type, int64_t dim) { return kKvPage / kKvBlock * kv_block_bytes(type, dim); }

// Within a head's part of a page: the codes of the tokens from `slot` on, a multiple of what lies side by side, and their
// first group's scales.
static inline size_t kv_codes_at(KvType type, int64_t dim, int64_t slot) {
    return static_cast<size_t>(slot / kKvBlock) * kv_block_bytes(type, dim) +
           kv_code_bytes(type, dim) / kKvBlock * static_cast<size_t>(slot % kKvBlock);
}
static inline size_t kv_scales_at(KvType type, int64_t dim, int64_t slot) {
    return static_cast<size_t>(slot / kKvBlock) * kv_block_bytes(type, dim) + kv_code_bytes(type, dim) +
           static_cast<size_t>(slot % kKvBlock);
}

// Queries as quantized keys are multiplied with: codes, finer than those of the keys, with a scale for 32 channels.
struct KvQueries {
    uint8_t* codes;  // [n_q, dim]: int16 for int8 keys, int8 for int4 keys
    float* scales;   // [n_q, dim / 32]
    float* offsets;  // [n_q, dim / 32]: what the middle of int4 adds to the sums of codes
};

// Tokens of a block, from its first on.
struct KvTokens {
    const uint8_t* codes;
    const uint8_t* scales;  // of the first group; the next group's follow kKvBlock bytes later
    int64_t n, dim;
    const uint8_t* ahead;  // a block that is wanted next, as many bytes of which are asked for early; or nullptr
};

// The part of scores that comes from the keys' centre, for the kKvBlock positions of a block: of each pair of channels that
// has one, a * cos(j angle) + b * sin(j angle).
struct TurnedArgs {
    const int32_t* pairs;  // [n_pairs]
    int64_t n_pairs;
    const float* cosines;  // [every pair, kKvBlock]
    const float* sines;
    const float* a;  // [n_q, n_pairs]
    const float* b;
};

// What an instruction set does for one type of codes. `page` is a head's part of a page, `slot` the token in it.
struct KvKernels {
    // False when x [dim] is not finite.
    bool (*store_key)(const float* x, int64_t dim, uint8_t* page, int64_t slot);
    bool (*store_value)(const float* x, int64_t dim, uint8_t* page, int64_t slot);
    void (*quantize_queries)(const float* q, int64_t n_q, int64_t dim, const KvQueries& out);
    // scores [n_q, ld]: of a multiple of 16 keys that covers all n
    void (*scores)(const KvQueries& q, int64_t n_q, const KvTokens& keys, float* scores, int64_t ld);
    // acc [n_q, dim] = acc * rescale[q] + probabilities [n_q, ld] @ values; the probabilities go on with zeros up to
    // kKvBlock.
    void (*values)(const float* probabilities, int64_t ld, const float* rescale, int64_t n_q, const KvTokens& values,
                   float* acc);
};

}  // namespace qq
