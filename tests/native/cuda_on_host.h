// Enough of CUDA's language to run csrc/cuda/kernels.cu on the host, one thread after the other.
// It shows that every element is taken once and computed right; not how fast, and no data races.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(threads)

using cudaStream_t = void*;
struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx;

inline void atomicMax(int* to, int value) { *to = std::max(*to, value); }

static int launches;

template <class... Parameters, class... Arguments>
void run_on_host(unsigned blocks, unsigned threads, void (*kernel)(Parameters...),
                 Arguments... arguments) {
  ++launches;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(arguments...);
  }
}
