// For any processor: one element at a time (what the compiler makes of it is its affair).
#include "loops.h"

namespace hvd_lbt {

const CpuKernels kPlainKernels = kernels_of<Scalar>("plain");

}  // namespace hvd_lbt
