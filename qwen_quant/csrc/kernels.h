// The kernels that an instruction set provides, as one table of plain functions.
// Files that implement it are compiled with their own flags, so this header holds no code that a linker could merge.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kv_block.h"
#include "quant_types.h"

namespace qq {

// A row of k activations as int8, for weights whose blocks hold 32:
// codes int8[k], then scale float[k / 32], then the sum of the codes int32[k / 32].
// x ~ scale * code with scale = max|x| / 127 of the block, as llama.cpp's Q8_1.
// Three more arrays of k / 32 follow from these: -8 * sum and -128 * sum (int32), which take the offset off unsigned
// codes, and scale * sum (float), which a minimum is multiplied with.
static inline size_t q8_row_bytes(int64_t k) { return static_cast<size_t>(k + k / kBlock * 20); }

// From one such row to the next: each begins on a cache line of its own.
static inline size_t int8_stride(int64_t k) { return (q8_row_bytes(k) + 63) / 64 * 64; }

// Fills in the three arrays that follow from the first two.
static inline void complete_q8_row(int64_t k, uint8_t* row) {
    const int64_t n = k / kBlock;
    const float* scales = reinterpret_cast<const float*>(row + k);
    const int32_t* sums = reinterpret_cast<const int32_t*>(row + k + 4 * n);
    int32_t* minus_8 = reinterpret_cast<int32_t*>(row + k + 8 * n);
    int32_t* minus_128 = reinterpret_cast<int32_t*>(row + k + 12 * n);
    float* scaled = reinterpret_cast<float*>(row + k + 16 * n);
    for (int64_t b = 0; b < n; ++b) {
        minus_8[b] = -8 * sums[b];
        minus_128[b] = -128 * sums[b];
        scaled[b] = scales[b] * static_cast<float>(sums[b]);
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
    // The same product with weights packed as packed.h says, `weights` and `row_bytes` counted as if they were not;
    // nullptr: this type is multiplied as it is stored.
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

    // Attention over one block of the cache. q [n_q, dim] is scaled already; scores are [n_q, ld_scores].
    void (*attend_scores)(const float* q, int64_t n_q, const uint16_t* keys, int64_t n_keys, int64_t dim,
                          float* scores, int64_t ld_scores);
    // Online softmax: scores[0, valid) become exp(score - new max), scores[valid, n) zero; the running maximum and
    // sum are updated; returns what earlier sums have to be multiplied with.
    float (*softmax_block)(float* scores, int64_t valid, int64_t n, float* running_max, float* running_sum);
    // acc [n_q, dim] = acc * rescale[q] + probabilities [n_q, ld_p] @ values [n_keys, dim]
    void (*attend_values)(const float* probabilities, int64_t ld_p, const float* rescale, int64_t n_q,
                          const uint16_t* values, int64_t n_keys, int64_t dim, float* acc);

    // The same over a quantized cache; see kv_block.h.
    KvKernels kv[3];  // by KvType; none of kF16
    void (*quantize_queries)(const float* q, int64_t n_q, int64_t dim, float middle, const KvQueries& out);
    void (*hadamard)(float* x, int64_t n);
    void (*add_turned)(const TurnedArgs& turned, int64_t n_q, float* scores, int64_t ld_scores);
};

const Kernels* scalar_kernels();
#ifdef QQ_X86
const Kernels* avx2_kernels();
const Kernels* avx512vnni_kernels();
#endif

// "auto" is the best that this CPU can run; nullptr for a name that is unknown or cannot run here.
const Kernels* find_kernels(const char* isa);
// Names for find_kernels that this CPU can run, slowest first, ended by nullptr.
const char* const* available_isas();

}  // namespace qq
