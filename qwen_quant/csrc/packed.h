// Rows of block-quantized weights, interleaved for kernels that keep one row in each lane of a vector.
//
// Rows are taken in groups as large as a vector has lanes, the last one filled up with zeros. A group holds its blocks
// one after the other; a block begins with the 16-bit scales of all rows, then the minima of all rows where the type
// has them, then the codes: the first four bytes of every row, the next four of every row, and so on. A full group
// takes exactly the bytes that its rows took.
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

// Bytes of `n_rows` rows once they are packed.
inline size_t packed_bytes(int64_t n_rows, size_t row_bytes, int64_t lanes) {
    return static_cast<size_t>((n_rows + lanes - 1) / lanes * lanes) * row_bytes;
}

// Packs the group that begins at row `first`, a multiple of `lanes`, to `group`. `flip` is xor-ed to the codes,
// four at a time.
void pack_group(uint32_t type, const PlainRows& rows, int64_t first, int64_t lanes, uint32_t flip, uint8_t* group);

// One row of packed weights as the file stored it.
void unpack_row(uint32_t type, const uint8_t* packed, size_t row_bytes, int64_t row, int64_t lanes, uint32_t flip,
                uint8_t* out);

}  // namespace qq
