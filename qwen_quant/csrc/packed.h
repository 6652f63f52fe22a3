// Rows of block-quantized weights, interleaved for kernels that keep one row in each lane of a vector.
//
// Rows are taken in groups as large as a vector has lanes, the last one filled up with zeros. A group holds its wide
// blocks (quant_blocks.h) one after the other: the first 16-bit number of all rows, the second one, then each byte of
// scales of all rows, then each word of codes of all rows. A full group takes the bytes that its rows took, but for
// the few by which wide blocks grow.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qq {

// A matrix as a file stores it: row after row.
struct PlainRows {
    const uint8_t* data;
    int64_t n_rows;
    size_t row_bytes;
};

// Whether blocks of this type can be interleaved.
bool can_pack(uint32_t type);

// A row's share of its group.
size_t packed_row_bytes(uint32_t type, int64_t k);

// Bytes of `n_rows` rows once they are packed.
inline size_t packed_bytes(int64_t n_rows, size_t packed_row_bytes, int64_t lanes) {
    return static_cast<size_t>((n_rows + lanes - 1) / lanes * lanes) * packed_row_bytes;
}

// Packs the group that begins at row `first`, a multiple of `lanes`, to `group`. `flip` is xor-ed to the words.
void pack_group(uint32_t type, const PlainRows& rows, int64_t first, int64_t lanes, uint32_t flip, uint8_t* group);

// One row [k] of packed weights, decoded.
void decode_packed_row(uint32_t type, const uint8_t* packed, int64_t k, int64_t row, int64_t lanes, uint32_t flip,
                       float* out);

}  // namespace qq
