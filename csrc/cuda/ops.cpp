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
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                TensorList clear, TensorList low_precision) {
  if (params.empty()) return;
  check_fused_sgd(params, grads, momenta, momentum, nesterov, grad_scale, found_inf, clear,
                  low_precision);
  const c10::cuda::CUDAGuard guard(params[0].device());
  const auto floats = [](TensorList list, size_t i) {
    return list.empty() ? nullptr : list[i].mutable_data_ptr<float>();
  };
  std::vector<SgdTensor> tensors(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    tensors[i] = {params[i].mutable_data_ptr<float>(),
                  grads[i].const_data_ptr(),
                  floats(momenta, i),
                  floats(clear, i),
                  low_precision.empty() ? nullptr : low_precision[i].mutable_data_ptr(),
                  params[i].numel(),
                  form_of(grads[i]),
                  low_precision.empty() ? Form::kHalf : form_of(low_precision[i])};
  }
  cuda_sgd(tensors, maybe_float(grad_scale), maybe_float(found_inf),
           sgd_settings(lr, momentum, weight_decay, !momenta.empty(), grad_scale.has_value(),
                        nesterov, maximize),
           c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Data>
std::vector<WireTensor> wire_tensors(TensorList tensors, const Data& data) {
  const std::vector<int64_t> offsets = offsets_of(tensors);
  std::vector<WireTensor> entries(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    entries[i] = {data(tensors[i]), offsets[i], tensors[i].numel()};
  }
  return entries;
}

void pack_wire_(const Tensor& wire, TensorList sources, const Tensor& scale, const Tensor& overflow,
                int64_t summands) {
  check_pack_wire(wire, sources, scale, overflow, summands);
  const c10::cuda::CUDAGuard guard(wire.device());
  const auto read = [](const Tensor& tensor) {
    return const_cast<float*>(tensor.const_data_ptr<float>());  // the kernel only reads it
  };
  cuda_pack(wire.mutable_data_ptr(), form_of(wire), wire_tensors(sources, read),
            scale.const_data_ptr<float>(), overflow.mutable_data_ptr<float>(),
            static_cast<float>(summands), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void unpack_wire_(TensorList targets, const Tensor& wire, const Tensor& scale) {
  check_unpack_wire(targets, wire, scale);
  const c10::cuda::CUDAGuard guard(wire.device());
  const auto written = [](const Tensor& tensor) { return tensor.mutable_data_ptr<float>(); };
  cuda_unpack(wire_tensors(targets, written), wire.const_data_ptr(), form_of(wire),
              scale.const_data_ptr<float>(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(hvd_lbt, CUDA, library) {
  library.impl("fused_sgd_", fused_sgd_);
  library.impl("pack_wire_", pack_wire_);
  library.impl("unpack_wire_", unpack_wire_);
}

}  // namespace hvd_lbt
