// The NEON kernels. Included by one file per instruction set, which sets QQ_ISA_NAME and is compiled with that set's
// flags: packed weights, attention and exponentials here, everything else as the compiler vectorizes the scalar kernels.
#pragma once

#include "neon_attention.h"
#include "neon_kv.h"
// After lanes and what else those above have for them:
#include "lane_attention.h"
#include "lane_kv_values.h"
#include "packed_tiles.h"

namespace qq {

namespace {

template <KvType T>
void add_kv_kernels(Kernels& k) {
    k.kv[static_cast<int>(T)].scores = kv_scores<T>;
    k.kv[static_cast<int>(T)].values = kv_values<T>;
}

Kernels make_table() {
    Kernels k = *scalar_kernels();
    k.isa = QQ_ISA_NAME;
    k.lanes = kLanes;
    add_packed_kernels(k);
    k.swiglu = swiglu;
    k.attend_scores = attend_scores;
    k.softmax_block = softmax_block;
    k.attend_values = attend_values;
    add_kv_kernels<KvType::kInt8>(k);
    add_kv_kernels<KvType::kInt4>(k);
    k.add_turned = add_turned;
    return k;
}

}  // namespace

}  // namespace qq
