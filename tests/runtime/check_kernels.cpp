// Every product of the instruction set that is named against the scalar kernels, over blocks of any bytes, its
// attention and SwiGLU: exit code 0 if all agree. Without a name it prints those that the CPU can run. For CPUs that this machine is
// not: see test_neon.py and test_avx512.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "half.h"
#include "kernels.h"
#include "packed.h"
#include "quant_blocks.h"

using namespace qq;

namespace {

std::mt19937 random_bits(1);

int64_t any(int64_t least, int64_t most) { return least + random_bits() % (most - least + 1); }

// Bytes at which the blocks of a type hold 16-bit floats
std::vector<int> halves_of(uint32_t type) {
    switch (type) {
        case kQ4_1: case kQ5_1: case kQ4_K: case kQ5_K: return {0, 2};
        case kQ2_K: return {80, 82};
        case kQ3_K: return {108};
        case kQ6_K: return {208};
        default: return {0};
    }
}

struct Case {
    uint32_t type;
    int64_t rows, k, tokens;
    std::vector<uint8_t> weights, x;
    size_t row_bytes;
};

Case any_case(const Kernels& checked, uint32_t type) {
    const TypeInfo& info = *type_info(type);
    const int64_t more = random_bits() % 8 == 0 ? 1024 : 0;  // than a panel of weights takes at once
    Case c{type, any(1, 40), any(1, 3) * info.block + more, any(1, 9), {}, {}, 0};
    c.row_bytes = static_cast<size_t>(c.k) / info.block * info.bytes;
    c.weights.resize(static_cast<size_t>(c.rows) * c.row_bytes);
    for (uint8_t& byte : c.weights) byte = static_cast<uint8_t>(random_bits());
    for (size_t b = 0; b < c.weights.size(); b += info.bytes) {
        for (const int at : halves_of(type)) c.weights[b + at + 1] &= 0xbf;  // finite
    }
    std::normal_distribution<float> normal;
    std::vector<float> row(static_cast<size_t>(c.k));
    c.x.resize(static_cast<size_t>(c.tokens) * int8_stride(c.k));
    for (int64_t t = 0; t < c.tokens; ++t) {
        for (float& value : row) value = normal(random_bits);
        checked.quantize_row(row.data(), c.k, c.x.data() + static_cast<size_t>(t) * int8_stride(c.k));
    }
    return c;
}

MatmulArgs arguments(const Case& c, const uint8_t* weights, size_t row_bytes, std::vector<float>& y) {
    y.assign(static_cast<size_t>(c.rows * c.tokens), NAN);
    return {weights, row_bytes, c.rows, c.k, c.x.data(), int8_stride(c.k), c.tokens, y.data(), c.rows};
}

// The sum of the magnitudes of a product's terms, which its rounding errors are measured by
float magnitude(const Case& c, int64_t row, int64_t token) {
    std::vector<float> w(static_cast<size_t>(c.k));
    scalar_kernels()->types[c.type].dequantize(c.weights.data() + static_cast<size_t>(row) * c.row_bytes, c.k,
                                               w.data());
    const uint8_t* x = c.x.data() + static_cast<size_t>(token) * int8_stride(c.k);
    float sum = 0;
    for (int64_t i = 0; i < c.k; ++i) {
        float scale;
        std::memcpy(&scale, x + q8_row(c.k).scales + i / kBlock * 4, sizeof scale);
        sum += std::fabs(w[i] * scale * static_cast<float>(static_cast<int8_t>(x[i])));
    }
    return sum;
}

// A token's products are the same to the bit when it comes alone.
int64_t differences_alone(const TypeKernels& kernels, const Case& c, const uint8_t* packed, size_t row_bytes,
                          const std::vector<float>& together) {
    int64_t count = 0;
    for (int64_t t = 0; t < c.tokens; ++t) {
        std::vector<float> alone(static_cast<size_t>(c.rows), NAN);
        kernels.matmul_packed({packed, row_bytes, c.rows, c.k, c.x.data() + static_cast<size_t>(t) * int8_stride(c.k),
                               int8_stride(c.k), 1, alone.data(), c.rows});
        count += std::memcmp(alone.data(), &together[t * c.rows], alone.size() * sizeof(float)) != 0;
    }
    return count;
}

int64_t differences(const Kernels& checked, const Case& c) {
    const TypeKernels& kernels = checked.types[c.type];
    const size_t row_bytes = packed_row_bytes(c.type, c.k);
    std::vector<uint8_t> packed(packed_bytes(c.rows, row_bytes, checked.lanes));
    for (int64_t r = 0; r < c.rows; r += checked.lanes) {
        pack_group(c.type, {c.weights.data(), c.rows, c.row_bytes}, r, checked.lanes, kernels.pack_flip,
                   packed.data() + static_cast<size_t>(r) * row_bytes);
    }
    std::vector<float> expected, found;
    scalar_kernels()->types[c.type].matmul(arguments(c, c.weights.data(), c.row_bytes, expected));
    kernels.matmul_packed(arguments(c, packed.data(), row_bytes, found));
    int64_t count = 0;
    for (int64_t t = 0; t < c.tokens; ++t) {
        for (int64_t r = 0; r < c.rows; ++r) {
            const float gap = std::fabs(expected[t * c.rows + r] - found[t * c.rows + r]);
            count += !(gap <= 3e-6f * magnitude(c, r, t) + 1e-6f);
        }
    }
    return count + differences_alone(kernels, c, packed.data(), row_bytes, found);
}

std::vector<float> numbers(int64_t count, float scale) {
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(count));
    for (float& value : x) value = scale * normal(random_bits);
    return x;
}

