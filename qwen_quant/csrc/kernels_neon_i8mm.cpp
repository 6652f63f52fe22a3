// NEON with dot products, and products of int8 matrices for several tokens (ARMv8.6; i8mm).
#define QQ_ISA_NAME "neon-i8mm"
#include "kernels_neon.h"

namespace qq {

const Kernels* neon_i8mm_kernels() {
    static const Kernels table = make_table();
    return &table;
}

}  // namespace qq
