// Single kernels, so that tests can hold each against NumPy.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "bind.h"
#include "buffer.h"
#include "error.h"
#include "experts.h"
#include "kernels.h"
#include "packed.h"

namespace nb = nanobind;

namespace qq {

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const Kernels& kernels(const std::string& isa) {
    const Kernels* k = find_kernels(isa.c_str());
    if (!k) throw RunError("isa '" + isa + "' is unknown or cannot run on this CPU");
    return *k;
}

uint32_t type_id(const std::string& name) {
    for (uint32_t i = 0; i < kTypeCount; ++i) {
        if (type_info(i) && name == type_info(i)->name) return i;
    }
    throw RunError("unknown tensor type '" + name + "'");
}

const TypeKernels& supported(const Kernels& k, const std::string& type) {
    const TypeKernels& t = k.types[type_id(type)];
    if (!t.matmul) throw RunError("tensor type " + type + " is not supported by the engine");
    return t;
}

// Bytes of n weights, after checking that they are there.
size_t checked_bytes(const std::string& type, int64_t n, size_t given) {
    const TypeInfo* info = type_info(type_id(type));
    const size_t wanted = n < 0 || n % info->block ? 0 : static_cast<size_t>(n / info->block) * info->bytes;
    if (wanted == 0 || wanted != given) {
        throw RunError(type + ": " + std::to_string(n) + " weights do not fill " + std::to_string(given) + " bytes");
    }
    return wanted;
}

FloatArray dequantize(const std::string& type, const Bytes& data, int64_t n, const std::string& isa) {
    const TypeKernels& t = supported(kernels(isa), type);
    checked_bytes(type, n, data.shape(0));
    FloatArray out = new_floats({static_cast<size_t>(n)});
    const nb::gil_scoped_release release;
    t.dequantize(data.data(), n, out.data());
    return out;
}

// Rows of int8 codes with their scales, as the engine keeps them.
Buffer quantize_rows(const Kernels& k, const Matrix2& x) {
    const size_t rows = x.shape(0), cols = x.shape(1);
    if (cols % kBlock != 0) throw RunError("activations are quantized in blocks of 32");
    Buffer out(rows * q8_row_bytes(static_cast<int64_t>(cols)));
    for (size_t t = 0; t < rows; ++t) {
        k.quantize_row(x.data() + t * cols, static_cast<int64_t>(cols),
                       out.data() + t * q8_row_bytes(static_cast<int64_t>(cols)));
    }
    return out;
}

// Rows of weights in the order that matmul_packed wants, `row_bytes` for each of them.
Buffer pack(const Kernels& k, uint32_t type, const PlainRows& rows, size_t row_bytes) {
    Buffer packed(packed_bytes(rows.n_rows, row_bytes, k.lanes));
    for (int64_t r = 0; r < rows.n_rows; r += k.lanes) {
        pack_group(type, rows, r, k.lanes, k.types[type].pack_flip,
                   packed.data() + static_cast<size_t>(r) * row_bytes);
    }
    return packed;
}

FloatArray matmul(const std::string& type, const Bytes& weights, int64_t n_rows, const Matrix2& x,
                  const std::string& isa, bool packed) {
    const Kernels& k = kernels(isa);
    const TypeKernels& t = supported(k, type);
    const int64_t cols = static_cast<int64_t>(x.shape(1));
    if (n_rows < 1 || cols < 1 || n_rows > (int64_t{1} << 40) / cols) throw RunError("impossible matrix shape");
    const size_t bytes = checked_bytes(type, n_rows * cols, weights.shape(0));
    if (cols % type_info(type_id(type))->block) {
        throw RunError(type + ": a row of " + std::to_string(cols) + " weights is not whole blocks");
    }
    if (packed && !t.matmul_packed) throw RunError(isa + " has no packed " + type);
    const PlainRows rows{weights.data(), n_rows, bytes / static_cast<size_t>(n_rows)};
    const size_t row_bytes = packed ? packed_row_bytes(type_id(type), cols) : rows.row_bytes;
    const Buffer groups = packed ? pack(k, type_id(type), rows, row_bytes) : Buffer();
    const Buffer int8 = t.int8_activations ? quantize_rows(k, x) : Buffer();
    FloatArray y = new_floats({x.shape(0), static_cast<size_t>(n_rows)});
    MatmulArgs args;
    args.weights = packed ? groups.data() : rows.data;
    args.row_bytes = row_bytes;
    args.n_rows = n_rows;
    args.k = cols;
    args.x = t.int8_activations ? int8.data() : reinterpret_cast<const uint8_t*>(x.data());
    args.x_row_bytes = t.int8_activations ? q8_row_bytes(cols) : x.shape(1) * sizeof(float);
    args.n_tokens = static_cast<int64_t>(x.shape(0));
    args.y = y.data();
    args.ldy = n_rows;
    const nb::gil_scoped_release release;
    (packed ? t.matmul_packed : t.matmul)(args);
    return y;
}

// (codes [T, K] as float, scales [T, K / 32])
nb::tuple quantize_activations(const Matrix2& x, const std::string& isa) {
    const Buffer rows = quantize_rows(kernels(isa), x);
    const size_t n = x.shape(0), k = x.shape(1), n_blocks = k / kBlock;
    FloatArray codes = new_floats({n, k}), scales = new_floats({n, n_blocks});
    for (size_t t = 0; t < n; ++t) {
        const uint8_t* row = rows.data() + t * q8_row_bytes(static_cast<int64_t>(k));
        for (size_t i = 0; i < k; ++i) codes.data()[t * k + i] = static_cast<int8_t>(row[i]);
        std::memcpy(scales.data() + t * n_blocks, row + q8_row(static_cast<int64_t>(k)).scales,
                    n_blocks * sizeof(float));
    }
    return nb::make_tuple(codes, scales);
}

FloatArray rms_norm(const Matrix2& x, const Matrix2& weight, float eps, const std::string& isa) {
    if (weight.shape(0) != 1 || weight.shape(1) != x.shape(1)) throw RunError("the weight must be [1, K]");
    FloatArray out = new_floats({x.shape(0), x.shape(1)});
    const int64_t n = static_cast<int64_t>(x.shape(1));
    for (size_t t = 0; t < x.shape(0); ++t) {
        kernels(isa).rms_norm(x.data() + t * x.shape(1), weight.data(), n, eps, out.data() + t * x.shape(1));
    }
    return out;
}

FloatArray swiglu(const Matrix2& gate, const Matrix2& up, const std::string& isa) {
    if (gate.shape(0) != up.shape(0) || gate.shape(1) != up.shape(1)) throw RunError("shapes differ");
    FloatArray out = new_floats({gate.shape(0), gate.shape(1)});
    const size_t n = gate.shape(0) * gate.shape(1);
    std::memcpy(out.data(), gate.data(), n * sizeof(float));
    kernels(isa).swiglu(out.data(), up.data(), static_cast<int64_t>(n));
    return out;
}

// softmax(q @ k^T) @ v with keys and values rounded to FP16, block by block as the engine does.
FloatArray attention(const Matrix2& q, const Matrix2& keys, const Matrix2& values, const std::string& isa) {
    const Kernels& k = kernels(isa);
    const int64_t n_q = static_cast<int64_t>(q.shape(0)), n = static_cast<int64_t>(keys.shape(0));
    const int64_t dim = static_cast<int64_t>(q.shape(1));
    if (keys.shape(1) != q.shape(1) || values.shape(0) != keys.shape(0) || values.shape(1) != q.shape(1)) {
        throw RunError("q [Q, D], keys [N, D] and values [N, D] do not fit together");
    }
    std::vector<uint16_t> k16(static_cast<size_t>(n * dim)), v16(static_cast<size_t>(n * dim));
    k.to_half(keys.data(), n * dim, k16.data());
    k.to_half(values.data(), n * dim, v16.data());
    constexpr int64_t kStep = 64;
    std::vector<float> scores(static_cast<size_t>(n_q * kStep)), top(n_q, -HUGE_VALF), sum(n_q), rescale(n_q);
    FloatArray out = new_floats({q.shape(0), q.shape(1)});
    std::memset(out.data(), 0, static_cast<size_t>(n_q * dim) * sizeof(float));
    for (int64_t begin = 0; begin < n; begin += kStep) {
        const int64_t m = n - begin < kStep ? n - begin : kStep;
        k.attend_scores(q.data(), n_q, k16.data() + begin * dim, m, dim, scores.data(), kStep, nullptr);
        for (int64_t i = 0; i < n_q; ++i) {
            rescale[i] = k.softmax_block(scores.data() + i * kStep, m, m, &top[i], &sum[i]);
        }
        k.attend_values(scores.data(), kStep, rescale.data(), n_q, v16.data() + begin * dim, m, dim, out.data(),
                        nullptr);
    }
    for (int64_t i = 0; i < n_q * dim; ++i) out.data()[i] /= sum[i / dim];
    return out;
}

std::pair<std::vector<int32_t>, std::vector<float>> chosen_experts(const std::vector<float>& logits, int64_t n_used,
                                                                   bool normalize) {
    const int64_t n = static_cast<int64_t>(logits.size());
    if (n_used < 1 || n_used > n) {
        throw RunError("cannot choose " + std::to_string(n_used) + " of " + std::to_string(n) + " experts");
    }
    std::vector<int32_t> experts(static_cast<size_t>(n_used));
    std::vector<float> weights(experts.size());
    choose_experts(logits.data(), n, n_used, normalize, experts.data(), weights.data());
    return {experts, weights};
}

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (const char* const* name = available_isas(); *name; ++name) names.emplace_back(*name);
    return names;
}

