#include "kv_layout.h"

#include <cmath>

#include "error.h"
#include "kv_weights.h"

namespace qq {

namespace {

const std::string kPrefix = "qwen_quant.kv_cache.";
const char* const kCalibrateAgain = "export the file again with --kv-cache auto";

// What a file says of the keys (or values) of all layers.
struct StoredHalf {
    std::vector<int32_t> bits, hadamard;  // [n_layers]
    std::vector<float> centre, balance;   // [n_layers, n_kv_heads, head_dim]
};

template <class T>
std::vector<T> checked(const GgufFile& file, const std::string& key, std::vector<T> values, size_t wanted) {
    if (values.size() == wanted) return values;
    file.fail("key '" + key + "'", "has " + std::to_string(values.size()) + " values where " + std::to_string(wanted) +
                                       " belong", kCalibrateAgain);
}

StoredHalf read_half(const GgufFile& file, const ModelConfig& c, const std::string& half) {
    const size_t layers = static_cast<size_t>(c.n_layers);
    const size_t channels = layers * static_cast<size_t>(c.n_kv_heads * c.head_dim);
    const auto name = [&](const char* field) { return kPrefix + half + "_" + field; };
    StoredHalf s;
    s.bits = checked(file, name("bits"), file.get_ints(name("bits")), layers);
    s.hadamard = checked(file, name("hadamard"), file.get_ints(name("hadamard")), layers);
    s.centre = checked(file, name("centre"), file.get_floats(name("centre")), channels);
    s.balance = checked(file, name("balance"), file.get_floats(name("balance")), channels);
    for (const int32_t bits : s.bits) {
        if (bits != 4 && bits != 8 && bits != 16) {
            file.fail("key '" + name("bits") + "'", "has other values than 4, 8 and 16", kCalibrateAgain);
        }
    }
    for (size_t i = 0; i < channels; ++i) {
        if (!std::isfinite(s.centre[i]) || !std::isfinite(s.balance[i]) || !(s.balance[i] > 0)) {
            file.fail("keys '" + name("centre") + "', '" + name("balance") + "'", "not usable", kCalibrateAgain);
        }
    }
    return s;
}

KvType type_named(const std::string& name, const std::string& option, int32_t stored_bits) {
    if (name == "f16") return KvType::kF16;
    if (name == "int8") return KvType::kInt8;
    if (name == "int4") return KvType::kInt4;
    if (name != "auto") {
        throw RunError(option + " '" + name + "' is not known; use f16, int8, int4 or auto");
    }
    return stored_bits == 4 ? KvType::kInt4 : stored_bits == 8 ? KvType::kInt8 : KvType::kF16;
}

bool all_are(const std::vector<float>& x, float value) {
    for (const float v : x) {
        if (v != value) return false;
    }
    return true;
}

KvHalf make_half(KvType type, bool rotated, std::vector<float> centre, std::vector<float> balance) {
    KvHalf half;
    half.type = type;
    if (!half.quantized()) return half;
    half.hadamard = rotated;
    if (!all_are(centre, 0.0f)) half.centre = std::move(centre);
    if (all_are(balance, 1.0f)) return half;
    for (const float b : balance) half.inverse_balance.push_back(1.0f / b);
    half.balance = std::move(balance);
    return half;
}

void list_pairs(const ModelConfig& c, KvHalf& keys) {
    if (keys.centre.empty()) return;
    for (int64_t head = 0; head < c.n_kv_heads; ++head) {
        const float* centre = keys.centre.data() + head * c.head_dim;
        keys.pairs.emplace_back();
        for (int64_t i = 0; i < c.head_dim / 2; ++i) {
            if (centre[i] != 0 || centre[i + c.head_dim / 2] != 0) keys.pairs.back().push_back(static_cast<int32_t>(i));
        }
    }
}

// This layer's part of an array of all layers.
std::vector<float> part_of(const std::vector<float>& all, int64_t layer, const ModelConfig& c) {
    const auto begin = all.begin() + layer * c.n_kv_heads * c.head_dim;
    return {begin, begin + c.n_kv_heads * c.head_dim};
}

KvHalf stored_half(const StoredHalf& s, int64_t layer, const ModelConfig& c, KvType type) {
    return make_half(type, s.hadamard[layer] != 0, part_of(s.centre, layer, c), part_of(s.balance, layer, c));
}

}  // namespace

std::vector<KvLayer> choose_kv_layout(const GgufFile& file, const Model& model, const Kernels& kernels, ThreadTeam& team,
                                      const std::string& key_type, const std::string& value_type) {
    const ModelConfig& c = model.config;
    const bool calibrated = file.has(kPrefix + "key_bits");
    if (!calibrated && (key_type == "auto" || value_type == "auto")) {
        throw RunError(file.path() + ": holds no calibrated layout of the KV cache; " + kCalibrateAgain +
                       ", or use int8 or int4");
    }
    StoredHalf keys, values;
    if (calibrated) {
        keys = read_half(file, c, "key");
        values = read_half(file, c, "value");
    }
    std::vector<KvBasis> bases(model.layers.size());
    if (!calibrated && (key_type != "f16" || value_type != "f16")) {
        team.run([&](int id) {
            for (size_t i = static_cast<size_t>(id); i < bases.size(); i += static_cast<size_t>(team.size())) {
                bases[i] = basis_of_weights(model.layers[i], c, kernels);
            }
        });
    }
    std::vector<KvLayer> layers;
    for (int64_t i = 0; i < c.n_layers; ++i) {
        const KvType k = type_named(key_type, "cache type of keys", calibrated ? keys.bits[i] : 16);
        const KvType v = type_named(value_type, "cache type of values", calibrated ? values.bits[i] : 16);
        KvLayer layer;
        if (calibrated) {
            layer = {stored_half(keys, i, c, k), stored_half(values, i, c, v)};
        } else {
            KvBasis& basis = bases[i];
            layer.key = make_half(k, k == KvType::kInt4, std::move(basis.key_centre), std::move(basis.key_balance));
            layer.value = make_half(v, v == KvType::kInt4, std::move(basis.value_centre), std::move(basis.value_balance));
        }
        if (layer.quantized() && (c.head_dim % kKvUnit != 0 || c.head_dim > kLargestHead)) {
            throw RunError(file.path() + ": a quantized KV cache needs heads of 64, 128, ... up to 1024 channels, not " +
                           std::to_string(c.head_dim) + "; use cache type f16");
        }
        list_pairs(c, layer.key);
        layers.push_back(std::move(layer));
    }
    return layers;
}

}  // namespace qq
