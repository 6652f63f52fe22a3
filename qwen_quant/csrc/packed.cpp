#include "packed.h"

#include <cstring>

#include "quant_types.h"

namespace qq {

namespace {

// A stored block: 16-bit numbers (scale, minimum), then words of four bytes of codes.
struct BlockLayout {
    int64_t halves, words;
    size_t bytes() const { return static_cast<size_t>(halves * 2 + words * 4); }
};

BlockLayout block_layout(uint32_t type) {
    switch (type) {
        case kQ4_0: return {1, 4};
        case kQ4_1: return {2, 4};
        case kQ8_0: return {1, 8};
        default: return {0, 0};
    }
}

// Calls visit(block, scales, codes) for each block of the row in lane `lane`: where it begins in the stored row, and
// where its first scale and its first word of codes lie in the group.
template <class Visit>
void for_each_block(const BlockLayout& layout, size_t row_bytes, int64_t lanes, int64_t lane, Visit visit) {
    const size_t n_blocks = row_bytes / layout.bytes();
    for (size_t b = 0; b < n_blocks; ++b) {
        const size_t block = b * layout.bytes();
        const size_t scales = block * static_cast<size_t>(lanes) + static_cast<size_t>(lane) * 2;
        const size_t codes = (block + static_cast<size_t>(layout.halves) * 2) * static_cast<size_t>(lanes) +
                             static_cast<size_t>(lane) * 4;
        visit(block, scales, codes);
    }
}

void pack_row(const BlockLayout& layout, const uint8_t* row, size_t row_bytes, int64_t lanes, int64_t lane,
              uint32_t flip, uint8_t* group) {
    for_each_block(layout, row_bytes, lanes, lane, [&](size_t block, size_t scales, size_t codes) {
        const uint8_t* in = row + block;
        for (int64_t i = 0; i < layout.halves; ++i, in += 2) std::memcpy(group + scales + i * lanes * 2, in, 2);
        for (int64_t i = 0; i < layout.words; ++i, in += 4) {
            uint32_t word;
            std::memcpy(&word, in, 4);
            word ^= flip;
            std::memcpy(group + codes + i * lanes * 4, &word, 4);
        }
    });
}

}  // namespace

bool can_pack(uint32_t type) { return block_layout(type).words > 0; }

void pack_group(uint32_t type, const PlainRows& rows, int64_t first, int64_t lanes, uint32_t flip, uint8_t* group) {
    const BlockLayout layout = block_layout(type);
    const int64_t filled = rows.n_rows - first < lanes ? rows.n_rows - first : lanes;
    if (filled < lanes) std::memset(group, 0, static_cast<size_t>(lanes) * rows.row_bytes);
    for (int64_t lane = 0; lane < filled; ++lane) {
        pack_row(layout, rows.data + static_cast<size_t>(first + lane) * rows.row_bytes, rows.row_bytes, lanes, lane,
                 flip, group);
    }
}

void unpack_row(uint32_t type, const uint8_t* packed, size_t row_bytes, int64_t row, int64_t lanes, uint32_t flip,
                uint8_t* out) {
    const BlockLayout layout = block_layout(type);
    const uint8_t* group = packed + static_cast<size_t>(row / lanes * lanes) * row_bytes;
    for_each_block(layout, row_bytes, lanes, row % lanes, [&](size_t block, size_t scales, size_t codes) {
        uint8_t* to = out + block;
        for (int64_t i = 0; i < layout.halves; ++i, to += 2) std::memcpy(to, group + scales + i * lanes * 2, 2);
        for (int64_t i = 0; i < layout.words; ++i, to += 4) {
            uint32_t word;
            std::memcpy(&word, group + codes + i * lanes * 4, 4);
            word ^= flip;
            std::memcpy(to, &word, 4);
        }
    });
}

}  // namespace qq
