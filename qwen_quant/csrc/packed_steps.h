// What tiles of one and of several tokens share.
#pragma once

#include <type_traits>
#include <utility>

#include "packed_types.h"

namespace qq {

namespace {

template <class Visit, int... N>
QQ_INLINE void for_each_of(Visit visit, std::integer_sequence<int, N...>) {
    (visit(std::integral_constant<int, N>()), ...);
}

// visit(0), visit(1) ... visit(Count - 1), with numbers that are known when this is compiled
template <int Count, class Visit>
QQ_INLINE void unrolled(Visit visit) {
    for_each_of(visit, std::make_integer_sequence<int, Count>());
}

// Words of codes whose products a sum takes before it is folded.
template <class W, class Sum>
constexpr int fold_after() {
    constexpr int kGroupWords = W::kGroup / 4;
    return Sum::kFit < kGroupWords ? Sum::kFit : kGroupWords;
}

// Whether AVX2 takes the offset off as 16-bit products of scales with sums of x: sums of 16 bits have no room for it.
template <class W>
constexpr bool kScaledOffset = kSumsInShorts && W::kScaled && W::kOffset != 0;

// That product's side of the weights, in step J of chunk c
template <class W, int J>
QQ_INLINE LaneInts scaled_offset(const uint8_t* p, int c) {
    return W::Sum::template scaled_offset<W::kOffset>(W::template scale<J>(p, c, 0), W::template scale<J>(p, c, 1));
}

// What the products of group `n` in step b begin with: -kOffset * the sum of x.
template <class W>
QQ_INLINE int32_t start(const uint8_t* x, const Q8Row& at, int64_t b, int n) {
    if constexpr (W::kOffset == 0 || kScaledOffset<W>) {
        return 0;
    } else if constexpr (W::kGroup == kHalfBlock) {
        return -W::kOffset * load_i32(x + at.half_sums + 8 * b + 4 * n);
    } else {
        static_assert(W::kOffset == 8 || W::kOffset == 16 || W::kOffset == 128, "there are no such sums");
        const int64_t sums = W::kOffset == 8 ? at.minus_8 : W::kOffset == 16 ? at.minus_16 : at.minus_128;
        return load_i32(x + sums + 4 * b);
    }
}

// Whether later groups of a step begin with something, too.
template <class W>
constexpr bool kStartsWithin = W::kGroup < kBlock && W::kOffset != 0 && !kScaledOffset<W>;

// Where the sums of x that the i-th minimum of step b is multiplied with lie in a row of activations.
template <class W>
constexpr int64_t sum_of_x(const Q8Row& at, int64_t b, int i) {
    return W::kMinima == 2 ? at.scaled_half_sums + 8 * b + 4 * i : at.scaled_sums + 4 * b;
}

}  // namespace

}  // namespace qq
