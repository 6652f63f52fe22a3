// x86: attention over one block of a quantized cache. Codes are widened to 16 bits and multiplied with queries or
// probabilities of 16 bits, two products to a lane; a lane is a key, or a channel of the values.
#pragma once

#include "kv_store.h"
#include "x86_lanes.h"

namespace qq {

namespace {

constexpr int kVectors = 16 / kLanes;  // for 16 keys, or 16 channels

#ifdef __AVX512VNNI__
inline LaneInts zero_sums() { return _mm512_setzero_si512(); }
inline LaneInts add_products(LaneInts sum, LaneInts a, LaneInts b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline LaneInts widened(const uint8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <int Shift>
inline LaneInts nibbles_at(LaneInts words) {
    return _mm512_and_si512(_mm512_srli_epi16(words, Shift), _mm512_set1_epi16(15));
}
inline LaneFloats lane_scales(const uint8_t* p) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(bytes, _mm512_set1_epi32(kScaleLowest)), kScaleShift));
}
inline LaneFloats subtract(LaneFloats a, LaneFloats b) { return _mm512_sub_ps(a, b); }
inline LaneFloats load_first(const float* p, int64_t n) {
    return n >= kLanes ? load_lanes(p) : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
inline LaneInts rounded(LaneFloats x) { return _mm512_cvtps_epi32(x); }
inline LaneInts add_ints(LaneInts a, LaneInts b) { return _mm512_add_epi32(a, b); }
inline LaneInts larger_bits(LaneInts a, LaneFloats b) { return _mm512_max_epi32(a, _mm512_castps_si512(b)); }
inline __m256i largest_of_halves(LaneInts x) {
    return _mm256_max_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
}
inline void store_shorts(int16_t* p, LaneInts x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(x));
}
#else
inline LaneInts zero_sums() { return _mm256_setzero_si256(); }
inline LaneInts add_products(LaneInts sum, LaneInts a, LaneInts b) {
    return in_this_order(_mm256_add_epi32(sum, _mm256_madd_epi16(a, b)));
}
inline LaneInts widened(const uint8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int Shift>
inline LaneInts nibbles_at(LaneInts words) {
    return _mm256_and_si256(_mm256_srli_epi16(words, Shift), _mm256_set1_epi16(15));
}
inline LaneFloats lane_scales(const uint8_t* p) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(bytes, _mm256_set1_epi32(kScaleLowest)), kScaleShift));
}
inline LaneFloats subtract(LaneFloats a, LaneFloats b) { return _mm256_sub_ps(a, b); }
inline LaneFloats load_first(const float* p, int64_t) { return load_lanes(p); }
inline LaneInts rounded(LaneFloats x) { return _mm256_cvtps_epi32(x); }
inline LaneInts add_ints(LaneInts a, LaneInts b) { return _mm256_add_epi32(a, b); }
inline LaneInts larger_bits(LaneInts a, LaneFloats b) { return _mm256_max_epi32(a, _mm256_castps_si256(b)); }
inline __m256i largest_of_halves(LaneInts x) { return x; }
inline void store_shorts(int16_t* p, LaneInts x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
#endif

inline int32_t largest_lane(LaneInts x) {
    const __m256i y = largest_of_halves(x);
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}

// Asks for the i-th of `parts` parts of the codes that are wanted next, if any are.
template <KvType T>
inline void ask_ahead(const KvTokens& tokens, int64_t i, int64_t parts) {
    if (!tokens.ahead) return;
    const int64_t bytes = static_cast<int64_t>(kv_codes_at(T, tokens.dim, tokens.n));
    for (int64_t at = bytes * i / parts & ~int64_t{63}; at < bytes * (i + 1) / parts; at += 64) {
        prefetch(tokens.ahead + at);
    }
}

inline LaneInts two_codes(const int16_t* p) { return four_of_x(reinterpret_cast<const uint8_t*>(p)); }

// sums [Q][kVectors] += products of a tile's codes with the pairs of 16-bit numbers at x[q]. A tile is 16 lanes wide and
// 2 (int8) or 8 (int4) codes deep.
template <int Q>
inline void add_tile(KvType type, const uint8_t* tile, const int16_t* const (&x)[Q], int64_t at,
                     LaneInts (&sums)[Q * kVectors]) {
    LaneInts codes[kVectors];
    const auto multiply_in = [&](int64_t offset) {
#pragma GCC unroll 8  // here and below: or the sums would be kept in memory
        for (int q = 0; q < Q; ++q) {
            const LaneInts pair = two_codes(x[q] + at + offset);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                sums[q * kVectors + v] = add_products(sums[q * kVectors + v], codes[v], pair);
            }
        }
    };
    if (type == KvType::kInt8) {
        for (int v = 0; v < kVectors; ++v) codes[v] = widened(tile + v * 2 * kLanes);
        multiply_in(0);
        return;
    }
    LaneInts words[kVectors];
    for (int v = 0; v < kVectors; ++v) words[v] = load_codes(tile + v * 4 * kLanes);
    for (int v = 0; v < kVectors; ++v) codes[v] = nibbles_at<0>(words[v]);
    multiply_in(0);
    for (int v = 0; v < kVectors; ++v) codes[v] = nibbles_at<4>(words[v]);
    multiply_in(2);
    for (int v = 0; v < kVectors; ++v) codes[v] = nibbles_at<8>(words[v]);
    multiply_in(4);
    for (int v = 0; v < kVectors; ++v) codes[v] = nibbles_at<12>(words[v]);
    multiply_in(6);
}

