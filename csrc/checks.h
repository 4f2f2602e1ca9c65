// What the operators demand of their tensors, the same on every device. Errors name the list, the
// tensor's index in it, and what is wrong.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "wire_rule.h"

namespace hvd_lbt {

using at::Tensor;
using at::TensorList;

// How an error calls a tensor: "params[3]", or "scale" for one that is in no list.
struct Name {
  const char* list;
  int64_t index = -1;
};
inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.list;
  return name.index < 0 ? out : out << '[' << name.index << ']';
}

inline bool is_wire_type(at::ScalarType type) {
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

inline Form form_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return Form::kHalf;
    case at::kBFloat16:
      return Form::kBfloat16;
    default:
      return Form::kFloat;
  }
}

inline void check_strided(const Tensor& tensor, const Name& name, at::Device device) {
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, "hvd_lbt: ", name, " is ", tensor.layout(),
                    "; only strided (dense) tensors can be updated");
  TORCH_CHECK_VALUE(tensor.device() == device, "hvd_lbt: ", name, " is on ", tensor.device(),
                    ", the first tensor on ", device, "; all must share one device");
}

inline void check_float(const Tensor& tensor, const Name& name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, "hvd_lbt: ", name, " is ",
                   tensor.scalar_type(), "; it must be float32");
}

inline void check_wire_type(const Tensor& tensor, const Name& name) {
  TORCH_CHECK_TYPE(is_wire_type(tensor.scalar_type()), "hvd_lbt: ", name, " is ",
                   tensor.scalar_type(), "; it must be float32, float16 or bfloat16");
}

inline void check_dense(const Tensor& tensor, const Name& name) {
  TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense(), "hvd_lbt: ", name, " (sizes ",
                    tensor.sizes(), ", strides ", tensor.strides(),
                    ") has gaps or overlaps in its memory");
}

// A single float32 on the device: a scale or a flag.
inline void check_single(const Tensor& tensor, const Name& name, at::Device device) {
  check_strided(tensor, name, device);
  check_float(tensor, name);
  TORCH_CHECK_VALUE(tensor.numel() == 1, "hvd_lbt: ", name, " has sizes ", tensor.sizes(),
                    "; it must hold one element");
}

// The tensor's elements lie where the other's do: same sizes, same strides (of sizes above 1).
inline void check_like(const Tensor& tensor, const Name& name, const Tensor& other,
                       const Name& other_name) {
  TORCH_CHECK_VALUE(tensor.sizes() == other.sizes(), "hvd_lbt: ", name, " has sizes ",
                    tensor.sizes(), ", ", other_name, " has ", other.sizes());
  for (int64_t d = 0; d < other.dim() && other.numel() > 0; ++d) {
    TORCH_CHECK_VALUE(other.size(d) == 1 || tensor.stride(d) == other.stride(d), "hvd_lbt: ", name,
                      " has strides ", tensor.strides(), ", ", other_name, " has ", other.strides(),
                      "; their memory must be laid out alike");
  }
}

// Memory one tensor takes part in the call with.
struct Extent {
  const char* begin;
  const char* end;
  Name name;
  bool written;
};

inline Extent extent_of(const Tensor& tensor, const Name& name, bool written) {
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + tensor.numel() * tensor.element_size(), name, written};
}

// What is written may overlap nothing else: one sweep over the extents in order of address.
inline void check_overlap(std::vector<Extent>& extents) {
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  const Extent* reach = nullptr;          // reaches furthest of those before
  const Extent* written_reach = nullptr;  // and of the written ones
  for (const Extent& extent : extents) {
    if (extent.begin == extent.end) continue;
    const Extent* before = extent.written ? reach : written_reach;
    TORCH_CHECK_VALUE(before == nullptr || before->end <= extent.begin, "hvd_lbt: ", before->name,
                      " and ", extent.name, " overlap in memory, and one of them is written");
    if (reach == nullptr || extent.end > reach->end) reach = &extent;
    if (extent.written && (written_reach == nullptr || extent.end > written_reach->end)) {
      written_reach = &extent;
    }
  }
}

// Autograd's check that a saved tensor was not changed in place counts versions.
inline void mark_written(const Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}
inline void mark_written(TensorList tensors) {
  for (const Tensor& tensor : tensors) mark_written(tensor);
}

