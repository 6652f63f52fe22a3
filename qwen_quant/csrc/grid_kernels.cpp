#include "grid_kernels.h"

#include "grid_loops.h"
#include "kernels.h"

namespace qq {

const GridKernels& grid_kernels() {
#ifdef QQ_X86
    if (find_kernels("avx2")) return avx2_grid_kernels();
#endif
    return kTable;
}

}  // namespace qq
