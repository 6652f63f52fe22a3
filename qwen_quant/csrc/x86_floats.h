// x86: matrix products with weights of 16 and 32 bits, multiplied as floats.
#pragma once

#include "x86_lanes.h"

namespace qq {

namespace {

#ifdef __AVX512VNNI__
constexpr int kFloatRows = 4, kFloatTokens = 6;  // sums, and registers left for what feeds them
#else
constexpr int kFloatRows = 3, kFloatTokens = 4;
#endif

// Rows [r0, r0 + R) and tokens [t0, t0 + T)
template <class W, int R, int T>
inline void tile_floats(const MatmulArgs& a, int64_t r0, int64_t t0) {
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
    for (; i + kLanes <= a.k; i += kLanes) {
        LaneFloats weight[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const uint8_t* p = w[r] + i * W::kBytes;
            if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(p) + ahead, _MM_HINT_T0);
            weight[r] = load_lanes_of(W(), p);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const LaneFloats value = load_lanes_of(LoadF32(), x[t] + i * 4);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[r][t] = multiply_add(weight[r], value, acc[r][t]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            float sum = sum_lanes(eight_lanes(acc[r][t]));
            for (int64_t j = i; j < a.k; ++j) sum += W::load1(w[r] + j * W::kBytes) * LoadF32::load1(x[t] + j * 4);
            a.y[(t0 + t) * a.ldy + r0 + r] = sum;
        }
    }
}

// Rows [r0, r1) and the tokens from t0 on, T at a time, then what is left in smaller tiles.
template <class W, int T>
inline void rows_of_floats(const MatmulArgs& a, int64_t r0, int64_t r1, int64_t t0) {
    // With nothing to share but the activations, more rows in flight hide the latencies.
    constexpr int kRows = T == 1 ? 4 : kFloatRows;
    for (; t0 + T <= a.n_tokens; t0 += T) {
        int64_t r = r0;
        for (; r + kRows <= r1; r += kRows) tile_floats<W, kRows, T>(a, r, t0);
        for (; r < r1; ++r) tile_floats<W, 1, T>(a, r, t0);
    }
    if constexpr (T > 1) rows_of_floats<W, T / 2>(a, r0, r1, t0);
}

template <class W>
void matmul_floats(const MatmulArgs& a) {
    for_each_part(a, kFloatRows, [&](int64_t r0, int64_t r1) { rows_of_floats<W, kFloatTokens>(a, r0, r1, 0); });
}

}  // namespace

}  // namespace qq
