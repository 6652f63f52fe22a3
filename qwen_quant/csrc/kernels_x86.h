// The x86 kernels. Included by one file per instruction set, which sets QQ_ISA_NAME and QQ_ROW_TILE and is compiled
// with that set's flags; everything is in an unnamed namespace so that no two sets share a function.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "half.h"
#include "kernels.h"

namespace qq {

namespace {

constexpr int kTokenTile = 4;
constexpr int kRowTile = QQ_ROW_TILE;

inline float sum_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline float max_lanes(__m256 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline __m256 load_half8(const void* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

inline float half_scale(const uint8_t* p) { return _cvtsh_ss(load_u16(p)); }

inline __m256 broadcast_half(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(load_u16(p))));
}

inline __m256i first_lane(int32_t value) { return _mm256_zextsi128_si256(_mm_cvtsi32_si128(value)); }

// exp(x): 2^n * p(r) with r = x - n ln 2 in [-ln2/2, ln2/2] and p the Taylor polynomial of degree 7,
// whose relative error there is below 1e-8. NaN passes through (max/min return their second operand).
inline __m256 exp8(__m256 x) {
    x = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_max_ps(_mm256_set1_ps(-87.3f), x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.0f / 5040);
    constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (const float c : kTaylor) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
}

// ---- weights ----------------------------------------------------------------------------------------------------

struct LoadF32 {
    static constexpr int kBytes = 4;
    static __m256 load8(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
    static float load1(const uint8_t* p) {
        float value;
        std::memcpy(&value, p, sizeof value);
        return value;
    }
};

struct LoadF16 {
    static constexpr int kBytes = 2;
    static __m256 load8(const uint8_t* p) { return load_half8(p); }
    static float load1(const uint8_t* p) { return half_scale(p); }
};

struct LoadBF16 {
    static constexpr int kBytes = 2;
    static __m256 load8(const uint8_t* p) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    }
    static float load1(const uint8_t* p) { return bf16_to_float(load_u16(p)); }
};

inline __m256i nibbles(const uint8_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(raw), _mm_srli_epi16(raw, 4), 1);
    return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

// How 32 weights lie in a block: weight = scale * (code - kOffset) + minimum.
struct BlockQ8_0 {
    static constexpr int kBytes = 34;
    static constexpr int kOffset = 0;
    static constexpr bool kUnsigned = false, kHasMinimum = false;
    static __m256i codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 2)); }
};

struct BlockQ4_0 {
    static constexpr int kBytes = 18;
    static constexpr int kOffset = 8;
    static constexpr bool kUnsigned = true, kHasMinimum = false;
    static __m256i codes(const uint8_t* p) { return nibbles(p + 2); }
};

struct BlockQ4_1 {
    static constexpr int kBytes = 20;
    static constexpr int kOffset = 0;
    static constexpr bool kUnsigned = true, kHasMinimum = true;
    static __m256i codes(const uint8_t* p) { return nibbles(p + 4); }
};

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

// ---- matrix products --------------------------------------------------------------------------------------------

// A tile of rows is one stretch of memory read as several streams, too short for the hardware to foresee; so each
// asks for the same place some tiles on.
inline size_t prefetch_distance(size_t tile_bytes) {
    constexpr size_t kAhead = 2048;
    return (kAhead + tile_bytes - 1) / tile_bytes * tile_bytes;
}

template <class W, int R, int T>
inline void tile_blocks(const MatmulArgs& a, int64_t r0, int64_t t0) {
    using Prepared = PreparedBlock<W::kUnsigned>;
    const size_t ahead = prefetch_distance(R * a.row_bytes);
    const int64_t n_blocks = a.k / kBlock;
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
            const float* scales = reinterpret_cast<const float*>(row + a.k);
            const int32_t* sums = reinterpret_cast<const int32_t*>(scales + n_blocks);
            const __m256i codes =
                Prepared::activations(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + b * kBlock)));
            const __m256i start = W::kOffset == 0 ? _mm256_setzero_si256() : first_lane(-W::kOffset * sums[b]);
            const __m256 x_scale = _mm256_broadcast_ss(scales + b);
            for (int r = 0; r < R; ++r) {
                const __m256 dot = _mm256_cvtepi32_ps(block[r].dot(start, codes));
                acc[r][t] = _mm256_fmadd_ps(dot, _mm256_mul_ps(scale[r], x_scale), acc[r][t]);
                if (W::kHasMinimum) minimum_sum[r][t] += minimum[r] * (scales[b] * static_cast<float>(sums[b]));
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) a.y[(t0 + t) * a.ldy + r0 + r] = sum_lanes(acc[r][t]) + minimum_sum[r][t];
    }
}

