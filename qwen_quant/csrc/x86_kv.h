// x86: attention over one block of a quantized cache. A lane is a key, or a channel of the values. Codes are widened to 16
// bits and multiplied with numbers of 16 bits, two products to a lane; only int4 keys stay bytes, as their queries are.
#pragma once

#include "x86_kv_round.h"
#include "x86_lanes.h"
// After x86_kv_round.h:
#include "kv_store.h"

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
// Sums of products of bytes, four to a lane, that are added up where the products are
inline LaneInts add_byte_products(LaneInts sum, LaneInts codes, LaneInts x) {
    return _mm512_dpbusd_epi32(sum, codes, x);
}
inline LaneInts whole_sums(LaneInts sum) { return sum; }
inline LaneFloats lane_scales(const uint8_t* p) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(bytes, _mm512_set1_epi32(kScaleLowest)), kScaleShift));
}
inline LaneFloats subtract(LaneFloats a, LaneFloats b) { return _mm512_sub_ps(a, b); }
inline LaneInts rounded(LaneFloats x) { return _mm512_cvtps_epi32(x); }
inline LaneInts add_ints(LaneInts a, LaneInts b) { return _mm512_add_epi32(a, b); }
inline LaneInts larger_bits(LaneInts a, LaneFloats b) { return _mm512_max_epi32(a, _mm512_castps_si512(b)); }
// In all lanes
inline LaneFloats largest_lane(LaneInts x) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(x)));
}
inline float first_lane(LaneFloats x) { return _mm512_cvtss_f32(x); }
// 32767 / x, zero where that is too large
inline LaneFloats to_shorts(LaneFloats x) {
    const __mmask16 usable = _mm512_cmp_ps_mask(x, lanes_of(1e-30f), _CMP_NLE_UQ);
    return _mm512_maskz_div_ps(usable, lanes_of(32767.0f), x);
}
inline void store_shorts(int16_t* p, LaneInts a, LaneInts b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(a));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kLanes), _mm512_cvtsepi32_epi16(b));
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
// The same in halves of 16 bits: 8 sums of two products of codes up to 15 with x up to 127 fit, which are 32 channels.
inline LaneInts add_byte_products(LaneInts sum, LaneInts codes, LaneInts x) {
    return add_shorts(sum, _mm256_maddubs_epi16(codes, x));
}
inline LaneInts whole_sums(LaneInts sum) { return add_pairs(sum, NoScale()); }
inline LaneFloats lane_scales(const uint8_t* p) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(bytes, _mm256_set1_epi32(kScaleLowest)), kScaleShift));
}
inline LaneFloats subtract(LaneFloats a, LaneFloats b) { return _mm256_sub_ps(a, b); }
inline LaneInts rounded(LaneFloats x) { return _mm256_cvtps_epi32(x); }
inline LaneInts add_ints(LaneInts a, LaneInts b) { return _mm256_add_epi32(a, b); }
inline LaneInts larger_bits(LaneInts a, LaneFloats b) { return _mm256_max_epi32(a, _mm256_castps_si256(b)); }
inline LaneFloats largest_lane(LaneInts x) {
    x = _mm256_max_epi32(x, _mm256_permute2x128_si256(x, x, 1));
    x = _mm256_max_epi32(x, _mm256_shuffle_epi32(x, 0x4e));
    return _mm256_castsi256_ps(_mm256_max_epi32(x, _mm256_shuffle_epi32(x, 0xb1)));
}
inline float first_lane(LaneFloats x) { return _mm256_cvtss_f32(x); }
inline LaneFloats to_shorts(LaneFloats x) {
    const __m256 usable = _mm256_cmp_ps(x, lanes_of(1e-30f), _CMP_NLE_UQ);
    return _mm256_and_ps(usable, _mm256_div_ps(lanes_of(32767.0f), x));
}
inline void store_shorts(int16_t* p, LaneInts a, LaneInts b) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
#endif

constexpr int64_t tile_depth(KvType type) { return type == KvType::kInt8 ? 2 : 8; }
constexpr int64_t lane_bytes(KvType type) { return type == KvType::kInt8 ? 2 : 4; }  // of a lane in a tile

// Asks for bytes [begin, end) of the block that is wanted next, if any is.
inline void ask_ahead(const KvTokens& tokens, int64_t begin, int64_t end) {
    if (!tokens.ahead) return;
    for (int64_t at = begin; at < end; at += 64) prefetch(tokens.ahead + at);
}
template <KvType T>
inline void ask_scales_ahead(const KvTokens& tokens) {
    const int64_t codes = static_cast<int64_t>(kv_code_bytes(T, tokens.dim));
    ask_ahead(tokens, codes, codes + kKvBlock * tokens.dim / kKvGroup);
}

inline LaneInts two_codes(const int16_t* p) { return four_of_x(reinterpret_cast<const uint8_t*>(p)); }