std::vector<uint8_t> any_floats(uint32_t type, size_t n) {
    std::normal_distribution<float> normal;
    const size_t bytes = type_info(type)->bytes;
    std::vector<uint8_t> stored(n * bytes);
    for (size_t i = 0; i < n; ++i) {
        const float x = normal(random_bits);
        const uint16_t half = type == kF16 ? float_to_half(x) : float_to_bf16(x);
        std::memcpy(&stored[i * bytes], type == kF32 ? static_cast<const void*>(&x) : &half, bytes);
    }
    return stored;
}

// Matrices of floats; avx512bf16 rounds what BF16 is multiplied with.
int64_t float_differences(const Kernels& checked, uint32_t type) {
    const bool rounds = type == kBF16 && std::strcmp(checked.isa, "avx512bf16") == 0;
    const int64_t rows = any(1, 40), k = any(1, 200), tokens = any(1, 9);
    const std::vector<uint8_t> weights = any_floats(type, static_cast<size_t>(rows * k));
    const std::vector<uint8_t> x = any_floats(kF32, static_cast<size_t>(tokens * k));
    std::vector<uint8_t> seen = x;
    for (size_t i = 0; rounds && i < x.size(); i += sizeof(float)) {
        float value;
        std::memcpy(&value, &x[i], sizeof value);
        value = bf16_to_float(float_to_bf16(value));
        std::memcpy(&seen[i], &value, sizeof value);
    }
    const auto product = [&](const Kernels& kernels, const uint8_t* of, int64_t n) {
        std::vector<float> y(static_cast<size_t>(n * rows), NAN);
        kernels.types[type].matmul({weights.data(), static_cast<size_t>(k) * type_info(type)->bytes, rows, k, of,
                                    static_cast<size_t>(k) * sizeof(float), n, y.data(), rows});
        return y;
    };
    const std::vector<float> expected = product(*scalar_kernels(), seen.data(), tokens);
    const std::vector<float> found = product(checked, x.data(), tokens), alone = product(checked, x.data(), 1);
    int64_t count = std::memcmp(alone.data(), found.data(), alone.size() * sizeof(float)) != 0;
    for (size_t i = 0; i < found.size(); ++i) count += !(std::fabs(found[i] - expected[i]) <= 1e-5f * std::sqrt(float(k)));
    return count;
}

// A block of tokens stored and read by both instruction sets
int64_t cache_differences(const Kernels& checked, KvType type) {
    const KvKernels &kernels = checked.kv[static_cast<int>(type)], &scalar = scalar_kernels()->kv[static_cast<int>(type)];
    const int64_t dim = kKvUnit * any(1, 4), n = any(1, kKvBlock), n_q = any(1, 9), begin = kKvBlock * any(0, 3);
    const int64_t groups = n_q * dim / kKvGroup;
    std::vector<uint8_t> keys(kv_head_bytes(type, dim)), values = keys, other_keys = keys, other_values = keys;
    for (int64_t j = 0; j < n; ++j) {
        const std::vector<float> x = numbers(dim, static_cast<float>(any(1, 50)));
        kernels.store_key(x.data(), dim, keys.data(), begin + j);
        kernels.store_value(x.data(), dim, values.data(), begin + j);
        scalar.store_key(x.data(), dim, other_keys.data(), begin + j);
        scalar.store_value(x.data(), dim, other_values.data(), begin + j);
    }
    int64_t count = (keys != other_keys) + (values != other_values);
    const auto tokens = [&](const std::vector<uint8_t>& page) {
        return KvTokens{page.data() + kv_codes_at(type, dim, begin), page.data() + kv_scales_at(type, dim, begin), n, dim,
                        nullptr};
    };
    const std::vector<float> q = numbers(n_q * dim, 1.0f), start = numbers(n_q * dim, 1.0f), rescale = numbers(n_q, 1.0f);
    std::vector<float> p = numbers(n_q * kKvBlock, 1.0f);
    for (int64_t i = 0; i < n_q * kKvBlock; ++i) p[i] = i % kKvBlock < n ? std::exp(-3 * p[i] * p[i]) : 0;
    std::vector<float> results[2];
    for (const KvKernels* k : {&kernels, &scalar}) {
        std::vector<uint8_t> codes(static_cast<size_t>(n_q * dim) * sizeof(int16_t));
        std::vector<float> scales(groups), offsets(groups), scores(n_q * kKvBlock), acc = start;
        k->quantize_queries(q.data(), n_q, dim, {codes.data(), scales.data(), offsets.data()});
        k->scores({codes.data(), scales.data(), offsets.data()}, n_q, tokens(keys), scores.data(), kKvBlock);
        k->values(p.data(), kKvBlock, rescale.data(), n_q, tokens(values), acc.data());
        for (int64_t row = 0; row < n_q; ++row) std::fill(&scores[row * kKvBlock + n], &scores[row * kKvBlock] + kKvBlock, 0.0f);
        scores.insert(scores.end(), acc.begin(), acc.end());
        results[k == &scalar] = scores;
    }
    for (size_t i = 0; i < results[0].size(); ++i) count += !(std::fabs(results[0][i] - results[1][i]) <= 0.02f);
    return count;
}

