// Matrix products with packed weights (packed.h), whatever the instruction set (lanes.h). Each lane sums up one row, so
// nothing is added across lanes.
#pragma once

#include "packed_panels.h"

namespace qq {

namespace {

// Adds up the products of group `N` of step J once its codes are in the sums.
template <class W, int J, int N, int G>
QQ_INLINE void fold_group(const uint8_t* const (&w)[G], int c, typename W::Sum (&sums)[G]) {
    for (int g = 0; g < G; ++g) {
        if constexpr (W::kScaled) {
            sums[g].fold(lane_scales(W::template scale<J>(w[g], c, N)));
        } else {
            sums[g].fold(NoScale());
        }
    }
}

// The products of step J in chunk c, the b-th 32 weights of the row, with one token for G groups of rows. Groups take
// turns, because each sum has to wait for itself.
template <class W, int J, int G>
QQ_INLINE void add_codes(const uint8_t* const (&w)[G], const uint8_t* x, const Q8Row& at, int c, int64_t b,
                         typename W::Sum (&sums)[G]) {
    constexpr int kGroupWords = W::kGroup / 4;
    for (int g = 0; g < G; ++g) {
        if constexpr (kScaledOffset<W>) {
            sums[g].begin(scaled_offset<W, J>(w[g], c), four_of_x(x + at.minus_halves + 4 * b));
        } else {
            sums[g].begin(start<W>(x, at, b, 0));
        }
    }
    unrolled<4>([&](auto pair) QQ_LAMBDA_INLINE {
        constexpr int I = decltype(pair)::value;
        LaneInts codes[2][G];
        for (int g = 0; g < G; ++g) W::template codes<J, I>(w[g] + W::kWords, c, codes[0][g], codes[1][g]);
        unrolled<2>([&](auto side) QQ_LAMBDA_INLINE {
            constexpr int kSide = decltype(side)::value, kDone = 2 * I + kSide + 1;
            constexpr int kWord = kSide ? W::second(I) : W::first(I);
            const LaneInts four = four_of_x(x + b * kBlock + 4 * kWord);
            for (int g = 0; g < G; ++g) sums[g].add(codes[kSide][g], four);
            if constexpr (kDone % fold_after<W, typename W::Sum>() == 0) {
                fold_group<W, J, (kDone - 1) / kGroupWords>(w, c, sums);
            }
            if constexpr (kStartsWithin<W> && kDone % kGroupWords == 0 && kDone < 8) {
                for (int g = 0; g < G; ++g) sums[g].restart(start<W>(x, at, b, kDone / kGroupWords));
            }
        });
    });
}

template <class W, int J, int G>
QQ_INLINE void add_step(const uint8_t* const (&w)[G], const uint8_t* x, const Q8Row& at, int c, int64_t b,
                        LaneFloats (&acc)[G]) {
    typename W::Sum sums[G];
    add_codes<W, J>(w, x, at, c, b, sums);
    const LaneFloats x_scale = lanes_of(load_f32(x + at.scales + 4 * b));
    for (int g = 0; g < G; ++g) {
        acc[g] = multiply_add(sums[g].total(), multiply(W::half(w[g], 0), x_scale), acc[g]);
    }
    if constexpr (W::kMinima > 0) {
        for (int i = 0; i < W::kMinima; ++i) {
            const LaneFloats sum = lanes_of(load_f32(x + sum_of_x<W>(at, b, i)));
            for (int g = 0; g < G; ++g) acc[g] = multiply_add(W::template minimum<J>(w[g], c, i), sum, acc[g]);
        }
    }
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

// G groups of rows from r0 on, with token t
template <class W, int G>
inline void packed_tile(const MatmulArgs& a, int64_t r0, int64_t t) {
    constexpr int kAhead = 4096;  // bytes of weights asked for early
    constexpr int kChunkBytes = W::kBytes / W::kChunks;
    const int64_t n_steps = a.k / kBlock;
    const Q8Row at = q8_row(a.k);
    const uint8_t* x = a.x + t * a.x_row_bytes;
    const uint8_t* w[G];
    LaneFloats acc[G];
    for (int g = 0; g < G; ++g) {
        w[g] = a.weights + (r0 + g * kLanes) * a.row_bytes;
        acc[g] = lanes_of(0.0f);
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
    for (int g = 0; g < G; ++g) store_rows(a, r0 + g * kLanes, t, acc[g]);
}

// One token at a time: rows are read from end to end.
template <class W>
inline void packed_rows(const MatmulArgs& a, int64_t first) {
    constexpr int64_t kTile = kGroupsAlone * kLanes;
    for (int64_t t = 0; t < a.n_tokens; ++t) {
        int64_t r = first;
        for (; r + kTile <= a.n_rows; r += kTile) packed_tile<W, kGroupsAlone>(a, r, t);
        for (; r < a.n_rows; r += kLanes) packed_tile<W, 1>(a, r, t);
    }
}

// Several tokens go through panels; the activations of one stretch of steps stay in the second-level cache while all
// rows pass by.
template <class W>
void matmul_packed(const MatmulArgs& a) {
    if (a.n_tokens == 1) return packed_rows<W>(a, 0);
    constexpr int64_t kRows = Panel<W>::kRows, kSteps = Panel<W>::kSteps;
    const int64_t n_steps = a.k / kBlock, whole = a.n_rows / kRows * kRows;
    Panel<W> panel;
    for (int64_t b = 0; b < n_steps; b += kSteps) {
        const int64_t n = b + kSteps < n_steps ? kSteps : n_steps - b;
        for (int64_t r = 0; r < whole; r += kRows) {
            panel.bring_out(a, r, b, n);
            panel_tokens<W, Panel<W>::kTokens>(panel, a, r, b, n, 0);
        }
    }
    packed_rows<W>(a, whole);  // fewer than a panel has
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
