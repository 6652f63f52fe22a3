// Blocks of quantized weights outside the vector kernels: how each type stores them, and what they decode to.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qq {

constexpr int kLargestBlock = 256;
constexpr int kSmallestGroup = 16;
constexpr size_t kLargestWideBlock = 256;  // bytes

// weight i = scale[i / group] * codes[i] + minimum[i / group]
struct DecodedBlock {
    int8_t codes[kLargestBlock];
    float scale[kLargestBlock / kSmallestGroup];
    float minimum[kLargestBlock / kSmallestGroup];
};

// A block is widened before kernels see it: 16-bit numbers first (d, then m or dmin), then the integers of its groups
// as a byte each, then words of four bytes that hold codes, or bits of codes, as they are stored. Only a few bytes of
// scales grow by that.
struct BlockFormat {
    int weights;
    int group;  // weights that share a scale
    int halves, bytes, words;
    void (*widen)(const uint8_t* stored, uint8_t* wide);  // nullptr: blocks are stored as they are wanted
    void (*decode)(const uint8_t* wide, DecodedBlock& out);

    size_t wide_bytes() const { return static_cast<size_t>(2 * halves + bytes + 4 * words); }

    // The wide block, which may be the stored one itself.
    const uint8_t* widened(const uint8_t* stored, uint8_t* buffer) const {
        if (!widen) return stored;
        widen(stored, buffer);
        return buffer;
    }
};

// nullptr for a type that is no block type, or one that the engine does not know.
const BlockFormat* block_format(uint32_t type);

// scale * code + minimum, rounded after each operation, so that decoded weights are the same numbers everywhere.
void write_weights(const BlockFormat& format, const DecodedBlock& block, float* out);

}  // namespace qq
