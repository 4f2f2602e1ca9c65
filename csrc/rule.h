// What the rules of one element are written with: CPU (any vector width) and CUDA read the same
// text.
#pragma once

#if defined(__CUDACC__)
#define HVD_RULE static __host__ __device__ __forceinline__
#else
// static and always inlined: each CPU file is compiled for its own instruction set, and no copy
// made for AVX-512 may be the one the linker hands to the others.
#define HVD_RULE static inline __attribute__((always_inline))
#endif
