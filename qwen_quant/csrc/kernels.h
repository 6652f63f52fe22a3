// The kernels that an instruction set provides, as one table of plain functions.
// Files that implement it are compiled with their own flags, so this header holds no code that a linker could merge.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kv_block.h"
#include "quant_types.h"

namespace qq {

constexpr int64_t kHalfBlock = 16;  // the smallest group of weights with a scale of its own

// Where the parts of a row of k activations as int8 lie, in bytes from its begin. x ~ scale * code with scale =
// max|x| / 127 of 32 neighbours, for weights of every block type: finer than the 256 that llama.cpp takes for K-quants,
// and one row serves matrices of different types. The int8 codes come first; what follows after half_sums is made from
// these three, once for all the rows of weights.
struct Q8Row {
    int64_t scales;            // float [k / 32]
    int64_t half_sums;         // int32 [k / 16]: sums of 16 codes
    int64_t minus_8;           // int32 [k / 32]: -8 * the sum of 32 codes, which takes the offset off unsigned weights
    int64_t minus_16;          // int32 [k / 32]
    int64_t minus_128;         // int32 [k / 32]
    int64_t minus_halves;      // int16 [k / 16]: half_sums with the other sign, as AVX2 multiplies them
    int64_t scaled_sums;       // float [k / 32]: scale * the sum of 32 codes, which a minimum is multiplied with
    int64_t scaled_half_sums;  // float [k / 16]
    int64_t wide;              // int16 [k]: the codes again, only for AVX2, which has no products of signed bytes
    int64_t bytes;
};

static inline Q8Row q8_row(int64_t k) {
    const int64_t n = k / kBlock * 4;
    return {k, k + n, k + 3 * n, k + 4 * n, k + 5 * n, k + 6 * n, k + 7 * n, k + 8 * n, k + 10 * n, 3 * k + 10 * n};
}

static inline size_t q8_row_bytes(int64_t k) { return static_cast<size_t>(q8_row(k).bytes); }

// From one such row to the next: each begins on a cache line of its own.
static inline size_t int8_stride(int64_t k) { return (q8_row_bytes(k) + 63) / 64 * 64; }

// Fills in the arrays that follow from codes, scales and half_sums.
static inline void complete_q8_row(int64_t k, uint8_t* row) {
    const Q8Row at = q8_row(k);
    const float* __restrict__ scales = reinterpret_cast<const float*>(row + at.scales);
    const int32_t* __restrict__ half_sums = reinterpret_cast<const int32_t*>(row + at.half_sums);
    int32_t* __restrict__ minus_8 = reinterpret_cast<int32_t*>(row + at.minus_8);
    int32_t* __restrict__ minus_16 = reinterpret_cast<int32_t*>(row + at.minus_16);
    int32_t* __restrict__ minus_128 = reinterpret_cast<int32_t*>(row + at.minus_128);
    int16_t* __restrict__ minus_halves = reinterpret_cast<int16_t*>(row + at.minus_halves);
    float* __restrict__ scaled = reinterpret_cast<float*>(row + at.scaled_sums);
    float* __restrict__ scaled_halves = reinterpret_cast<float*>(row + at.scaled_half_sums);
    // Loops that compilers turn into vectors
    for (int64_t b = 0; b < k / kBlock; ++b) {
        const int32_t sum = half_sums[2 * b] + half_sums[2 * b + 1];
        minus_8[b] = -8 * sum;
        minus_16[b] = -16 * sum;
        minus_128[b] = -128 * sum;
        scaled[b] = scales[b] * static_cast<float>(sum);
    }
    for (int64_t i = 0; i < k / kHalfBlock; ++i) minus_halves[i] = static_cast<int16_t>(-half_sums[i]);
    for (int64_t b = 0; b < k / kBlock; ++b) {
        scaled_halves[2 * b] = scales[b] * static_cast<float>(half_sums[2 * b]);
        scaled_halves[2 * b + 1] = scales[b] * static_cast<float>(half_sums[2 * b + 1]);
    }
}

// y[t * ldy + r] = sum_k weights[r, k] * x[t, k] for r < n_rows, t < n_tokens.
// The order of summation depends on k only, so results do not change with the number of rows or tokens.
struct MatmulArgs {
    const uint8_t* weights;
    size_t row_bytes;
    int64_t n_rows;
    int64_t k;
    const uint8_t* x;  // rows of float, or of int8 as above where the type asks for them
    size_t x_row_bytes;
    int64_t n_tokens;
    float* y;
    int64_t ldy;
};

struct TypeKernels {
    void (*matmul)(const MatmulArgs&);  // nullptr: the engine cannot multiply this type
    void (*dequantize)(const uint8_t* data, int64_t n, float* out);
    bool int8_activations;
    // The same product with weights packed as packed.h says, `row_bytes` being a row's share of its group; nullptr:
    // this type is multiplied as it is stored.
    void (*matmul_packed)(const MatmulArgs&) = nullptr;
    uint32_t pack_flip = 0;
};

struct Kernels {
    const char* isa;
    int64_t lanes;  // rows in a group of packed weights
    TypeKernels types[kTypeCount];

    void (*quantize_row)(const float* x, int64_t k, uint8_t* out);
    // out = x / sqrt(mean(x^2) + eps) * weight; returns mean(x^2), so that the caller notices what is not finite.
    float (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
    // Rotates the pairs (x[i], x[i + half]) by the angles whose cosines and sines are given.
    void (*rope)(float* x, const float* cosine, const float* sine, int64_t half);
    // gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]
    void (*swiglu)(float* gate, const float* up, int64_t n);
    void (*add)(float* x, const float* y, int64_t n);
    void (*to_half)(const float* x, int64_t n, uint16_t* out);

    // Attention over one block of the cache. q [n_q, dim] is scaled already; scores are [n_q, ld_scores]. `ahead` is
    // what is wanted next, as many bytes of which are asked for early; or nullptr.
    void (*attend_scores)(const float* q, int64_t n_q, const uint16_t* keys, int64_t n_keys, int64_t dim,
                          float* scores, int64_t ld_scores, const uint8_t* ahead);
    // Online softmax: scores[0, valid) become exp(score - new max), scores[valid, n) zero; the running maximum and
    // sum are updated; returns what earlier sums have to be multiplied with.
    float (*softmax_block)(float* scores, int64_t valid, int64_t n, float* running_max, float* running_sum);
    // acc [n_q, dim] = acc * rescale[q] + probabilities [n_q, ld_p] @ values [n_keys, dim]
    void (*attend_values)(const float* probabilities, int64_t ld_p, const float* rescale, int64_t n_q,
                          const uint16_t* values, int64_t n_keys, int64_t dim, float* acc, const uint8_t* ahead);

    // The same over a quantized cache; see kv_block.h.
    KvKernels kv[3];  // by KvType; none of kF16
    void (*hadamard)(float* x, int64_t n);
    void (*add_turned)(const TurnedArgs& turned, int64_t n_q, float* scores, int64_t ld_scores);
};

const Kernels* scalar_kernels();
#ifdef QQ_X86
const Kernels* avx2_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* avx512bf16_kernels();
#endif
#ifdef QQ_NEON
const Kernels* neon_kernels();
const Kernels* neon_i8mm_kernels();
#endif

// "auto" is the best that this CPU can run; nullptr for a name that is unknown or cannot run here.
const Kernels* find_kernels(const char* isa);
// Names for find_kernels that this CPU can run, slowest first, ended by nullptr.
const char* const* available_isas();

}  // namespace qq
