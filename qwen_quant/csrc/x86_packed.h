// x86: matrix products with packed weights (packed.h). Each lane sums up one row, so nothing is added across lanes,
// and a block of codes is unpacked once for several tokens.
#pragma once

#include "x86_lanes.h"

namespace qq {

namespace {

// How the codes of one block are unpacked and multiplied: a product is scale * (start + dots) + minimum * sum of x.
struct PackedQ8_0 {
    static constexpr int kBytes = 34 * kLanes;
    static constexpr bool kHasMinimum = false;
    static void unpack(const uint8_t* p, LaneInts (&codes)[8]) {
        for (int i = 0; i < 8; ++i) codes[i] = load_codes(p + (2 + 4 * i) * kLanes);
    }
    static int32_t start(const uint8_t* x, const XBlock& at) { return start_of_q8_0(x, at); }
    template <int T>
    static void add_dots(const LaneInts (&codes)[8], const uint8_t* const (&x)[T], int64_t at, LaneInts (&sums)[T]) {
        add_q8_0_dots(codes, x, at, sums);
    }
};

template <int Halves>
struct PackedNibbles {
    static constexpr int kBytes = (2 * Halves + 16) * kLanes;
    static constexpr bool kHasMinimum = Halves == 2;
    static void unpack(const uint8_t* p, LaneInts (&codes)[8]) {
        for (int i = 0; i < 4; ++i) {
            const LaneInts both = load_codes(p + (2 * Halves + 4 * i) * kLanes);
            codes[i] = low_nibbles(both);
            codes[i + 4] = high_nibbles(both);
        }
    }
    static int32_t start(const uint8_t* x, const XBlock& at) { return kHasMinimum ? 0 : load_i32(x + at.minus_8); }
    template <int T>
    static void add_dots(const LaneInts (&codes)[8], const uint8_t* const (&x)[T], int64_t at, LaneInts (&sums)[T]) {
        add_nibble_dots(codes, x, at, sums);
    }
};
using PackedQ4_0 = PackedNibbles<1>;
using PackedQ4_1 = PackedNibbles<2>;

// One group of rows and T tokens
template <class W, int T>
inline void packed_tile(const MatmulArgs& a, int64_t r0, int64_t t0) {
    constexpr int kAhead = 4096;  // bytes of weights asked for early
    const int64_t n_blocks = a.k / kBlock;
    const uint8_t* w = a.weights + r0 * a.row_bytes;
    const uint8_t* x[T];
    LaneFloats acc[T];
    for (int t = 0; t < T; ++t) {
        x[t] = a.x + (t0 + t) * a.x_row_bytes;
        acc[t] = lanes_of(0.0f);
    }
    XBlock at(a.k);
    for (int64_t b = 0; b < n_blocks; ++b, w += W::kBytes, at.next()) {
        for (int i = 0; i < W::kBytes; i += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead + i, _MM_HINT_T0);
        }
        LaneInts codes[8];
        W::unpack(w, codes);
        const LaneFloats scale = load_lane_halves(w);
        const LaneFloats minimum = W::kHasMinimum ? load_lane_halves(w + 2 * kLanes) : scale;
        LaneInts sums[T];
#pragma GCC unroll 8  // or the sums would be kept in memory
        for (int t = 0; t < T; ++t) sums[t] = int_lanes_of(W::start(x[t], at));
        W::add_dots(codes, x, at.codes, sums);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            acc[t] = multiply_add(to_floats(sums[t]), multiply(scale, lanes_of(LoadF32::load1(x[t] + at.scale))), acc[t]);
            if (W::kHasMinimum) {
                acc[t] = multiply_add(minimum, lanes_of(LoadF32::load1(x[t] + at.scaled_sum)), acc[t]);
            }
        }
    }
    for (int t = 0; t < T; ++t) {
        float* y = a.y + (t0 + t) * a.ldy + r0;
        if (a.n_rows - r0 >= kLanes) {
            store_lanes(y, acc[t]);
        } else {
            float rows[kLanes];
            store_lanes(rows, acc[t]);
            std::memcpy(y, rows, static_cast<size_t>(a.n_rows - r0) * sizeof(float));
        }
    }
}

// Rows [r0, r1) and the tokens from t0 on, T at a time, then what is left in smaller tiles.
template <class W, int T>
inline void packed_rows(const MatmulArgs& a, int64_t r0, int64_t r1, int64_t t0) {
    for (; t0 + T <= a.n_tokens; t0 += T) {
        for (int64_t r = r0; r < r1; r += kLanes) packed_tile<W, T>(a, r, t0);
    }
    if constexpr (T > 1) packed_rows<W, T / 2>(a, r0, r1, t0);
}

// Weights are taken in parts that stay in the second-level cache while all tokens pass by; the activations of one tile
// stay in the first-level cache while these rows pass by.
template <class W>
void matmul_packed(const MatmulArgs& a) {
    constexpr int64_t kPart = 256 << 10;
    const int64_t group = kLanes * static_cast<int64_t>(a.row_bytes);
    const int64_t step = (kPart + group - 1) / group * kLanes;
    for (int64_t r = 0; r < a.n_rows; r += step) {
        packed_rows<W, kPackedTokens>(a, r, r + step < a.n_rows ? r + step : a.n_rows, 0);
    }
}

}  // namespace

}  // namespace qq