constexpr int64_t tile_depth(KvType type) { return type == KvType::kInt8 ? 2 : 8; }
constexpr int64_t tile_bytes(KvType type) { return type == KvType::kInt8 ? 32 : 64; }

template <KvType T, int Q>
QQ_ALONE void kv_scores_of(const KvQueries& q, int64_t row, const KvTokens& keys, float* scores, int64_t ld) {
    const int64_t n_groups = keys.dim / kKvGroup, n_tiles = (keys.n + 15) / 16;
    const int16_t* x[Q];
    for (int i = 0; i < Q; ++i) x[i] = q.codes + (row + i) * keys.dim;
    const uint8_t* tile = keys.codes;
    for (int64_t at = 0; at < n_tiles; ++at) {
        const int64_t key = 16 * at;
        LaneFloats total[Q * kVectors];
#pragma GCC unroll 8
        for (int i = 0; i < Q * kVectors; ++i) total[i] = lanes_of(0.0f);
        for (int64_t g = 0; g < n_groups; ++g) {
            ask_ahead<T>(keys, at * n_groups + g, n_tiles * n_groups);
            LaneInts sums[Q * kVectors];
#pragma GCC unroll 8
            for (int i = 0; i < Q * kVectors; ++i) sums[i] = zero_sums();
            for (int64_t c = g * kKvGroup; c < (g + 1) * kKvGroup; c += tile_depth(T), tile += tile_bytes(T)) {
                add_tile<Q>(T, tile, x, c, sums);
            }
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                const LaneFloats scale = lane_scales(keys.scales + g * kKvPage + key + v * kLanes);
#pragma GCC unroll 8
                for (int i = 0; i < Q; ++i) {
                    const LaneFloats offset = lanes_of(q.offsets[(row + i) * n_groups + g]);
                    LaneFloats& sum = total[i * kVectors + v];
                    sum = multiply_add(subtract(to_floats(sums[i * kVectors + v]), offset), scale, sum);
                }
            }
        }
        for (int i = 0; i < Q; ++i) {
            const LaneFloats scale = lanes_of(q.scales[row + i]);
            float* out = scores + (row + i) * ld + key;
            for (int v = 0; v < kVectors; ++v) store_lanes(out + v * kLanes, multiply(total[i * kVectors + v], scale));
        }
    }
}

template <KvType T>
void kv_scores(const KvQueries& q, int64_t n_q, const KvTokens& keys, float* scores, int64_t ld) {
    int64_t row = 0;
    for (; row + 4 <= n_q; row += 4) kv_scores_of<T, 4>(q, row, keys, scores, ld);
    for (; row + 2 <= n_q; row += 2) kv_scores_of<T, 2>(q, row, keys, scores, ld);
    for (; row < n_q; ++row) kv_scores_of<T, 1>(q, row, keys, scores, ld);
}

// Probabilities of up to kKvBlock tokens times the tokens' scales for one group of channels, as int16 codes.
struct ScaledCodes {
    alignas(64) int16_t codes[kKvBlock];
    LaneFloats scale, offset;

    // n is a multiple of 8.
    void set(const float* probabilities, const float* token_scales, int64_t n, float middle) {
        LaneFloats products[kKvBlock / kLanes];
        LaneInts top = zero_sums();  // compared as integers, NaN is larger than every number
        for (int64_t j = 0; j < n; j += kLanes) {
            products[j / kLanes] = multiply(load_first(probabilities + j, n - j), load_lanes(token_scales + j));
            top = larger_bits(top, products[j / kLanes]);
        }
        const float largest = bits_to_float(static_cast<uint32_t>(largest_lane(top)));
        const LaneFloats inverse = lanes_of(largest > 1e-30f ? 32767.0f / largest : 0.0f);
        LaneInts sum = zero_sums();
        for (int64_t j = 0; j < n; j += kLanes) {
            const LaneInts code = rounded(multiply(products[j / kLanes], inverse));
            sum = add_ints(sum, code);
            store_shorts(codes + j, code);
        }
        scale = lanes_of(largest / 32767.0f);  // NaN stays NaN
        offset = lanes_of(middle == 0 ? 0.0f : middle * sum_lanes(eight_lanes(to_floats(sum))));
    }
};

