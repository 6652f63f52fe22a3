// The reference kernels: plain C++, any CPU.
#include <cmath>
#include <cstring>

#include "half.h"
#include "kernels.h"
#include "quant_blocks.h"
#include "scalar_kv.h"

namespace qq {

namespace {

// ---- weights ----------------------------------------------------------------------------------------------------

float f32_at(const uint8_t* row, int64_t i) {
    float value;
    std::memcpy(&value, row + 4 * i, sizeof value);
    return value;
}
float f16_at(const uint8_t* row, int64_t i) { return load_half(row + 2 * i); }
float bf16_at(const uint8_t* row, int64_t i) { return bf16_to_float(load_u16(row + 2 * i)); }

template <float (*At)(const uint8_t*, int64_t)>
void dequantize_float(const uint8_t* data, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = At(data, i);
}

template <uint32_t Type>
void dequantize_blocks(const uint8_t* data, int64_t n, float* out) {
    const BlockFormat& format = *block_format(Type);
    const size_t bytes = type_info(Type)->bytes;
    uint8_t wide[kLargestWideBlock];
    DecodedBlock block;
    for (int64_t i = 0; i < n; i += format.weights, data += bytes) {
        format.decode(format.widened(data, wide), block);
        write_weights(format, block, out + i);
    }
}

// ---- matrix products --------------------------------------------------------------------------------------------

template <float (*At)(const uint8_t*, int64_t)>
void matmul_float(const MatmulArgs& a) {
    for (int64_t r = 0; r < a.n_rows; ++r) {
        const uint8_t* w = a.weights + r * a.row_bytes;
        for (int64_t t = 0; t < a.n_tokens; ++t) {
            const float* x = reinterpret_cast<const float*>(a.x + t * a.x_row_bytes);
            float sum = 0;
            for (int64_t i = 0; i < a.k; ++i) sum += At(w, i) * x[i];
            a.y[t * a.ldy + r] = sum;
        }
    }
}

// What a block adds to the product of its row with the activations, [weights] codes of one token.
float block_product(const BlockFormat& format, const DecodedBlock& block, const int8_t* x, const float* x_scales,
                    const int32_t* x_sums) {
    float product = 0;
    for (int i = 0; i < format.weights; i += format.group) {
        int32_t dot = 0, sum = 0;
        for (int j = i; j < i + format.group; ++j) dot += static_cast<int32_t>(block.codes[j]) * x[j];
        for (int j = i; j < i + format.group; j += kHalfBlock) sum += x_sums[j / kHalfBlock];
        const float scale = x_scales[i / kBlock];
        product += block.scale[i / format.group] * scale * static_cast<float>(dot) +
                   block.minimum[i / format.group] * (scale * static_cast<float>(sum));
    }
    return product;
}

template <uint32_t Type>
void matmul_blocks(const MatmulArgs& a) {
    const BlockFormat& format = *block_format(Type);
    const size_t bytes = type_info(Type)->bytes;
    const Q8Row at = q8_row(a.k);
    uint8_t wide[kLargestWideBlock];
    DecodedBlock block;
    for (int64_t r = 0; r < a.n_rows; ++r) {
        const uint8_t* w = a.weights + static_cast<size_t>(r) * a.row_bytes;
        for (int64_t t = 0; t < a.n_tokens; ++t) a.y[t * a.ldy + r] = 0;
        for (int64_t i = 0; i < a.k; i += format.weights, w += bytes) {
            format.decode(format.widened(w, wide), block);
            for (int64_t t = 0; t < a.n_tokens; ++t) {
                const uint8_t* x = a.x + static_cast<size_t>(t) * a.x_row_bytes;
                a.y[t * a.ldy + r] += block_product(
                    format, block, reinterpret_cast<const int8_t*>(x) + i,
                    reinterpret_cast<const float*>(x + at.scales) + i / kBlock,
                    reinterpret_cast<const int32_t*>(x + at.half_sums) + i / kHalfBlock);
            }
        }
    }
}

template <uint32_t Type>
constexpr TypeKernels blocks() {
    return {matmul_blocks<Type>, dequantize_blocks<Type>, true};
}

void quantize_row(const float* x, int64_t k, uint8_t* out) {
    const int64_t n_blocks = k / kBlock;
    int8_t* codes = reinterpret_cast<int8_t*>(out);
    float* scales = reinterpret_cast<float*>(out + q8_row(k).scales);
    int32_t* sums = reinterpret_cast<int32_t*>(out + q8_row(k).half_sums);
    constexpr float kTiny = 1e-30f;       // smaller blocks count as zero: 127 / max would overflow
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even integer
    for (int64_t b = 0; b < n_blocks; ++b, x += kBlock, codes += kBlock) {
        uint32_t bits = 0;  // compared as integers, NaN is larger than every number and is not lost
        for (int i = 0; i < kBlock; ++i) {
            const uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
            if (magnitude > bits) bits = magnitude;
        }
        const float largest = bits_to_float(bits);
        const bool usable = largest > kTiny && bits < 0x7f800000u;
        const float inverse = usable ? 127.0f / largest : 0.0f;
        sums[2 * b] = sums[2 * b + 1] = 0;
        for (int i = 0; i < kBlock; ++i) {
            const float rounded = usable ? (x[i] * inverse + kRound) - kRound : 0.0f;
            codes[i] = static_cast<int8_t>(rounded);
            sums[2 * b + i / kHalfBlock] += codes[i];
        }
        scales[b] = bits < 0x7f800000u ? largest / 127.0f : bits_to_float(0x7fc00000u);
    }
    complete_q8_row(k, out);
}

// ---- elementwise ------------------------------------------------------------------------------------------------

float rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    float partial[8] = {};  // eight sums: closer to the true sum than one, and vectorizable
    for (int64_t i = 0; i < n; ++i) partial[i & 7] += x[i] * x[i];
    float sum = 0;
    for (float p : partial) sum += p;
    const float mean = sum / static_cast<float>(n);
    const float scale = 1.0f / std::sqrt(mean + eps);
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
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
    for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void add(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

void to_half(const float* x, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = float_to_half(x[i]);
}

// ---- attention --------------------------------------------------------------------------------------------------

void attend_scores(const float* q, int64_t n_q, const uint16_t* keys, int64_t n_keys, int64_t dim, float* scores,
                   int64_t ld_scores, const uint8_t*) {
    for (int64_t i = 0; i < n_q; ++i) {
        for (int64_t j = 0; j < n_keys; ++j) {
            float sum = 0;
            for (int64_t d = 0; d < dim; ++d) sum += q[i * dim + d] * half_to_float(keys[j * dim + d]);
            scores[i * ld_scores + j] = sum;
        }
    }
}

float softmax_block(float* scores, int64_t valid, int64_t n, float* running_max, float* running_sum) {
    float largest = *running_max;
    for (int64_t i = 0; i < valid; ++i) largest = std::fmax(largest, scores[i]);
    float sum = 0;
    for (int64_t i = 0; i < valid; ++i) sum += scores[i] = std::exp(scores[i] - largest);
    for (int64_t i = valid; i < n; ++i) scores[i] = 0;
    const float rescale = valid > 0 ? std::exp(*running_max - largest) : 1.0f;
    *running_max = largest;
    *running_sum = *running_sum * rescale + sum;
    return rescale;
}

void attend_values(const float* probabilities, int64_t ld_p, const float* rescale, int64_t n_q,
                   const uint16_t* values, int64_t n_keys, int64_t dim, float* acc, const uint8_t*) {
    for (int64_t i = 0; i < n_q; ++i) {
        float* out = acc + i * dim;
        for (int64_t d = 0; d < dim; ++d) out[d] *= rescale[i];
        for (int64_t j = 0; j < n_keys; ++j) {
            const float p = probabilities[i * ld_p + j];
            for (int64_t d = 0; d < dim; ++d) out[d] += p * half_to_float(values[j * dim + d]);
        }
    }
}

template <KvType T>
KvKernels kv_kernels() {
    return {store_key<T>, store_value<T>, quantize_queries<T>, kv_scores<T>, kv_values<T>};
}

Kernels make_table() {
    Kernels k{};
    k.isa = "scalar";
    k.lanes = 1;
    k.types[kF32] = {matmul_float<f32_at>, dequantize_float<f32_at>, false};
    k.types[kF16] = {matmul_float<f16_at>, dequantize_float<f16_at>, false};
    k.types[kBF16] = {matmul_float<bf16_at>, dequantize_float<bf16_at>, false};
    k.types[kQ4_0] = blocks<kQ4_0>();
    k.types[kQ4_1] = blocks<kQ4_1>();
    k.types[kQ5_0] = blocks<kQ5_0>();
    k.types[kQ5_1] = blocks<kQ5_1>();
    k.types[kQ8_0] = blocks<kQ8_0>();
    k.types[kQ2_K] = blocks<kQ2_K>();
    k.types[kQ3_K] = blocks<kQ3_K>();
    k.types[kQ4_K] = blocks<kQ4_K>();
    k.types[kQ5_K] = blocks<kQ5_K>();
    k.types[kQ6_K] = blocks<kQ6_K>();
    k.types[kIQ4_NL] = blocks<kIQ4_NL>();
    k.types[kIQ4_XS] = blocks<kIQ4_XS>();
    k.quantize_row = quantize_row;
    k.rms_norm = rms_norm;
    k.rope = rope;
    k.swiglu = swiglu;
    k.add = add;
    k.to_half = to_half;
    k.attend_scores = attend_scores;
    k.softmax_block = softmax_block;
    k.attend_values = attend_values;
    k.kv[static_cast<int>(KvType::kInt8)] = kv_kernels<KvType::kInt8>();
    k.kv[static_cast<int>(KvType::kInt4)] = kv_kernels<KvType::kInt4>();
    k.hadamard = hadamard;
    k.add_turned = add_turned;
    return k;
}

}  // namespace

const Kernels* scalar_kernels() {
    static const Kernels table = make_table();
    return &table;
}

}  // namespace qq
