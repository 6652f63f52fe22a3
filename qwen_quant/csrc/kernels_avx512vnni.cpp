// AVX-512 (VL, BW) with VNNI: the same kernels with one dot-product instruction and 32 registers, so 4 x 4 sums.
#define QQ_ISA_NAME "avx512vnni"
#define QQ_ROW_TILE 4
#include "kernels_x86.h"

namespace qq {

const Kernels* avx512vnni_kernels() {
    static const Kernels table = make_table();
    return &table;
}

}  // namespace qq
