// x86: matrix products with packed weights (packed.h). Each lane sums up one row, so nothing is added across lanes,
// and a block of codes is unpacked once for several tokens.
#pragma once

#include "x86_lanes.h"

namespace qq {

namespace {

// How the codes of one block are unpacked and multiplied: weight = scale * dot() + minimum * sum of x.
struct PackedQ8_0 {
    static constexpr int kBytes = 34 * kLanes;
    static constexpr bool kHasMinimum = false;
    static void unpack(const uint8_t* p, LaneInts (&codes)[8]) {
        for (int i = 0; i < 8; ++i) codes[i] = load_codes(p + (2 + 4 * i) * kLanes);
    }
    static LaneInts dot(const LaneInts (&codes)[8], const BlockOfX& x) { return dot_q8_0(codes, x); }
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
    static LaneInts dot(const LaneInts (&codes)[8], const BlockOfX& x) {
        return dot_nibbles(codes, kHasMinimum ? 0 : x.sum_times_minus_8(), x.codes);
    }
};
using PackedQ4_0 = PackedNibbles<1>;
using PackedQ4_1 = PackedNibbles<2>;

// One group of rows and T tokens
template <class W, int T>
inline void packed_tile(const MatmulArgs& a, int64_t r0, int64_t t0) {
    const int64_t n_blocks = a.k / kBlock;
    const uint8_t* w = a.weights + r0 * a.row_bytes;
    const uint8_t* x = a.x + t0 * a.x_row_bytes;
    LaneFloats acc[T];
    for (int t = 0; t < T; ++t) acc[t] = lanes_of(0.0f);
    for (int64_t b = 0; b < n_blocks; ++b, w += W::kBytes) {
        if (T == 1) {
            constexpr int kAhead = 4096;
            for (int i = 0; i < W::kBytes; i += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead + i, _MM_HINT_T0);
            }
        }
        LaneInts codes[8];
        W::unpack(w, codes);
        const LaneFloats scale = load_lane_halves(w);
        const LaneFloats minimum = W::kHasMinimum ? load_lane_halves(w + 2 * kLanes) : scale;
        for (int t = 0; t < T; ++t) {
            const BlockOfX block(x + t * a.x_row_bytes, a.k, b);
            const LaneFloats dot = to_floats(W::dot(codes, block));
            acc[t] = multiply_add(dot, multiply(scale, lanes_of(block.scale())), acc[t]);
            if (W::kHasMinimum) acc[t] = multiply_add(minimum, lanes_of(block.scaled_sum()), acc[t]);
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

// Tokens from t0 on, T at a time, then what is left in smaller tiles.
template <class W, int T>
inline void packed_tokens(const MatmulArgs& a, int64_t r0, int64_t t0) {
    for (; t0 + T <= a.n_tokens; t0 += T) packed_tile<W, T>(a, r0, t0);
    if constexpr (T > 1) packed_tokens<W, T / 2>(a, r0, t0);
}

template <class W>
void matmul_packed(const MatmulArgs& a) {
    for (int64_t r = 0; r < a.n_rows; r += kLanes) packed_tokens<W, kPackedTokens>(a, r, 0);
}

}  // namespace

}  // namespace qq
