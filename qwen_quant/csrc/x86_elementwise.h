// x86: what is not a product: quantizing activations, norms, RoPE, SwiGLU.
#pragma once

#include <immintrin.h>

#include <cmath>

#include "x86_blocks.h"

namespace qq {

namespace {

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

void quantize_row(const float* x, int64_t k, uint8_t* out) {
    const int64_t n_blocks = k / kBlock;
    float* scales = reinterpret_cast<float*>(out + q8_row(k).scales);
    int32_t* sums = reinterpret_cast<int32_t*>(out + q8_row(k).half_sums);
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
        __m256i q[4];
        for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
        const __m256i low = _mm256_packs_epi32(q[0], q[1]), high = _mm256_packs_epi32(q[2], q[3]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + b * kBlock),
                            _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
#ifndef __AVX512VNNI__
        __m256i* wide = reinterpret_cast<__m256i*>(out + q8_row(k).wide + 2 * b * kBlock);
        _mm256_storeu_si256(wide, _mm256_permute4x64_epi64(low, 0xd8));
        _mm256_storeu_si256(wide + 1, _mm256_permute4x64_epi64(high, 0xd8));
#endif
        // Both halves of the block at once: their fours, their pairs, and in the lowest two lanes the two sums.
        const __m256i fours = _mm256_hadd_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
        s = _mm_hadd_epi32(s, s);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(sums + 2 * b), s);
        scales[b] = largest <= 3.4e38f ? largest / 127.0f : NAN;
    }
    complete_q8_row(k, out);
}

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

}  // namespace

}  // namespace qq
