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

// Where the sums of x that the i-th minimum of step b is multiplied with lie in a row of activations.
template <class W>
constexpr int64_t sum_of_x(const Q8Row& at, int64_t b, int i) {
    return W::kMinima == 2 ? at.scaled_half_sums + 8 * b + 4 * i : at.scaled_sums + 4 * b;
}

}  // namespace

}  // namespace qq