// Blocks of an FP16 cache, each with fewer visible tokens than the one before
int64_t attention_differences(const Kernels& checked) {
    const int64_t dim = 4 * any(1, 40), n_q = any(1, 9);
    const std::vector<float> q = numbers(n_q * dim, 0.3f);
    std::vector<float> results[2];
    std::vector<float> top[2], sum[2];
    for (const int i : {0, 1}) {
        results[i].assign(static_cast<size_t>(n_q * dim), 0.0f);
        top[i].assign(static_cast<size_t>(n_q), -INFINITY);
        sum[i].assign(static_cast<size_t>(n_q), 0.0f);
    }
    for (int64_t n = any(40, kKvBlock); n > 0; n -= any(5, 30)) {
        std::vector<uint16_t> keys(static_cast<size_t>(n * dim)), values = keys;
        for (uint16_t& key : keys) key = float_to_half(numbers(1, 1.0f)[0]);
        for (uint16_t& value : values) value = float_to_half(numbers(1, 1.0f)[0]);
        for (const int i : {0, 1}) {
            const Kernels& k = i == 0 ? checked : *scalar_kernels();
            std::vector<float> scores(static_cast<size_t>(n_q * kKvBlock)), rescale(static_cast<size_t>(n_q));
            k.attend_scores(q.data(), n_q, keys.data(), n, dim, scores.data(), kKvBlock, nullptr);
            for (int64_t row = 0; row < n_q; ++row) {
                const int64_t valid = n - row % n;
                rescale[row] = k.softmax_block(&scores[row * kKvBlock], valid, n, &top[i][row], &sum[i][row]);
            }
            k.attend_values(scores.data(), kKvBlock, rescale.data(), n_q, values.data(), n, dim, results[i].data(), nullptr);
        }
    }
    int64_t count = 0;
    for (int64_t i = 0; i < n_q * dim; ++i) {
        count += !(std::fabs(results[0][i] / sum[0][i / dim] - results[1][i] / sum[1][i / dim]) <= 1e-5f);
    }
    return count;
}

int64_t swiglu_differences(const Kernels& checked) {
    const int64_t n = any(1, 100);
    std::vector<float> gate = numbers(n, 20.0f), expected = gate;
    gate[0] = expected[0] = random_bits() % 2 ? 1e30f : -1e30f;
    const std::vector<float> up = numbers(n, 1.0f);
    checked.swiglu(gate.data(), up.data(), n);
    scalar_kernels()->swiglu(expected.data(), up.data(), n);
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += !(std::fabs(gate[i] - expected[i]) <= 1e-6f * std::fabs(expected[i]) + 1e-7f);
    return count;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) {
        for (const char* const* name = available_isas(); *name; ++name) std::printf("%s\n", *name);
        return 0;
    }
    const Kernels& checked = *find_kernels(argv[1]);
    int64_t bad = 0, types = 0;
    for (uint32_t type = 0; type < kTypeCount; ++type) {
        const bool is_float = type == kF32 || type == kF16 || type == kBF16;
        if (!is_float && !checked.types[type].matmul_packed) continue;
        int64_t count = 0;
        for (int i = 0; i < 12; ++i) {
            count += is_float ? float_differences(checked, type) : differences(checked, any_case(checked, type));
        }
        if (count) std::printf("%s: %s: %ld products differ\n", checked.isa, type_info(type)->name, long(count));
        bad += count;
        ++types;
    }
    for (const KvType type : {KvType::kInt8, KvType::kInt4}) {
        int64_t count = 0;
        for (int i = 0; i < 12; ++i) count += cache_differences(checked, type);
        if (count) std::printf("%s: cache type %d: %ld numbers differ\n", checked.isa, int(type), long(count));
        bad += count;
    }
    int64_t attention = 0;
    int64_t swiglu = 0;
    for (int i = 0; i < 24; ++i) {
        attention += attention_differences(checked);
        swiglu += swiglu_differences(checked);
    }
    if (attention) std::printf("%s: attention: %ld numbers differ\n", checked.isa, long(attention));
    if (swiglu) std::printf("%s: SwiGLU: %ld numbers differ\n", checked.isa, long(swiglu));
    bad += attention + swiglu;
    std::printf("%s: %ld types checked\n", checked.isa, long(types));
    return bad != 0 || types == 0;
}
