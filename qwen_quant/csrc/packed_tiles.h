// Matrix products with packed weights (packed.h), whatever the instruction set (lanes.h). Each lane sums up one row, so
// nothing is added across lanes, and a block of codes is unpacked once for several tokens.
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

// Adds up the products of group `N` of step J once its codes are in the sums.
template <class W, int J, int N, int G, int T>
QQ_INLINE void fold_group(const uint8_t* const (&w)[G], int c, typename W::Sum (&sums)[G][T]) {
    for (int g = 0; g < G; ++g) {
        if constexpr (W::kScaled) {
            const LaneScales scale = lane_scales(W::template scale<J>(w[g], c, N));
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) sums[g][t].fold(scale);
        } else {
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) sums[g][t].fold(NoScale());
        }
    }
}

// The products of step J in chunk c, the b-th 32 weights of the row, [G groups of rows][T tokens]. Tokens take turns,
// because each sum has to wait for itself.
template <class W, int J, int G, int T>
QQ_INLINE void add_codes(const uint8_t* const (&w)[G], const uint8_t* const (&x)[T], const Q8Row& at, int c,
                         int64_t b, typename W::Sum (&sums)[G][T]) {
    constexpr int kGroupWords = W::kGroup / 4;
    constexpr int kFold = W::Sum::kFit < kGroupWords ? W::Sum::kFit : kGroupWords;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        for (int g = 0; g < G; ++g) sums[g][t].begin(W::start(x[t], at, b));
    }
    unrolled<4>([&](auto pair) QQ_LAMBDA_INLINE {
        constexpr int I = decltype(pair)::value;
        LaneInts codes[2][G];
        for (int g = 0; g < G; ++g) W::template codes<J, I>(w[g] + W::kWords, c, codes[0][g], codes[1][g]);
        unrolled<2>([&](auto side) QQ_LAMBDA_INLINE {
            constexpr int kSide = decltype(side)::value, kDone = 2 * I + kSide + 1;
            constexpr int kWord = kSide ? W::second(I) : W::first(I);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const LaneInts four = four_of_x(x[t] + b * kBlock + 4 * kWord);
                for (int g = 0; g < G; ++g) sums[g][t].add(codes[kSide][g], four);
            }
            if constexpr (kDone % kFold == 0) fold_group<W, J, (kDone - 1) / kGroupWords>(w, c, sums);
        });
    });
}

// Adds the minima of step J times the sums of x.
template <class W, int J, int I, int G, int T>
QQ_INLINE void add_minimum(const uint8_t* const (&w)[G], const uint8_t* const (&x)[T], const Q8Row& at, int c,
                           int64_t b, LaneFloats (&acc)[G][T]) {
    const int64_t sum = W::kMinima == 2 ? at.scaled_half_sums + 8 * b + 4 * I : at.scaled_sums + 4 * b;
    for (int g = 0; g < G; ++g) {
        const LaneFloats minimum = W::template minimum<J>(w[g], c, I);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            acc[g][t] = multiply_add(minimum, lanes_of(load_f32(x[t] + sum)), acc[g][t]);
        }
    }
}

template <class W, int J, int G, int T>
QQ_INLINE void add_step(const uint8_t* const (&w)[G], const uint8_t* const (&x)[T], const Q8Row& at, int c, int64_t b,
                        LaneFloats (&acc)[G][T]) {
    typename W::Sum sums[G][T];
    add_codes<W, J>(w, x, at, c, b, sums);
    for (int g = 0; g < G; ++g) {
        const LaneFloats d = W::half(w[g], 0);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const LaneFloats scale = multiply(d, lanes_of(load_f32(x[t] + at.scales + 4 * b)));
            acc[g][t] = multiply_add(sums[g][t].total(W::start(x[t], at, b)), scale, acc[g][t]);
        }
    }
    if constexpr (W::kMinima > 0) add_minimum<W, J, 0>(w, x, at, c, b, acc);
    if constexpr (W::kMinima > 1) add_minimum<W, J, 1>(w, x, at, c, b, acc);
}

inline void store_rows(const MatmulArgs& a, int64_t r, int64_t t, LaneFloats values) {
    float* y = a.y + t * a.ldy + r;
    if (a.n_rows - r >= kLanes) {
        store_lanes(y, values);
    } else {
        float rows[kLanes];
        store_lanes(rows, values);
        std::memcpy(y, rows, static_cast<size_t>(a.n_rows - r) * sizeof(float));
    }
}

