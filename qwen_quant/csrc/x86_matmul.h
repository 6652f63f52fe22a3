// x86: matrix products with blocks of weights as they are stored, and decoding.
#pragma once

#include "x86_blocks.h"

namespace qq {

namespace {

constexpr int kTokenTile = 4;
constexpr int kRowTile = QQ_ROW_TILE;

inline __m256 broadcast_half(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(load_u16(p))));
}

inline __m256i first_lane(int32_t value) { return _mm256_zextsi128_si256(_mm_cvtsi32_si128(value)); }

// Products of unsigned and signed bytes, summed by fours onto `start`.
#ifdef __AVX512VNNI__
inline __m256i dot_unsigned(__m256i start, __m256i u, __m256i s) { return _mm256_dpbusd_epi32(start, u, s); }
#else
// Exact while each sum of two products stays below 2^15.
inline __m256i dot_unsigned(__m256i start, __m256i u, __m256i s) {
    return _mm256_add_epi32(start, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
#endif

// The codes of one block, made ready once and multiplied with the activations of several tokens. The offset of
// unsigned codes is taken off through `start`, which the activations bring along: -kOffset * sum(x) in one lane.
template <bool Unsigned>
struct PreparedBlock {
    __m256i codes;
    PreparedBlock() = default;
    explicit PreparedBlock(__m256i c) : codes(c) {}
    __m256i dot(__m256i start, __m256i x) const { return dot_unsigned(start, codes, x); }
    static __m256i activations(__m256i x) { return x; }
};

#ifdef __AVX512VNNI__
// Signed codes: activations get +128 to become unsigned, and 128 * (sum of codes) is taken off again.
template <>
struct PreparedBlock<false> {
    __m256i codes, offset;
    PreparedBlock() = default;
    explicit PreparedBlock(__m256i c)
        : codes(c),
          offset(_mm256_sub_epi32(_mm256_setzero_si256(),
                                  _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(-128), c))) {}
    __m256i dot(__m256i, __m256i x) const { return _mm256_dpbusd_epi32(offset, x, codes); }
    static __m256i activations(__m256i x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }
};
#else
// Signed codes: |w| * (x with the sign of w); two products reach 2 * 128 * 127 < 2^15.
template <>
struct PreparedBlock<false> {
    __m256i codes, magnitude;
    PreparedBlock() = default;
    explicit PreparedBlock(__m256i c) : codes(c), magnitude(_mm256_abs_epi8(c)) {}
    __m256i dot(__m256i start, __m256i x) const { return dot_unsigned(start, magnitude, _mm256_sign_epi8(x, codes)); }
    static __m256i activations(__m256i x) { return x; }
};
#endif

template <class W, int R, int T>
inline void tile_blocks(const MatmulArgs& a, int64_t r0, int64_t t0) {
    using Prepared = PreparedBlock<W::kUnsigned>;
    const size_t ahead = prefetch_distance(R * a.row_bytes);
    const int64_t n_blocks = a.k / kBlock;
    const Q8Row at = q8_row(a.k);
    const uint8_t* w = a.weights + r0 * a.row_bytes;
    const uint8_t* x = a.x + t0 * a.x_row_bytes;
    __m256 acc[R][T];
    float minimum_sum[R][T];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) {
            acc[r][t] = _mm256_setzero_ps();
            minimum_sum[r][t] = 0;
        }
    }
    for (int64_t b = 0; b < n_blocks; ++b) {
        Prepared block[R];
        __m256 scale[R];
        float minimum[R];
        for (int r = 0; r < R; ++r) {
            const uint8_t* p = w + r * a.row_bytes + b * W::kBytes;
            if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(p) + ahead, _MM_HINT_T0);
            block[r] = Prepared(W::codes(p));
            scale[r] = broadcast_half(p);
            minimum[r] = W::kHasMinimum ? half_scale(p + 2) : 0.0f;
        }
        for (int t = 0; t < T; ++t) {
            const uint8_t* row = x + t * a.x_row_bytes;
            const float* scales = reinterpret_cast<const float*>(row + at.scales);
            const int32_t* sums = reinterpret_cast<const int32_t*>(row + at.half_sums) + 2 * b;
            const __m256i codes =
                Prepared::activations(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + b * kBlock)));
            const __m256i start = W::kOffset == 0 ? _mm256_setzero_si256() : first_lane(-W::kOffset * (sums[0] + sums[1]));
            const __m256 x_scale = _mm256_broadcast_ss(scales + b);
            for (int r = 0; r < R; ++r) {
                const __m256 dot = _mm256_cvtepi32_ps(block[r].dot(start, codes));
                acc[r][t] = _mm256_fmadd_ps(dot, _mm256_mul_ps(scale[r], x_scale), acc[r][t]);
                if (W::kHasMinimum) {
                    minimum_sum[r][t] += minimum[r] * (scales[b] * static_cast<float>(sums[0] + sums[1]));
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) a.y[(t0 + t) * a.ldy + r0 + r] = sum_lanes(acc[r][t]) + minimum_sum[r][t];
    }
}

template <class W, int R>
inline void matmul_row_tile(const MatmulArgs& a, int64_t r) {
    int64_t t = 0;
    for (; t + kTokenTile <= a.n_tokens; t += kTokenTile) tile_blocks<W, R, kTokenTile>(a, r, t);
    for (; t < a.n_tokens; ++t) tile_blocks<W, R, 1>(a, r, t);
}

template <class W>
void matmul_blocks(const MatmulArgs& a) {
    int64_t r = 0;
    if (a.n_tokens == 1) {  // nothing to share but the activations: more rows in flight hide the latencies
        for (; r + 4 <= a.n_rows; r += 4) tile_blocks<W, 4, 1>(a, r, 0);
    }
    for (; r + kRowTile <= a.n_rows; r += kRowTile) matmul_row_tile<W, kRowTile>(a, r);
    for (; r < a.n_rows; ++r) matmul_row_tile<W, 1>(a, r);
}

template <class W>
void dequantize_floats(const uint8_t* data, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, W::load8(data + i * W::kBytes));
    for (; i < n; ++i) out[i] = W::load1(data + i * W::kBytes);
}

template <class W>
void dequantize_blocks(const uint8_t* data, int64_t n, float* out) {
    for (int64_t b = 0; b < n / kBlock; ++b) {
        const uint8_t* p = data + b * W::kBytes;
        alignas(32) int8_t codes[kBlock];
        _mm256_store_si256(reinterpret_cast<__m256i*>(codes),
                           _mm256_sub_epi8(W::codes(p), _mm256_set1_epi8(W::kOffset)));
        const __m256 scale = _mm256_set1_ps(half_scale(p));
        const __m256 minimum = _mm256_set1_ps(W::kHasMinimum ? half_scale(p + 2) : 0.0f);
        for (int i = 0; i < kBlock; i += 8) {
            const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
            const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
            // Not fused: decoded weights are the same numbers on every machine.
            __m256 product = _mm256_mul_ps(scale, value);
            if (W::kHasMinimum) product = _mm256_add_ps(product, minimum);
            _mm256_storeu_ps(out + b * kBlock + i, product);
        }
    }
}

}  // namespace

}  // namespace qq
