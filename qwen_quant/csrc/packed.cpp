#include "packed.h"

#include <cstring>
#include <type_traits>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "quant_blocks.h"
#include "quant_types.h"

namespace qq {

namespace {

// Calls visit(where in a wide block, where in the group's block, bytes) for each piece of the row in lane `lane`.
template <class Visit>
void for_each_piece(const BlockFormat& format, int64_t lanes, int64_t lane, Visit visit) {
    int64_t mine = 0, shared = 0;
    const auto pieces = [&](int count, auto bytes) {
        for (int i = 0; i < count; ++i, mine += bytes, shared += bytes * lanes) {
            visit(mine, shared + bytes * lane, static_cast<size_t>(bytes));
        }
    };
    pieces(format.halves, std::integral_constant<int, 2>());
    pieces(format.bytes, std::integral_constant<int, 1>());
    pieces(format.words, std::integral_constant<int, 4>());
}

// Four words from each of four rows at a time: the first words of all, then the second ones, and so on, each `stride` bytes
// behind the one before.
inline void interleave_four(const uint8_t* const* rows, size_t at, uint32_t flip, uint8_t* out, size_t stride) {
#ifdef __SSE2__
    __m128i x[4];
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + at)),
                             _mm_set1_epi32(static_cast<int>(flip)));
    }
    const __m128i low01 = _mm_unpacklo_epi32(x[0], x[1]), low23 = _mm_unpacklo_epi32(x[2], x[3]);
    const __m128i high01 = _mm_unpackhi_epi32(x[0], x[1]), high23 = _mm_unpackhi_epi32(x[2], x[3]);
    const __m128i turned[4] = {_mm_unpacklo_epi64(low01, low23), _mm_unpackhi_epi64(low01, low23),
                               _mm_unpacklo_epi64(high01, high23), _mm_unpackhi_epi64(high01, high23)};
    for (int i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * stride), turned[i]);
#else
    for (int i = 0; i < 4; ++i) {
        for (int row = 0; row < 4; ++row) {
            uint32_t word;
            std::memcpy(&word, rows[row] + at + 4 * i, 4);
            word ^= flip;
            std::memcpy(out + i * stride + 4 * row, &word, 4);
        }
    }
#endif
}

// One block of `Lanes` rows, piece by piece in the order in which a group holds them; the words xor-ed with `flip`.
template <int Lanes>
void interleave(const BlockFormat& format, const uint8_t* const (&wide)[Lanes], uint32_t flip, uint8_t* out) {
    size_t at = 0;
    for (int i = 0; i < format.halves; ++i, at += 2) {
        for (int lane = 0; lane < Lanes; ++lane, out += 2) std::memcpy(out, wide[lane] + at, 2);
    }
    for (int i = 0; i < format.bytes; ++i, ++at) {
        for (int lane = 0; lane < Lanes; ++lane) *out++ = wide[lane][at];
    }
    int left = format.words;
    for (; left >= 4; left -= 4, at += 16, out += 16 * Lanes) {
        for (int lane = 0; lane < Lanes; lane += 4) interleave_four(wide + lane, at, flip, out + 4 * lane, 4 * Lanes);
    }
    for (; left > 0; --left, at += 4) {
        for (int lane = 0; lane < Lanes; ++lane, out += 4) {
            uint32_t word;
            std::memcpy(&word, wide[lane] + at, 4);
            word ^= flip;
            std::memcpy(out, &word, 4);
        }
    }
}

// All blocks of the group. Rows beyond the last are taken as zeros.
template <int Lanes>
void pack_blocks(const BlockFormat& format, size_t stored_bytes, const PlainRows& rows, int64_t first, uint32_t flip,
                 uint8_t* group) {
    const size_t n_blocks = rows.row_bytes / stored_bytes, group_bytes = format.wide_bytes() * Lanes;
    const int64_t filled = rows.n_rows - first;
    uint8_t buffers[Lanes][kLargestWideBlock] = {};
    const uint8_t* wide[Lanes];
    for (int lane = 0; lane < Lanes; ++lane) wide[lane] = buffers[lane];
    for (size_t b = 0; b < n_blocks; ++b, group += group_bytes) {
        for (int lane = 0; lane < Lanes && lane < filled; ++lane) {
            const uint8_t* stored = rows.data + static_cast<size_t>(first + lane) * rows.row_bytes + b * stored_bytes;
            wide[lane] = format.widened(stored, buffers[lane]);
        }
        interleave<Lanes>(format, wide, flip, group);
    }
}

// Turns over bits of the codes of a wide block.
void flip_words(const BlockFormat& format, uint32_t flip, uint8_t* wide) {
    if (flip == 0) return;
    uint8_t* words = wide + format.wide_bytes() - 4 * static_cast<size_t>(format.words);
    for (int i = 0; i < format.words; ++i) {
        uint32_t word;
        std::memcpy(&word, words + 4 * i, 4);
        word ^= flip;
        std::memcpy(words + 4 * i, &word, 4);
    }
}

}  // namespace

bool can_pack(uint32_t type) { return block_format(type) != nullptr; }

size_t packed_row_bytes(uint32_t type, int64_t k) {
    const BlockFormat& format = *block_format(type);
    return static_cast<size_t>(k / format.weights) * format.wide_bytes();
}

void pack_group(uint32_t type, const PlainRows& rows, int64_t first, int64_t lanes, uint32_t flip, uint8_t* group) {
    const BlockFormat& format = *block_format(type);
    if (lanes == 4) return pack_blocks<4>(format, type_info(type)->bytes, rows, first, flip, group);
    if (lanes == 8) return pack_blocks<8>(format, type_info(type)->bytes, rows, first, flip, group);
    pack_blocks<16>(format, type_info(type)->bytes, rows, first, flip, group);
}

void decode_packed_row(uint32_t type, const uint8_t* packed, int64_t k, int64_t row, int64_t lanes, uint32_t flip,
                       float* out) {
    const BlockFormat& format = *block_format(type);
    const size_t group_bytes = format.wide_bytes() * static_cast<size_t>(lanes);
    const uint8_t* group = packed + static_cast<size_t>(row / lanes * lanes) * packed_row_bytes(type, k);
    uint8_t wide[kLargestWideBlock];
    DecodedBlock block;
    for (int64_t i = 0; i < k; i += format.weights, group += group_bytes) {
        for_each_piece(format, lanes, row % lanes, [&](int64_t mine, int64_t shared, size_t bytes) {
            std::memcpy(wide + mine, group + shared, bytes);
        });
        flip_words(format, flip, wide);
        format.decode(wide, block);
        write_weights(format, block, out + i);
    }
}

}  // namespace qq