// G groups of rows from r0 on, and T tokens from t0 on
template <class W, int G, int T>
inline void packed_tile(const MatmulArgs& a, int64_t r0, int64_t t0) {
    constexpr int kAhead = 4096;  // bytes of weights asked for early
    constexpr int kChunkBytes = W::kBytes / W::kChunks;
    const int64_t n_steps = a.k / kBlock;
    const Q8Row at = q8_row(a.k);
    const uint8_t* w[G];
    const uint8_t* x[T];
    LaneFloats acc[G][T];
    for (int g = 0; g < G; ++g) w[g] = a.weights + (r0 + g * kLanes) * a.row_bytes;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        x[t] = a.x + (t0 + t) * a.x_row_bytes;
        for (int g = 0; g < G; ++g) acc[g][t] = lanes_of(0.0f);
    }
    for (int64_t b = 0; b < n_steps;) {
        for (int c = 0; c < W::kChunks; ++c, b += W::kSteps) {
            for (int g = 0; g < G; ++g) {
                for (int i = 0; i < kChunkBytes; i += 64) {
                    prefetch(w[g] + kAhead + c * kChunkBytes + i);
                }
            }
            unrolled<W::kSteps>([&](auto step) QQ_LAMBDA_INLINE {
                constexpr int J = decltype(step)::value;
                add_step<W, J>(w, x, at, c, b + J, acc);
            });
        }
        for (int g = 0; g < G; ++g) w[g] += W::kBytes;
    }
    for (int t = 0; t < T; ++t) {
        for (int g = 0; g < G; ++g) store_rows(a, r0 + g * kLanes, t0 + t, acc[g][t]);
    }
}

template <class W, int T>
constexpr int groups_in_tile() {
    return T == 1 ? kGroupsAlone : W::kGroup < kBlock ? kGroupsOfHalves : kGroups;
}

// Rows [r0, r1) and the tokens from t0 on, T at a time, then what is left in smaller tiles.
template <class W, int T>
inline void packed_rows(const MatmulArgs& a, int64_t r0, int64_t r1, int64_t t0) {
    constexpr int G = groups_in_tile<W, T>();
    for (; t0 + T <= a.n_tokens; t0 += T) {
        for (int64_t r = r0; r < r1; r += G * kLanes) packed_tile<W, G, T>(a, r, t0);
    }
    if constexpr (T > 1) packed_rows<W, T / 2>(a, r0, r1, t0);
}

template <class W>
void matmul_packed(const MatmulArgs& a) {
    constexpr int64_t kTile = groups_in_tile<W, kPackedTokens>() * kLanes;
    MatmulArgs whole = a;
    whole.n_rows = a.n_rows / kTile * kTile;
    for_each_part(whole, kTile, [&](int64_t r0, int64_t r1) { packed_rows<W, kPackedTokens>(a, r0, r1, 0); });
    // The last rows, fewer than a tile has, are not worth code of their own for several tokens.
    for (int64_t t = 0; t < a.n_tokens; ++t) {
        for (int64_t r = whole.n_rows; r < a.n_rows; r += kLanes) packed_tile<W, 1, 1>(a, r, t);
    }
}

// Gives each type its packed kernel. Matrices that are too small to be packed keep the kernel they had.
void add_packed_kernels(Kernels& k) {
    k.types[kQ4_0].matmul_packed = matmul_packed<PackedQ4_0>;
    k.types[kQ4_1].matmul_packed = matmul_packed<PackedQ4_1>;
    k.types[kQ5_0].matmul_packed = matmul_packed<PackedQ5_0>;
    k.types[kQ5_1].matmul_packed = matmul_packed<PackedQ5_1>;
    k.types[kQ8_0].matmul_packed = matmul_packed<PackedQ8_0>;
    k.types[kQ8_0].pack_flip = kSignedCodesFlipped ? 0x80808080u : 0;
    k.types[kQ2_K].matmul_packed = matmul_packed<PackedQ2_K>;
    k.types[kQ3_K].matmul_packed = matmul_packed<PackedQ3_K>;
    k.types[kQ4_K].matmul_packed = matmul_packed<PackedQ4_K>;
    k.types[kQ5_K].matmul_packed = matmul_packed<PackedQ5_K>;
    k.types[kQ6_K].matmul_packed = matmul_packed<PackedQ6_K>;
    k.types[kIQ4_NL].matmul_packed = matmul_packed<PackedIQ4_NL>;
    k.types[kIQ4_XS].matmul_packed = matmul_packed<PackedIQ4_XS>;
}

}  // namespace

}  // namespace qq