template <KvType T, int Q>
QQ_ALONE void kv_values_of(const float* p, int64_t ld, const float* rescale, const KvTokens& values, float* acc) {
    const int64_t n = (values.n + 7) / 8 * 8, n_groups = values.dim / kKvGroup;
    const int64_t run = T == KvType::kInt8 ? 2 : 8;  // tokens that lie side by side
    const float middle = T == KvType::kInt8 ? 0.0f : kInt4Middle;
    alignas(64) float scales[kKvBlock];
    ScaledCodes scaled[Q];
    const int16_t* x[Q];
    for (int i = 0; i < Q; ++i) x[i] = scaled[i].codes;
    for (int64_t g = 0; g < n_groups; ++g) {
        for (int64_t j = 0; j < n; j += kLanes) store_lanes(scales + j, lane_scales(values.scales + g * kKvPage + j));
        for (int i = 0; i < Q; ++i) scaled[i].set(p + i * ld, scales, n, middle);
        for (int64_t d = g * kKvGroup; d < (g + 1) * kKvGroup; d += 16) {
            ask_ahead<T>(values, d / 16, values.dim / 16);
            LaneInts sums[Q * kVectors];
#pragma GCC unroll 8
            for (int i = 0; i < Q * kVectors; ++i) sums[i] = zero_sums();
            const uint8_t* tile = values.codes + d * tile_bytes(T) / 16;
            for (int64_t j = 0; j < n; j += run, tile += values.dim * tile_bytes(T) / 16) add_tile<Q>(T, tile, x, j, sums);
#pragma GCC unroll 8
            for (int i = 0; i < Q; ++i) {
                const LaneFloats before = lanes_of(rescale[i]);
                for (int v = 0; v < kVectors; ++v) {
                    float* out = acc + i * values.dim + d + v * kLanes;
                    const LaneFloats sum = subtract(to_floats(sums[i * kVectors + v]), scaled[i].offset);
                    store_lanes(out, multiply_add(sum, scaled[i].scale, multiply(load_lanes(out), before)));
                }
            }
        }
    }
}

template <KvType T>
void kv_values(const float* p, int64_t ld, const float* rescale, int64_t n_q, const KvTokens& values, float* acc) {
    int64_t i = 0;
    for (; i + 4 <= n_q; i += 4) kv_values_of<T, 4>(p + i * ld, ld, rescale + i, values, acc + i * values.dim);
    for (; i + 2 <= n_q; i += 2) kv_values_of<T, 2>(p + i * ld, ld, rescale + i, values, acc + i * values.dim);
    for (; i < n_q; ++i) kv_values_of<T, 1>(p + i * ld, ld, rescale + i, values, acc + i * values.dim);
}

// scores [n_q, ld] += cosines [kKvBlock] of each pair times its a, and sines times its b; a and b are [n_q, n_pairs].
void add_turned(const TurnedArgs& t, int64_t n_q, float* scores, int64_t ld) {
    for (int64_t row = 0; row < n_q; ++row) {
        for (int64_t begin = 0; begin < kKvBlock; begin += 4 * kLanes) {
            float* out = scores + row * ld + begin;
            LaneFloats sums[4];
            for (int v = 0; v < 4; ++v) sums[v] = load_lanes(out + v * kLanes);
            for (int64_t i = 0; i < t.n_pairs; ++i) {
                const LaneFloats a = lanes_of(t.a[row * t.n_pairs + i]), b = lanes_of(t.b[row * t.n_pairs + i]);
                const float* cosine = t.cosines + t.pairs[i] * kKvBlock + begin;
                const float* sine = t.sines + t.pairs[i] * kKvBlock + begin;
                for (int v = 0; v < 4; ++v) {
                    sums[v] = multiply_add(a, load_lanes(cosine + v * kLanes), sums[v]);
                    sums[v] = multiply_add(b, load_lanes(sine + v * kLanes), sums[v]);
                }
            }
            for (int v = 0; v < 4; ++v) store_lanes(out + v * kLanes, sums[v]);
        }
    }
}

}  // namespace

}  // namespace qq
