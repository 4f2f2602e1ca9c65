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

// How an error calls a tensor: "params[3]", or "wire" for one that is in no list.
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

inline void check_contiguous(const Tensor& tensor, const Name& name) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "hvd_lbt: ", name, " (sizes ", tensor.sizes(),
                    ", strides ", tensor.strides(), ") is not contiguous");
}

// A single float32 on the device: a scale or a flag.
inline void check_single(const Tensor& tensor, const Name& name, at::Device device) {
  check_strided(tensor, name, device);
  check_float(tensor, name);
  TORCH_CHECK_VALUE(tensor.numel() == 1, "hvd_lbt: ", name, " has sizes ", tensor.sizes(),
                    "; it must hold one element");
}

// The tensor's elements lie where the parameter's do: same sizes, same strides (of sizes above 1).
inline void check_like(const Tensor& tensor, const Name& name, const Tensor& param, int64_t index) {
  TORCH_CHECK_VALUE(tensor.sizes() == param.sizes(), "hvd_lbt: ", name, " has sizes ",
                    tensor.sizes(), ", params[", index, "] has ", param.sizes());
  for (int64_t d = 0; d < param.dim() && param.numel() > 0; ++d) {
    TORCH_CHECK_VALUE(param.size(d) == 1 || tensor.stride(d) == param.stride(d), "hvd_lbt: ", name,
                      " has strides ", tensor.strides(), ", params[", index, "] has ",
                      param.strides(), "; their memory must be laid out alike");
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
                            const std::optional<Tensor>& found_inf, TensorList clear,
                            TensorList low_precision) {
  check_length(grads, "grads", params, false);
  check_length(momenta, "momenta", params, momentum == 0.0);
  check_length(clear, "clear", params, true);
  check_length(low_precision, "low_precision", params, true);
  TORCH_CHECK_VALUE(!nesterov || !momenta.empty(), "hvd_lbt: nesterov needs momenta");
  const at::Device device = params[0].device();
  std::vector<Extent> extents;
  extents.reserve(5 * params.size() + 2);
  for (int64_t i = 0; i < static_cast<int64_t>(params.size()); ++i) {
    const Tensor& param = params[i];
    const auto add = [&](const Tensor& tensor, const Name& name, bool written) {
      check_strided(tensor, name, device);
      check_like(tensor, name, param, i);
      extents.push_back(extent_of(tensor, name, written));
    };
    check_float(param, {"params", i});
    add(param, {"params", i}, true);
    TORCH_CHECK_VALUE(param.is_non_overlapping_and_dense(), "hvd_lbt: params[", i, "] (sizes ",
                      param.sizes(), ", strides ", param.strides(),
                      ") has gaps or overlaps in its memory");
    check_wire_type(grads[i], {"grads", i});
    add(grads[i], {"grads", i}, false);
    if (!clear.empty()) {
      check_float(clear[i], {"clear", i});
      if (clear[i].const_data_ptr() == grads[i].const_data_ptr() &&
          grads[i].scalar_type() == at::kFloat) {
        extents.pop_back();  // a gradient may be cleared behind its own use
      }
      add(clear[i], {"clear", i}, true);
    }
    if (!momenta.empty()) {
      check_float(momenta[i], {"momenta", i});
      add(momenta[i], {"momenta", i}, true);
    }
    if (!low_precision.empty()) {
      const at::ScalarType type = low_precision[i].scalar_type();
      TORCH_CHECK_TYPE(type == at::kHalf || type == at::kBFloat16, "hvd_lbt: low_precision[", i,
                       "] is ", type, "; it must be float16 or bfloat16");
      add(low_precision[i], {"low_precision", i}, true);
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
  mark_written(clear);
  mark_written(low_precision);
}

// What pack_wire_ and unpack_wire_ demand of the bucket and the tensors laid into it.
inline void check_wire(const Tensor& wire, TensorList tensors, const char* list,
                       const Tensor& scale, const Tensor* overflow) {
  const bool packs = overflow != nullptr;
  const at::Device device = wire.device();
  check_strided(wire, {"wire"}, device);
  check_wire_type(wire, {"wire"});
  check_contiguous(wire, {"wire"});
  check_single(scale, {"scale"}, device);
  std::vector<Extent> extents{extent_of(wire, {"wire"}, packs), extent_of(scale, {"scale"}, false)};
  if (packs) {
    check_single(*overflow, {"overflow"}, device);
    extents.push_back(extent_of(*overflow, {"overflow"}, true));
  }
  int64_t total = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(tensors.size()); ++i) {
    const Name name{list, i};
    check_strided(tensors[i], name, device);
    check_float(tensors[i], name);
    check_contiguous(tensors[i], name);
    extents.push_back(extent_of(tensors[i], name, !packs));
    total += tensors[i].numel();
  }
  TORCH_CHECK_VALUE(total == wire.numel(), "hvd_lbt: the ", list, " hold ", total,
                    " elements, the wire ", wire.numel());
  check_overlap(extents);
  if (packs) {
    mark_written(wire);
    mark_written(*overflow);
  } else {
    mark_written(tensors);
  }
}

inline void check_pack_wire(const Tensor& wire, TensorList sources, const Tensor& scale,
                            const Tensor& overflow, int64_t summands) {
  TORCH_CHECK_VALUE(summands >= 1, "hvd_lbt: summands is ", summands, "; it must be at least 1");
  check_wire(wire, sources, "sources", scale, &overflow);
}

inline void check_unpack_wire(TensorList targets, const Tensor& wire, const Tensor& scale) {
  check_wire(wire, targets, "targets", scale, nullptr);
}

// Where in the bucket each tensor begins.
inline std::vector<int64_t> offsets_of(TensorList tensors) {
  std::vector<int64_t> offsets(tensors.size());
  int64_t total = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    offsets[i] = total;
    total += tensors[i].numel();
  }
  return offsets;
}

}  // namespace hvd_lbt
