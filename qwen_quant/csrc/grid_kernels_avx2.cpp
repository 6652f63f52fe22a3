#include "grid_loops.h"

namespace qq {

const GridKernels& avx2_grid_kernels() { return kTable; }

}  // namespace qq