template <class W, int R, int T>
inline void tile_floats(const MatmulArgs& a, int64_t r0, int64_t t0) {
    const size_t ahead = prefetch_distance(R * a.row_bytes);
    const uint8_t* w = a.weights + r0 * a.row_bytes;
    const uint8_t* x = a.x + t0 * a.x_row_bytes;
    __m256 acc[R][T];
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) acc[r][t] = _mm256_setzero_ps();
    }
    int64_t i = 0;
    for (; i + 8 <= a.k; i += 8) {
        __m256 weight[R];
        for (int r = 0; r < R; ++r) {
            const uint8_t* p = w + r * a.row_bytes + i * W::kBytes;
            if (T == 1) _mm_prefetch(reinterpret_cast<const char*>(p) + ahead, _MM_HINT_T0);
            weight[r] = W::load8(p);
        }
        for (int t = 0; t < T; ++t) {
            const __m256 value = LoadF32::load8(x + t * a.x_row_bytes + i * 4);
            for (int r = 0; r < R; ++r) acc[r][t] = _mm256_fmadd_ps(weight[r], value, acc[r][t]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < T; ++t) {
            float sum = sum_lanes(acc[r][t]);
            for (int64_t j = i; j < a.k; ++j) {
                sum += W::load1(w + r * a.row_bytes + j * W::kBytes) * LoadF32::load1(x + t * a.x_row_bytes + j * 4);
            }
            a.y[(t0 + t) * a.ldy + r0 + r] = sum;
        }
    }
}

template <class W>
struct Blocks {
    template <int R, int T>
    static void tile(const MatmulArgs& a, int64_t r, int64_t t) { tile_blocks<W, R, T>(a, r, t); }
};

template <class W>
struct Floats {
    template <int R, int T>
    static void tile(const MatmulArgs& a, int64_t r, int64_t t) { tile_floats<W, R, T>(a, r, t); }
};

template <class Tiles, int R>
inline void matmul_row_tile(const MatmulArgs& a, int64_t r) {
    int64_t t = 0;
    for (; t + kTokenTile <= a.n_tokens; t += kTokenTile) Tiles::template tile<R, kTokenTile>(a, r, t);
    for (; t < a.n_tokens; ++t) Tiles::template tile<R, 1>(a, r, t);
}

template <class Tiles>
void matmul(const MatmulArgs& a) {
    int64_t r = 0;
    if (a.n_tokens == 1) {  // nothing to share but the activations: more rows in flight hide the latencies
        for (; r + 4 <= a.n_rows; r += 4) Tiles::template tile<4, 1>(a, r, 0);
    }
    for (; r + kRowTile <= a.n_rows; r += kRowTile) matmul_row_tile<Tiles, kRowTile>(a, r);
    for (; r < a.n_rows; ++r) matmul_row_tile<Tiles, 1>(a, r);
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

void quantize_row(const float* x, int64_t k, uint8_t* out) {
    const int64_t n_blocks = k / kBlock;
    float* scales = reinterpret_cast<float*>(out + k);
    int32_t* sums = reinterpret_cast<int32_t*>(scales + n_blocks);
    const __m256i magnitude_mask = _mm256_set1_epi32(0x7fffffff);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the 128-bit halves of the packs
    for (int64_t b = 0; b < n_blocks; ++b) {
        __m256 v[4];
        __m256i bits = _mm256_setzero_si256();  // compared as integers, NaN is larger than every number
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm256_loadu_ps(x + b * kBlock + i * 8);
            bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude_mask));
        }
        __m128i m = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
        m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
        const float largest = _mm_cvtss_f32(_mm_castsi128_ps(m));
        const __m256 inverse = _mm256_set1_ps(largest > 1e-30f ? 127.0f / largest : 0.0f);
        __m256i q[4], sum = _mm256_setzero_si256();
        for (int i = 0; i < 4; ++i) {
            q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
            sum = _mm256_add_epi32(sum, q[i]);
        }
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + b * kBlock),
                            _mm256_permutevar8x32_epi32(packed, order));
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
        scales[b] = largest <= 3.4e38f ? largest / 127.0f : NAN;
        sums[b] = _mm_cvtsi128_si32(s);
    }
}

