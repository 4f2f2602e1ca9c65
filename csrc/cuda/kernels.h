// The kernels of csrc/cuda/kernels.cu, without a word of PyTorch.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "../sgd_rule.h"
#include "../wire_rule.h"

namespace hvd_lbt {

// One parameter, its elements in the order of memory. buffer may be null.
struct SgdTensor {
  float* weight;
  const void* gradient;  // in gradient_form
  float* buffer;         // momentum
  int64_t count;
  Form gradient_form;
};

// One tensor and its place on the wire; packing only reads the values, unpacking only the wire.
struct WireTensor {
  float* values;
  void* wire;
  int64_t count;
};

// As the operators of csrc/ops.cpp say. Scales and flags are read on the device; nothing waits for
// it. One launch for up to 741 (cuda_sgd) or 1,165 tensors.
void cuda_sgd(const std::vector<SgdTensor>& tensors, const float* grad_scale,
              const float* found_inf, const SgdSettings& settings, cudaStream_t stream);
void cuda_pack(const std::vector<WireTensor>& tensors, Form form, const float* scale,
               float* overflow, float summands, cudaStream_t stream);
void cuda_unpack(const std::vector<WireTensor>& tensors, Form form, const float* scale,
                 cudaStream_t stream);

}  // namespace hvd_lbt
