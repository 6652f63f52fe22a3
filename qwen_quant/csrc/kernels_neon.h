// The NEON kernels. Included by one file per instruction set, which sets QQ_ISA_NAME and is compiled with that set's
// flags: packed weights here, everything else as the compiler vectorizes the scalar kernels.
#pragma once

#include "neon_lanes.h"
// After neon_lanes.h:
#include "packed_tiles.h"

namespace qq {

namespace {

Kernels make_table() {
    Kernels k = *scalar_kernels();
    k.isa = QQ_ISA_NAME;
    k.lanes = kLanes;
    add_packed_kernels(k);
    return k;
}

}  // namespace

}  // namespace qq