// ---- elementwise ------------------------------------------------------------------------------------------------

float rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    __m256 a = _mm256_setzero_ps(), b = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m256 u = _mm256_loadu_ps(x + i), v = _mm256_loadu_ps(x + i + 8);
        a = _mm256_fmadd_ps(u, u, a);
        b = _mm256_fmadd_ps(v, v, b);
    }
    float sum = sum_lanes(_mm256_add_ps(a, b));
    for (; i < n; ++i) sum += x[i] * x[i];
    const float mean = sum / static_cast<float>(n);
    const float scale = 1.0f / sqrtf(mean + eps);
    for (i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
    return mean;
}

void rope(float* x, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

void swiglu(float* gate, const float* up, int64_t n) {
    int64_t i = 0;
    const __m256 one = _mm256_set1_ps(1.0f);
    for (; i + 8 <= n; i += 8) {
        const __m256 g = _mm256_loadu_ps(gate + i);
        const __m256 denominator = _mm256_add_ps(one, exp8(_mm256_sub_ps(_mm256_setzero_ps(), g)));
        _mm256_storeu_ps(gate + i, _mm256_mul_ps(_mm256_div_ps(g, denominator), _mm256_loadu_ps(up + i)));
    }
    for (; i < n; ++i) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

void add(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

void to_half(const float* x, int64_t n, uint16_t* out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < n; ++i) out[i] = float_to_half(x[i]);
}

// ---- attention --------------------------------------------------------------------------------------------------

template <int Q>
inline void scores_tile(const float* q, const uint16_t* keys, int64_t n_keys, int64_t dim, float* scores,
                        int64_t ld_scores) {
    for (int64_t j = 0; j < n_keys; ++j) {
        const uint16_t* key = keys + j * dim;
        __m256 acc[Q];
        for (int i = 0; i < Q; ++i) acc[i] = _mm256_setzero_ps();
        int64_t d = 0;
        for (; d + 8 <= dim; d += 8) {
            const __m256 k = load_half8(key + d);
            for (int i = 0; i < Q; ++i) acc[i] = _mm256_fmadd_ps(k, _mm256_loadu_ps(q + i * dim + d), acc[i]);
        }
        for (int i = 0; i < Q; ++i) {
            float sum = sum_lanes(acc[i]);
            for (int64_t e = d; e < dim; ++e) sum += q[i * dim + e] * half_to_float(key[e]);
            scores[i * ld_scores + j] = sum;
        }
    }
}

void attend_scores(const float* q, int64_t n_q, const uint16_t* keys, int64_t n_keys, int64_t dim, float* scores,
                   int64_t ld) {
    int64_t i = 0;
    for (; i + 4 <= n_q; i += 4) scores_tile<4>(q + i * dim, keys, n_keys, dim, scores + i * ld, ld);
    for (; i + 2 <= n_q; i += 2) scores_tile<2>(q + i * dim, keys, n_keys, dim, scores + i * ld, ld);
    for (; i < n_q; ++i) scores_tile<1>(q + i * dim, keys, n_keys, dim, scores + i * ld, ld);
}

float softmax_block(float* scores, int64_t valid, int64_t n, float* running_max, float* running_sum) {
    int64_t i = 0;
    __m256 top = _mm256_set1_ps(*running_max);
    for (; i + 8 <= valid; i += 8) top = _mm256_max_ps(top, _mm256_loadu_ps(scores + i));
    float largest = max_lanes(top);
    for (; i < valid; ++i) largest = scores[i] > largest ? scores[i] : largest;
    // Masked scores count as minus infinity, so that whole vectors can be taken; exp8 would leave them above zero.
    const __m256 shift = _mm256_set1_ps(largest);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256 sum = _mm256_setzero_ps();
    for (i = 0; i < n; i += 8) {
        const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(valid - i)), lane);
        const __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(scores + i), shift));
        const __m256 kept = _mm256_and_ps(e, _mm256_castsi256_ps(inside));
        sum = _mm256_add_ps(sum, kept);
        _mm256_storeu_ps(scores + i, kept);
    }
    const float rescale = valid > 0 ? expf(*running_max - largest) : 1.0f;
    *running_max = largest;
    *running_sum = *running_sum * rescale + sum_lanes(sum);
    return rescale;
}

