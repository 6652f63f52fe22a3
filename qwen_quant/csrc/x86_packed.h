// x86: matrix products with packed weights (packed.h). Each lane sums up one row, so nothing is added across lanes,
// and a block of codes is unpacked once for several tokens.
#pragma once

#include "x86_lanes.h"

namespace qq {

namespace {

// How a block is multiplied: a product is scale * (start + sum of codes * x) + minimum * sum of x. The eight words of
// codes of each row come in four pairs, and first(i), second(i) say which words the i-th pair holds.
struct PackedQ8_0 {
    static constexpr int kBytes = 34 * kLanes;
    static constexpr bool kHasMinimum = false;
    using Sum = SumQ8_0;
    static constexpr int first(int i) { return 2 * i; }
    static constexpr int second(int i) { return 2 * i + 1; }
    static int32_t start(const uint8_t* x, const XBlock& at) { return start_of_q8_0(x, at); }
    static void load(const uint8_t* p, int i, LaneInts& a, LaneInts& b) {
        a = load_codes(p + (2 + 8 * i) * kLanes);
        b = load_codes(p + (6 + 8 * i) * kLanes);
    }
};

template <int Halves>
struct PackedNibbles {
    static constexpr int kBytes = (2 * Halves + 16) * kLanes;
    static constexpr bool kHasMinimum = Halves == 2;
    using Sum = NibbleSum;
    static constexpr int first(int i) { return i; }
    static constexpr int second(int i) { return i + 4; }
    static int32_t start(const uint8_t* x, const XBlock& at) { return kHasMinimum ? 0 : load_i32(x + at.minus_8); }
    static void load(const uint8_t* p, int i, LaneInts& a, LaneInts& b) {
        const LaneInts both = load_codes(p + (2 * Halves + 4 * i) * kLanes);
        a = low_nibbles(both);
        b = high_nibbles(both);
    }
};
using PackedQ4_0 = PackedNibbles<1>;
using PackedQ4_1 = PackedNibbles<2>;

// Sums of the products of one block, [G groups of rows][T tokens]. They take turns, because each has to wait for
// itself; the loops are unrolled, or the sums would be kept in memory.
template <class W, int G, int T>
inline void add_block(const uint8_t* const (&w)[G], const uint8_t* const (&x)[T], const XBlock& at,
                      typename W::Sum (&sums)[G][T]) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        for (int g = 0; g < G; ++g) sums[g][t].begin(W::start(x[t], at));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        LaneInts a[G], b[G];
        for (int g = 0; g < G; ++g) W::load(w[g], i, a[g], b[g]);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const LaneInts four = four_of_x(x[t] + at.codes + 4 * W::first(i));
            for (int g = 0; g < G; ++g) sums[g][t].add(a[g], four);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const LaneInts four = four_of_x(x[t] + at.codes + 4 * W::second(i));
            for (int g = 0; g < G; ++g) sums[g][t].add(b[g], four);
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

// G groups of rows from r0 on, and T tokens from t0 on
template <class W, int G, int T>
inline void packed_tile(const MatmulArgs& a, int64_t r0, int64_t t0) {
    constexpr int kAhead = 4096;  // bytes of weights asked for early
    const int64_t n_blocks = a.k / kBlock;
    const uint8_t* w[G];
    const uint8_t* x[T];
    LaneFloats acc[G][T];
    for (int g = 0; g < G; ++g) w[g] = a.weights + (r0 + g * kLanes) * a.row_bytes;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        x[t] = a.x + (t0 + t) * a.x_row_bytes;
        for (int g = 0; g < G; ++g) acc[g][t] = lanes_of(0.0f);
    }
    XBlock at(a.k);
    for (int64_t b = 0; b < n_blocks; ++b, at.next()) {
        for (int g = 0; g < G; ++g) {
            for (int i = 0; i < W::kBytes; i += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(w[g]) + kAhead + i, _MM_HINT_T0);
            }
        }
        typename W::Sum sums[G][T];
        add_block<W>(w, x, at, sums);
        for (int g = 0; g < G; ++g) {
            const LaneFloats scale = load_lane_halves(w[g]);
            const LaneFloats minimum = W::kHasMinimum ? load_lane_halves(w[g] + 2 * kLanes) : scale;
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const LaneFloats dot = to_floats(sums[g][t].finish(W::start(x[t], at)));
                acc[g][t] = multiply_add(dot, multiply(scale, lanes_of(LoadF32::load1(x[t] + at.scale))), acc[g][t]);
                if (W::kHasMinimum) {
                    const LaneFloats sum = lanes_of(LoadF32::load1(x[t] + at.scaled_sum));
                    acc[g][t] = multiply_add(minimum, sum, acc[g][t]);
                }
            }
            w[g] += W::kBytes;
        }
    }
    for (int t = 0; t < T; ++t) {
        for (int g = 0; g < G; ++g) store_rows(a, r0 + g * kLanes, t0 + t, acc[g][t]);
    }
}

// Rows [r0, r1) and the tokens from t0 on, T at a time, then what is left in smaller tiles.
template <class W, int T>
inline void packed_rows(const MatmulArgs& a, int64_t r0, int64_t r1, int64_t t0) {
    constexpr int64_t kTile = kGroupTile * kLanes;
    for (; t0 + T <= a.n_tokens; t0 += T) {
        int64_t r = r0;
        for (; r + kTile <= r1; r += kTile) packed_tile<W, kGroupTile, T>(a, r, t0);
        for (; r < r1; r += kLanes) packed_tile<W, 1, T>(a, r, t0);
    }
    if constexpr (T > 1) packed_rows<W, T / 2>(a, r0, r1, t0);
}

template <class W>
void matmul_packed(const MatmulArgs& a) {
    for_each_part(a, kLanes, [&](int64_t r0, int64_t r1) { packed_rows<W, kPackedTokens>(a, r0, r1, 0); });
}

}  // namespace

}  // namespace qq