std::vector<std::string> matmul_types() {
    std::vector<std::string> names;
    for (uint32_t i = 0; i < kTypeCount; ++i) {
        if (scalar_kernels()->types[i].matmul) names.emplace_back(type_info(i)->name);
    }
    return names;
}

std::vector<std::string> packed_types(const std::string& isa) {
    std::vector<std::string> names;
    for (uint32_t i = 0; i < kTypeCount; ++i) {
        if (kernels(isa).types[i].matmul_packed) names.emplace_back(type_info(i)->name);
    }
    return names;
}

}  // namespace

void bind_kernels(nb::module_& m) {
    const auto isa = nb::arg("isa") = "auto";
    m.def("cpu_isas", &cpu_isas, "Instruction sets that this CPU can run, slowest first.");
    m.def("matmul_types", &matmul_types, "Tensor types that the engine can multiply.");
    m.def("dequantize", &dequantize, nb::arg("type"), nb::arg("data"), nb::arg("n"), isa);
    m.def("matmul", &matmul, nb::arg("type"), nb::arg("weights"), nb::arg("n_rows"), nb::arg("x"), isa,
          nb::arg("packed") = false);
    m.def("packed_types", &packed_types, isa, "Tensor types whose weights this instruction set wants packed.");
    m.def("quantize_activations", &quantize_activations, nb::arg("x"), isa);
    m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), isa);
    m.def("swiglu", &swiglu, nb::arg("gate"), nb::arg("up"), isa);
    m.def("choose_experts", &chosen_experts, nb::arg("logits"), nb::arg("n_used"), nb::arg("normalize"),
          "A token's experts, the likeliest first, and their weights.");
    m.def("attention", &attention, nb::arg("q"), nb::arg("keys"), nb::arg("values"), isa);
}

}  // namespace qq