// sums [Q][V] += products of a tile's codes with the pairs of 16-bit numbers at x[q]. A tile is V vectors wide and 2 (int8)
// or 8 (int4) codes deep.
template <KvType T, int Q, int V>
QQ_INLINE void add_tile(const uint8_t* tile, const int16_t* const (&x)[Q], int64_t at, LaneInts (&sums)[Q * V]) {
    LaneInts codes[V];
    const auto multiply_in = [&](int64_t offset) QQ_LAMBDA_INLINE {
#pragma GCC unroll 8  // here and below: or the sums would be kept in memory
        for (int q = 0; q < Q; ++q) {
            const LaneInts pair = two_codes(x[q] + at + offset);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[q * V + v] = add_products(sums[q * V + v], codes[v], pair);
        }
    };
    if constexpr (T == KvType::kInt8) {
        for (int v = 0; v < V; ++v) codes[v] = widened(tile + v * 2 * kLanes);
        multiply_in(0);
    } else {
        LaneInts words[V];
        for (int v = 0; v < V; ++v) words[v] = load_codes(tile + v * 4 * kLanes);
        for (int v = 0; v < V; ++v) codes[v] = nibbles_at<0>(words[v]);
        multiply_in(0);
        for (int v = 0; v < V; ++v) codes[v] = nibbles_at<4>(words[v]);
        multiply_in(2);
        for (int v = 0; v < V; ++v) codes[v] = nibbles_at<8>(words[v]);
        multiply_in(4);
        for (int v = 0; v < V; ++v) codes[v] = nibbles_at<12>(words[v]);
        multiply_in(6);
    }
}

// The same for 16 int4 keys with queries of 8 bits, four products to a lane: sums that whole_sums completes
template <int Q>
inline void add_byte_tile(const uint8_t* tile, const uint8_t* const (&x)[Q], int64_t at, LaneInts (&sums)[Q * kVectors]) {
    LaneInts words[kVectors], codes[kVectors];
    const auto multiply_in = [&](int64_t offset) {
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) {
            const LaneInts four = four_of_x(x[q] + at + offset);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                sums[q * kVectors + v] = add_byte_products(sums[q * kVectors + v], codes[v], four);
            }
        }
    };
    for (int v = 0; v < kVectors; ++v) words[v] = load_codes(tile + v * 4 * kLanes);
    for (int v = 0; v < kVectors; ++v) codes[v] = mask_bytes(words[v], 15);
    multiply_in(0);
    for (int v = 0; v < kVectors; ++v) codes[v] = mask_bytes(shift<-4>(words[v]), 15);
    multiply_in(4);
}

// The products of a group of 32 channels of 16 keys with Q queries
template <KvType T, int Q>
inline void add_group(const uint8_t* tile, const KvQueries& q, int64_t row, int64_t dim, int64_t channel,
                      LaneInts (&sums)[Q * kVectors]) {
#pragma GCC unroll 8
    for (int i = 0; i < Q * kVectors; ++i) sums[i] = zero_sums();
    if constexpr (T == KvType::kInt8) {
        const int16_t* x[Q];
        for (int i = 0; i < Q; ++i) x[i] = reinterpret_cast<const int16_t*>(q.codes) + (row + i) * dim + channel;
        for (int64_t c = 0; c < kKvGroup; c += 2, tile += 16 * lane_bytes(T)) {
            add_tile<T, Q, kVectors>(tile, x, c, sums);
        }
    } else {
        const uint8_t* x[Q];
        for (int i = 0; i < Q; ++i) x[i] = q.codes + (row + i) * dim + channel;
        for (int64_t c = 0; c < kKvGroup; c += 8, tile += 16 * lane_bytes(T)) add_byte_tile<Q>(tile, x, c, sums);
#pragma GCC unroll 8
        for (int i = 0; i < Q * kVectors; ++i) sums[i] = whole_sums(sums[i]);
    }
}

template <KvType T, int Q>
QQ_ALONE void kv_scores_of(const KvQueries& q, int64_t row, const KvTokens& keys, float* scores, int64_t ld) {
    const int64_t n_groups = keys.dim / kKvGroup, n_tiles = (keys.n + 15) / 16;
    constexpr int64_t kGroupBytes = kKvGroup / tile_depth(T) * 16 * lane_bytes(T);
    ask_scales_ahead<T>(keys);
    const uint8_t* tile = keys.codes;
    for (int64_t at = 0; at < n_tiles; ++at) {
        const int64_t key = 16 * at;
        LaneFloats total[Q * kVectors];
#pragma GCC unroll 8
        for (int i = 0; i < Q * kVectors; ++i) total[i] = lanes_of(0.0f);
        for (int64_t g = 0; g < n_groups; ++g) {
            ask_ahead(keys, (at * n_groups + g) * kGroupBytes, (at * n_groups + g + 1) * kGroupBytes);
            LaneInts sums[Q * kVectors];
            add_group<T, Q>(tile, q, row, keys.dim, g * kKvGroup, sums);
            tile += kGroupBytes;
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                const LaneFloats scale = lane_scales(keys.scales + g * kKvBlock + key + v * kLanes);
#pragma GCC unroll 8
                for (int i = 0; i < Q; ++i) {
                    const int64_t of_query = (row + i) * n_groups + g;
                    LaneFloats sum = to_floats(sums[i * kVectors + v]);
                    if (T == KvType::kInt4) sum = subtract(sum, lanes_of(q.offsets[of_query]));
                    LaneFloats& all = total[i * kVectors + v];
                    all = multiply_add(sum, multiply(scale, lanes_of(q.scales[of_query])), all);
                }
            }
        }
        for (int i = 0; i < Q; ++i) {
            float* out = scores + (row + i) * ld + key;
            for (int v = 0; v < kVectors; ++v) store_lanes(out + v * kLanes, total[i * kVectors + v]);
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
