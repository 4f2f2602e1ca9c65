// The operators on CPU: elements of all tensors are dealt evenly to the threads, each thread walks
// its share with the loops of the best instruction set this processor has.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>

#include "../checks.h"
#include "kernels.h"

namespace hvd_lbt {
namespace {

// A thread's least share, in elements: below it the start of a thread costs more than it saves.
constexpr int64_t kGrain = 32768;

std::vector<const CpuKernels*> supported_kernels() {
  std::vector<const CpuKernels*> best_first;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) best_first.push_back(&kAvx512Kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    best_first.push_back(&kAvx2Kernels);
  }
#endif
  best_first.push_back(&kPlainKernels);
  return best_first;
}

std::atomic<const CpuKernels*>& chosen_kernels() {
  static std::atomic<const CpuKernels*> chosen{supported_kernels().front()};
  return chosen;
}

std::string cpu_isa(std::optional<c10::string_view> choose) {
  if (choose) {
    const CpuKernels* found = nullptr;
    std::string names;
    for (const CpuKernels* kernels : supported_kernels()) {
      if (*choose == kernels->name) found = kernels;
      names += std::string(names.empty() ? "" : ", ") + kernels->name;
    }
    TORCH_CHECK_VALUE(found != nullptr, "hvd_lbt: no instruction set '", *choose,
                      "' here; this processor has ", names);
    chosen_kernels() = found;
  }
  return chosen_kernels().load()->name;
}

// Deal the elements of all tensors to the threads: work(tensor index, first element, count).
template <class Work>
void for_each_share(TensorList tensors, const Work& work) {
  std::vector<int64_t> ends(tensors.size());  // ends[i]: elements in tensors 0..i
  int64_t total = 0;
  for (size_t i = 0; i < tensors.size(); ++i) ends[i] = total += tensors[i].numel();
  at::parallel_for(0, total, kGrain, [&](int64_t at, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin();
    while (at < end) {
      const int64_t start = ends[i] - tensors[i].numel();
      const int64_t stop = std::min(end, ends[i]);
      if (stop > at) work(i, at - start, stop - at);
      at = stop;
      ++i;
    }
  });
}

char* address(const Tensor& tensor, int64_t element) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + element * tensor.element_size();
}
const char* const_address(const Tensor& tensor, int64_t element) {
  return static_cast<const char*>(tensor.const_data_ptr()) + element * tensor.element_size();
}

void fused_sgd_(TensorList params, TensorList grads, TensorList momenta, double lr, double momentum,
                double weight_decay, bool nesterov, bool maximize,
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  if (params.empty()) return;
  check_fused_sgd(params, grads, momenta, momentum, nesterov, grad_scale, found_inf);
  if (found_inf && *found_inf->const_data_ptr<float>() != 0.0f) return;
  const SgdSettings settings = sgd_settings(lr, momentum, weight_decay, !momenta.empty(),
                                            grad_scale.has_value(), nesterov, maximize);
  const float scale = grad_scale ? *grad_scale->const_data_ptr<float>() : 1.0f;
  const CpuKernels& kernels = *chosen_kernels();
  const auto maybe = [](TensorList list, size_t i, int64_t first) {
    return list.empty() ? nullptr : address(list[i], first);
  };
  for_each_share(params, [&](size_t i, int64_t first, int64_t count) {
    const SgdSpan span{reinterpret_cast<float*>(address(params[i], first)),
                       const_address(grads[i], first),
                       reinterpret_cast<float*>(maybe(momenta, i, first)), count};
    kernels.sgd[static_cast<int>(form_of(grads[i]))](span, scale, settings);
  });
}

void pack_wire_(TensorList wires, TensorList sources, const Tensor& scale, const Tensor& overflow,
                int64_t summands) {
  if (wires.empty() && sources.empty()) return;
  check_pack_wire(wires, sources, scale, overflow, summands);
  const Form form = form_of(wires[0]);
  const auto pack = chosen_kernels().load()->pack[static_cast<int>(form)];
  const float factor = *scale.const_data_ptr<float>();
  Magnitudes magnitudes{0, 0};
  std::mutex joining;
  for_each_share(sources, [&](size_t i, int64_t first, int64_t count) {
    Magnitudes mine{0, 0};
    pack(address(wires[i], first), sources[i].const_data_ptr<float>() + first, count, factor,
         &mine);
    const std::lock_guard<std::mutex> lock(joining);
    magnitudes.source = std::max(magnitudes.source, mine.source);
    magnitudes.scaled = std::max(magnitudes.scaled, mine.scaled);
  });
  const float flag = [&] {
    switch (form) {
      case Form::kHalf:
        return overflow_rule<Half>(magnitudes.source, magnitudes.scaled,
                                   static_cast<float>(summands));
      case Form::kBfloat16:
        return overflow_rule<Bfloat16>(magnitudes.source, magnitudes.scaled,
                                       static_cast<float>(summands));
      default:
        return overflow_rule<float>(magnitudes.source, magnitudes.scaled,
                                    static_cast<float>(summands));
    }
  }();
  float* raised = overflow.mutable_data_ptr<float>();
  if (flag > *raised) *raised = flag;
}

void unpack_wire_(TensorList targets, TensorList wires, const Tensor& scale) {
  if (wires.empty() && targets.empty()) return;
  check_unpack_wire(targets, wires, scale);
  const auto unpack = chosen_kernels().load()->unpack[static_cast<int>(form_of(wires[0]))];
  const float factor = *scale.const_data_ptr<float>();
  for_each_share(targets, [&](size_t i, int64_t first, int64_t count) {
    unpack(targets[i].mutable_data_ptr<float>() + first, const_address(wires[i], first), count,
           factor);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hvd_lbt, CPU, library) {
  library.impl("fused_sgd_", fused_sgd_);
  library.impl("pack_wire_", pack_wire_);
  library.impl("unpack_wire_", unpack_wire_);
}

TORCH_LIBRARY_IMPL(hvd_lbt, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", cpu_isa);
}

}  // namespace hvd_lbt
