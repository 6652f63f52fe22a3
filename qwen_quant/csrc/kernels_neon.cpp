// NEON with dot products (ARMv8.2).
#define QQ_ISA_NAME "neon"
#include "kernels_neon.h"

namespace qq {

const Kernels* neon_kernels() {
    static const Kernels table = make_table();
    return &table;
}

}  // namespace qq
