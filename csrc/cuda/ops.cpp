// The operators on CUDA: checks, and one call for all tensors on the current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "kernels.h"

namespace hvd_lbt {
namespace {

const float* maybe_float(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

void fused_sgd_(TensorList params, TensorList grads, TensorList momenta, double lr, double momentum,
                double weight_decay, bool nesterov, bool maximize,
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  if (params.empty()) return;
  check_fused_sgd(params, grads, momenta, momentum, nesterov, grad_scale, found_inf);
  const c10::cuda::CUDAGuard guard(params[0].device());
  std::vector<SgdTensor> tensors(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    tensors[i] = {params[i].mutable_data_ptr<float>(), grads[i].const_data_ptr(),
                  momenta.empty() ? nullptr : momenta[i].mutable_data_ptr<float>(),
                  params[i].numel(), form_of(grads[i])};
  }
  cuda_sgd(tensors, maybe_float(grad_scale), maybe_float(found_inf),
           sgd_settings(lr, momentum, weight_decay, !momenta.empty(), grad_scale.has_value(),
                        nesterov, maximize),
           c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::vector<WireTensor> wire_tensors(TensorList tensors, TensorList wires) {
  std::vector<WireTensor> entries(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {  // each kernel only reads one of the two
    entries[i] = {const_cast<float*>(tensors[i].const_data_ptr<float>()),
                  const_cast<void*>(wires[i].const_data_ptr()), tensors[i].numel()};
  }
  return entries;
}

void pack_wire_(TensorList wires, TensorList sources, const Tensor& scale, const Tensor& overflow,
                int64_t summands) {
  if (wires.empty() && sources.empty()) return;
  check_pack_wire(wires, sources, scale, overflow, summands);
  const c10::cuda::CUDAGuard guard(wires[0].device());
  cuda_pack(wire_tensors(sources, wires), form_of(wires[0]), scale.const_data_ptr<float>(),
            overflow.mutable_data_ptr<float>(), static_cast<float>(summands),
            c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void unpack_wire_(TensorList targets, TensorList wires, const Tensor& scale) {
  if (wires.empty() && targets.empty()) return;
  check_unpack_wire(targets, wires, scale);
  const c10::cuda::CUDAGuard guard(wires[0].device());
  cuda_unpack(wire_tensors(targets, wires), form_of(wires[0]), scale.const_data_ptr<float>(),
              c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(hvd_lbt, CUDA, library) {
  library.impl("fused_sgd_", fused_sgd_);
  library.impl("pack_wire_", pack_wire_);
  library.impl("unpack_wire_", unpack_wire_);
}

}  // namespace hvd_lbt
