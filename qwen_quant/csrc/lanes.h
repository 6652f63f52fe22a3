// What the lanes of every instruction set share. An instruction set's own header (x86_lanes.h, neon_lanes.h) includes
// this one, and is included before packed_types.h and packed_tiles.h. Everything is in an unnamed namespace, because
// each file that includes it is compiled for another instruction set.
//
// A tile of a product has kGroups groups of rows and kPackedTokens tokens. A single token has kGroupsAlone groups.
#pragma once

#include <cstring>

#include "kernels.h"

// For functions that must disappear into the loop over a tile, or its sums would be kept in memory.
#define QQ_LAMBDA_INLINE __attribute__((always_inline))
#define QQ_INLINE inline QQ_LAMBDA_INLINE
// For functions that need the registers for themselves.
#define QQ_ALONE __attribute__((noinline))

namespace qq {

namespace {

inline int32_t load_i32(const uint8_t* p) {
    int32_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

inline float load_f32(const uint8_t* p) {
    float value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// In place of a group's scale where the block has a single one.
struct NoScale {};

// Whether a sum of products in a panel is of two tokens, and takes two words of codes at a time.
template <class Sum>
constexpr bool kTwoTokens = false;
// Whether it takes two words of codes at a time and folds them at once.
template <class Sum>
constexpr bool kTwoWords = false;

// Calls visit(r0, r1) for parts of the rows, multiples of `unit`, that stay in the second-level cache while all tokens
// pass by; the activations of one tile stay in the first-level cache while these rows pass by.
template <class Visit>
inline void for_each_part(const MatmulArgs& a, int64_t unit, Visit visit) {
    constexpr int64_t kPart = 256 << 10;
    const int64_t unit_bytes = unit * static_cast<int64_t>(a.row_bytes);
    const int64_t step = (kPart + unit_bytes - 1) / unit_bytes * unit;
    for (int64_t r = 0; r < a.n_rows; r += step) visit(r, r + step < a.n_rows ? r + step : a.n_rows);
}

}  // namespace

}  // namespace qq
