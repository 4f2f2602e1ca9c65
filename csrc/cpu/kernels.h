// The loops over one stretch of memory, once per instruction set (cpu/loops.h writes them).
#pragma once

#include <stdint.h>

#include "../sgd_rule.h"
#include "../wire_rule.h"

namespace hvd_lbt {

// `count` consecutive elements of one parameter. Without momentum buffer may be null.
struct SgdSpan {
  float* weight;
  const void* gradient;  // in the form the function is chosen for
  float* buffer;         // momentum
  int64_t count;
};

struct Magnitudes {
  uint32_t source;  // largest magnitude of the sources, as bits
  uint32_t scaled;  // and of the scaled values
};

// Arrays are indexed by Form.
struct CpuKernels {
  const char* name;
  void (*sgd[kForms])(const SgdSpan&, float grad_scale, const SgdSettings&);
  void (*pack[kForms])(void* wire, const float* source, int64_t count, float scale, Magnitudes*);
  void (*unpack[kForms])(float* target, const void* wire, int64_t count, float scale);
};

extern const CpuKernels kPlainKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

}  // namespace hvd_lbt