template <int Q>
inline void values_tile(const float* p, int64_t ld_p, const float* rescale, const uint16_t* values, int64_t n_keys,
                        int64_t dim, float* acc) {
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) {
        __m256 low[Q], high[Q];
        for (int i = 0; i < Q; ++i) {
            const __m256 factor = _mm256_set1_ps(rescale[i]);
            low[i] = _mm256_mul_ps(_mm256_loadu_ps(acc + i * dim + d), factor);
            high[i] = _mm256_mul_ps(_mm256_loadu_ps(acc + i * dim + d + 8), factor);
        }
        for (int64_t j = 0; j < n_keys; ++j) {
            const __m256 a = load_half8(values + j * dim + d), b = load_half8(values + j * dim + d + 8);
            for (int i = 0; i < Q; ++i) {
                const __m256 weight = _mm256_broadcast_ss(p + i * ld_p + j);
                low[i] = _mm256_fmadd_ps(weight, a, low[i]);
                high[i] = _mm256_fmadd_ps(weight, b, high[i]);
            }
        }
        for (int i = 0; i < Q; ++i) {
            _mm256_storeu_ps(acc + i * dim + d, low[i]);
            _mm256_storeu_ps(acc + i * dim + d + 8, high[i]);
        }
    }
    for (; d < dim; ++d) {
        for (int i = 0; i < Q; ++i) {
            float sum = acc[i * dim + d] * rescale[i];
            for (int64_t j = 0; j < n_keys; ++j) sum += p[i * ld_p + j] * half_to_float(values[j * dim + d]);
            acc[i * dim + d] = sum;
        }
    }
}

void attend_values(const float* p, int64_t ld_p, const float* rescale, int64_t n_q, const uint16_t* values,
                   int64_t n_keys, int64_t dim, float* acc) {
    int64_t i = 0;
    for (; i + 4 <= n_q; i += 4) {
        values_tile<4>(p + i * ld_p, ld_p, rescale + i, values, n_keys, dim, acc + i * dim);
    }
    for (; i + 2 <= n_q; i += 2) {
        values_tile<2>(p + i * ld_p, ld_p, rescale + i, values, n_keys, dim, acc + i * dim);
    }
    for (; i < n_q; ++i) values_tile<1>(p + i * ld_p, ld_p, rescale + i, values, n_keys, dim, acc + i * dim);
}

Kernels make_table() {
    Kernels k{};
    k.isa = QQ_ISA_NAME;
    k.types[kF32] = {matmul<Floats<LoadF32>>, dequantize_floats<LoadF32>, false};
    k.types[kF16] = {matmul<Floats<LoadF16>>, dequantize_floats<LoadF16>, false};
    k.types[kBF16] = {matmul<Floats<LoadBF16>>, dequantize_floats<LoadBF16>, false};
    k.types[kQ8_0] = {matmul<Blocks<BlockQ8_0>>, dequantize_blocks<BlockQ8_0>, true};
    k.types[kQ4_0] = {matmul<Blocks<BlockQ4_0>>, dequantize_blocks<BlockQ4_0>, true};
    k.types[kQ4_1] = {matmul<Blocks<BlockQ4_1>>, dequantize_blocks<BlockQ4_1>, true};
    k.quantize_row = quantize_row;
    k.rms_norm = rms_norm;
    k.rope = rope;
    k.swiglu = swiglu;
    k.add = add;
    k.to_half = to_half;
    k.attend_scores = attend_scores;
    k.softmax_block = softmax_block;
    k.attend_values = attend_values;
    return k;
}

}  // namespace

}  // namespace qq
