// AVX2, FMA and F16C: 16 registers hold 2 x 4 sums and what feeds them.
#define QQ_ISA_NAME "avx2"
#define QQ_ROW_TILE 2
#include "kernels_x86.h"

namespace qq {

const Kernels* avx2_kernels() {
    static const Kernels table = make_table();
    return &table;
}

}  // namespace qq
