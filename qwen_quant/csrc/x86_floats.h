// x86: matrix products with weights of 16 and 32 bits, multiplied as floats.
#pragma once

#include "x86_lanes.h"

namespace qq {

namespace {

// How a type is multiplied: kStep weights of a row at a time, in tiles of kRows and kTokens.
template <class W>
struct AsFloats {
    using Stored = W;
    using Weights = LaneFloats;
    using Values = LaneFloats;
    static constexpr int kStep = kLanes;
#ifdef __AVX512VNNI__
    static constexpr int kRows = 4, kTokens = 6;  // sums, and registers left for what feeds them
#else
    static constexpr int kRows = 3, kTokens = 4;
#endif
    static Weights weights(const uint8_t* p) { return load_lanes_of(W(), p); }
    static Values values(const uint8_t* x) { return load_lanes_of(LoadF32(), x); }
    static float value(const uint8_t* x) { return LoadF32::load1(x); }
    static LaneFloats add(Weights w, Values x, LaneFloats sum) { return multiply_add(w, x, sum); }
};

// Rows [r0, r0 + R) and tokens [t0, t0 + T)
template <class P, int R, int T>
inline void tile_floats(const MatmulArgs& a, int64_t r0, int64_t t0) {
    using W = typename P::Stored;
    const size_t ahead = prefetch_distance(R * a.row_bytes);
    const uint8_t* w[R];
    const uint8_t* x[T];
    LaneFloats acc[R][T];
#pragma GCC unroll 8  // here and below: or the sums would be kept in memory
    for (int t = 0; t < T; ++t) x[t] = a.x + (t0 + t) * a.x_row_bytes;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        w[r] = a.weights + (r0 + r) * a.row_bytes;
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[r][t] = lanes_of(0.0f);
    }
    int64_t i = 0;
    for (; i + P::kStep <= a.k; i += P::kStep) {
        typename P::Weights weight[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const uint8_t* p = w[r] + i * W::kBytes;
            if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(p) + ahead, _MM_HINT_T0);
            weight[r] = P::weights(p);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const typename P::Values value = P::values(x[t] + i * 4);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r][t] = P::add(weight[r], value, acc[r][t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            float sum = sum_lanes(eight_lanes(acc[r][t]));
            for (int64_t j = i; j < a.k; ++j) sum += W::load1(w[r] + j * W::kBytes) * P::value(x[t] + j * 4);
            a.y[(t0 + t) * a.ldy + r0 + r] = sum;
        }
    }
}

// Rows [r0, r1) and the tokens from t0 on, T at a time, then what is left in smaller tiles.
template <class P, int T>
inline void rows_of_floats(const MatmulArgs& a, int64_t r0, int64_t r1, int64_t t0) {
    // With nothing to share but the activations, more rows in flight hide the latencies.
    constexpr int kRows = T == 1 ? 4 : P::kRows;
    for (; t0 + T <= a.n_tokens; t0 += T) {
        int64_t r = r0;
        for (; r + kRows <= r1; r += kRows) tile_floats<P, kRows, T>(a, r, t0);
        for (; r < r1; ++r) tile_floats<P, 1, T>(a, r, t0);
    }
    if constexpr (T > 1) rows_of_floats<P, T / 2>(a, r0, r1, t0);
}

template <class P>
void matmul_floats(const MatmulArgs& a) {
    for_each_part(a, P::kRows, [&](int64_t r0, int64_t r1) { rows_of_floats<P, P::kTokens>(a, r0, r1, 0); });
}

}  // namespace

}  // namespace qq