inline void check_length(TensorList list, const char* name, TensorList params, bool may_be_empty) {
  TORCH_CHECK_VALUE(list.size() == params.size() || (may_be_empty && list.empty()),
                    "hvd_lbt: there are ", list.size(), " ", name, " for ", params.size(),
                    " params");
}

// Everything fused_sgd_ demands; also counts its writes for autograd. params must not be empty.
inline void check_fused_sgd(TensorList params, TensorList grads, TensorList momenta,
                            double momentum, bool nesterov, const std::optional<Tensor>& grad_scale,
                            const std::optional<Tensor>& found_inf) {
  check_length(grads, "grads", params, false);
  check_length(momenta, "momenta", params, momentum == 0.0);
  TORCH_CHECK_VALUE(!nesterov || !momenta.empty(), "hvd_lbt: nesterov needs momenta");
  const at::Device device = params[0].device();
  std::vector<Extent> extents;
  extents.reserve(3 * params.size() + 2);
  for (int64_t i = 0; i < static_cast<int64_t>(params.size()); ++i) {
    const Tensor& param = params[i];
    const auto add = [&](const Tensor& tensor, const Name& name, bool written) {
      check_strided(tensor, name, device);
      check_like(tensor, name, param, {"params", i});
      extents.push_back(extent_of(tensor, name, written));
    };
    check_float(param, {"params", i});
    add(param, {"params", i}, true);
    check_dense(param, {"params", i});
    check_wire_type(grads[i], {"grads", i});
    add(grads[i], {"grads", i}, false);
    if (!momenta.empty()) {
      check_float(momenta[i], {"momenta", i});
      add(momenta[i], {"momenta", i}, true);
    }
  }
  if (grad_scale) {
    check_single(*grad_scale, {"grad_scale"}, device);
    extents.push_back(extent_of(*grad_scale, {"grad_scale"}, false));
  }
  if (found_inf) {
    check_single(*found_inf, {"found_inf"}, device);
    extents.push_back(extent_of(*found_inf, {"found_inf"}, false));
  }
  check_overlap(extents);
  mark_written(params);
  mark_written(momenta);
}

// What pack_wire_ and unpack_wire_ demand: wires[i] is laid out as tensors[i], and all wires have
// one form. The lists must not be empty.
inline void check_wires(TensorList wires, TensorList tensors, const char* list, const Tensor& scale,
                        const Tensor* overflow) {
  const bool packs = overflow != nullptr;
  TORCH_CHECK_VALUE(wires.size() == tensors.size(), "hvd_lbt: there are ", wires.size(),
                    " wires for ", tensors.size(), " ", list);
  const at::Device device = wires[0].device();
  check_single(scale, {"scale"}, device);
  std::vector<Extent> extents{extent_of(scale, {"scale"}, false)};
  extents.reserve(2 * wires.size() + 2);
  if (packs) {
    check_single(*overflow, {"overflow"}, device);
    extents.push_back(extent_of(*overflow, {"overflow"}, true));
  }
  for (int64_t i = 0; i < static_cast<int64_t>(tensors.size()); ++i) {
    const Name name{list, i}, wire{"wires", i};
    check_strided(tensors[i], name, device);
    check_float(tensors[i], name);
    check_dense(tensors[i], name);
    check_strided(wires[i], wire, device);
    check_wire_type(wires[i], wire);
    TORCH_CHECK_TYPE(wires[i].scalar_type() == wires[0].scalar_type(), "hvd_lbt: ", wire, " is ",
                     wires[i].scalar_type(), ", wires[0] ", wires[0].scalar_type());
    check_like(wires[i], wire, tensors[i], name);
    extents.push_back(extent_of(tensors[i], name, !packs));
    extents.push_back(extent_of(wires[i], wire, packs));
  }
  check_overlap(extents);
  if (packs) {
    mark_written(wires);
    mark_written(*overflow);
  } else {
    mark_written(tensors);
  }
}

inline void check_pack_wire(TensorList wires, TensorList sources, const Tensor& scale,
                            const Tensor& overflow, int64_t summands) {
  TORCH_CHECK_VALUE(summands >= 1, "hvd_lbt: summands is ", summands, "; it must be at least 1");
  check_wires(wires, sources, "sources", scale, &overflow);
}

inline void check_unpack_wire(TensorList targets, TensorList wires, const Tensor& scale) {
  check_wires(wires, targets, "targets", scale, nullptr);
}

}  // namespace hvd_lbt
