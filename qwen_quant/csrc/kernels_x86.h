// The x86 kernels. Included by one file per instruction set, which sets QQ_ISA_NAME and QQ_ROW_TILE and is compiled
// with that set's flags; everything is in an unnamed namespace so that no two sets share a function.
#pragma once

#include "kernels.h"
#include "x86_attention.h"
#include "x86_elementwise.h"
#include "x86_floats.h"
#include "x86_kv.h"
#include "x86_matmul.h"
// After lanes and what else those above have for them:
#include "lane_attention.h"
#include "lane_kv_values.h"
#include "packed_tiles.h"

namespace qq {

namespace {

template <class Stored>
TypeKernels blocks() {
    return {matmul_blocks<Stored>, dequantize_blocks<Stored>, true};
}

template <KvType T>
KvKernels kv_kernels() {
    return {store_key<T>, store_value<T>, quantize_queries<T>, kv_scores<T>, kv_values<T>};
}

Kernels make_table() {
    Kernels k = *scalar_kernels();
    k.isa = QQ_ISA_NAME;
    k.lanes = kLanes;
    k.types[kF32] = {matmul_floats<AsFloats<LoadF32>>, dequantize_floats<LoadF32>, false};
    k.types[kF16] = {matmul_floats<AsFloats<LoadF16>>, dequantize_floats<LoadF16>, false};
    k.types[kBF16] = {matmul_floats<AsFloats<LoadBF16>>, dequantize_floats<LoadBF16>, false};
    k.types[kQ8_0] = blocks<BlockQ8_0>();
    k.types[kQ4_0] = blocks<BlockQ4_0>();
    k.types[kQ4_1] = blocks<BlockQ4_1>();
    add_packed_kernels(k);
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

}  // namespace qq
