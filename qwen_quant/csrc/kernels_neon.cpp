// NEON with dot products (ARMv8.2): packed weights here, everything else as the compiler vectorizes the scalar kernels.
#include "neon_lanes.h"
#include "packed_tiles.h"

namespace qq {

namespace {

Kernels make_table() {
    Kernels k = *scalar_kernels();
    k.isa = "neon";
    k.lanes = kLanes;
    add_packed_kernels(k);
    return k;
}

}  // namespace

const Kernels* neon_kernels() {
    static const Kernels table = make_table();
    return &table;
}

}  // namespace qq
