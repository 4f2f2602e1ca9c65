// The operators on CUDA. A table of all tensors travels in the kernel's arguments (CUDA 12.1 gave
// them 32,764 bytes), so that one launch does them all, captured by a CUDA graph or not. Each block
// takes kBlockElements consecutive elements of one tensor.
#include <cuda_runtime.h>

#include "kernels.h"

static_assert(CUDART_VERSION >= 12010, "kernel arguments above 4 KB need CUDA 12.1");

namespace hvd_lbt {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 4;  // elements of one access: 16 bytes of fp32
constexpr int64_t kBlockElements = 4 * kThreads * kWidth;

template <class Entry>
struct Table {
  static constexpr int kRoom = (32764 - 128) / (sizeof(Entry) + sizeof(uint32_t));
  Entry entries[kRoom];
  uint32_t ends[kRoom];  // blocks of the entries up to and with this one
  int size;
};

// Which elements of which entry a block takes: [begin, end).
struct Share {
  int entry;
  int64_t begin, end;
};

template <class Entry>
__device__ Share share_of_block(const Table<Entry>& table) {
  int low = 0, high = table.size - 1;
  while (low < high) {  // the first entry that ends behind this block
    const int middle = (low + high) / 2;
    if (table.ends[middle] > blockIdx.x) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const uint32_t first_block = low == 0 ? 0 : table.ends[low - 1];
  const int64_t begin = (blockIdx.x - first_block) * kBlockElements;
  const int64_t count = table.entries[low].count;
  return {low, begin, begin + kBlockElements < count ? begin + kBlockElements : count};
}

template <class T>
struct alignas(kWidth * sizeof(T)) Vector {
  T values[kWidth];
};

// Whether whole vectors can be read and written there (a null pointer is not used at all).
template <class T>
__device__ bool aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vector<T>) == 0;
}

template <class T>
__device__ Vector<T>& vector_at(T* pointer, int64_t at) {
  return *reinterpret_cast<Vector<T>*>(pointer + at);
}
template <class T>
__device__ const Vector<T>& vector_at(const T* pointer, int64_t at) {
  return *reinterpret_cast<const Vector<T>*>(pointer + at);
}

// Deal [begin, end) to the block's threads: whole(at) for kWidth elements where `vectors` allows
// it, one(at) for the others.
template <class Whole, class One>
__device__ void deal(const Share& share, bool vectors, const Whole& whole, const One& one) {
  int64_t rest = share.begin;
  if (vectors) {
    rest += (share.end - share.begin) / kWidth * kWidth;
    for (int64_t at = share.begin + threadIdx.x * kWidth; at < rest; at += kThreads * kWidth) {
      whole(at);
    }
  }
  for (int64_t at = rest + threadIdx.x; at < share.end; at += kThreads) one(at);
}

template <class G>
__device__ void sgd_share(const SgdTensor& tensor, const Share& share, float scale,
                          const SgdSettings& settings) {
  const G* gradient = static_cast<const G*>(tensor.gradient);
  const bool vectors = aligned(tensor.weight) && aligned(gradient) && aligned(tensor.buffer);
  deal(
      share, vectors,
      [&](int64_t at) {
        Vector<float> weight = vector_at(tensor.weight, at);
        const Vector<G> incoming = vector_at(gradient, at);
        Vector<float> buffer{};
        if (settings.has_momentum) buffer = vector_at(tensor.buffer, at);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          sgd_rule(weight.values[i], from_wire(incoming.values[i]), buffer.values[i], scale,
                   settings);
        }
        vector_at(tensor.weight, at) = weight;
        if (settings.has_momentum) vector_at(tensor.buffer, at) = buffer;
      },
      [&](int64_t at) {
        float weight = tensor.weight[at];
        float buffer = settings.has_momentum ? tensor.buffer[at] : 0.0f;
        sgd_rule(weight, from_wire(gradient[at]), buffer, scale, settings);
        tensor.weight[at] = weight;
        if (settings.has_momentum) tensor.buffer[at] = buffer;
      });
}

__global__ void __launch_bounds__(kThreads)
    sgd_kernel(const __grid_constant__ Table<SgdTensor> table, const float* grad_scale,
               const float* found_inf, const SgdSettings settings) {
  if (found_inf != nullptr && *found_inf != 0.0f) return;
  const float scale = grad_scale == nullptr ? 1.0f : *grad_scale;
  const Share share = share_of_block(table);
  const SgdTensor& tensor = table.entries[share.entry];
  switch (tensor.gradient_form) {
    case Form::kFloat:
      return sgd_share<float>(tensor, share, scale, settings);
    case Form::kHalf:
      return sgd_share<Half>(tensor, share, scale, settings);
    case Form::kBfloat16:
      return sgd_share<Bfloat16>(tensor, share, scale, settings);
  }
}

template <class W>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ Table<WireTensor> table, const float* scale,
                float* overflow, float summands) {
  const Share share = share_of_block(table);
  const float* source = table.entries[share.entry].values;
  W* target = static_cast<W*>(table.entries[share.entry].wire);
  const float factor = *scale;
  uint32_t source_peak = 0, scaled_peak = 0;
  const auto pack = [&](float value) {
    const float scaled = pack_rule(value, factor);
    const uint32_t source_bits = bits_of(value) & kMagnitude;
    const uint32_t scaled_bits = bits_of(scaled) & kMagnitude;
    source_peak = source_bits > source_peak ? source_bits : source_peak;
    scaled_peak = scaled_bits > scaled_peak ? scaled_bits : scaled_peak;
    return scaled;
  };
  deal(
      share, aligned(source) && aligned(target),
      [&](int64_t at) {
        const Vector<float> values = vector_at(source, at);
        Vector<W> packed;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) to_wire(pack(values.values[i]), &packed.values[i]);
        vector_at(target, at) = packed;
      },
      [&](int64_t at) { to_wire(pack(source[at]), target + at); });
  const float flag = overflow_rule<W>(source_peak, scaled_peak, summands);
  if (flag > 0.0f) {  // rare; floats from 0 on order as their bits do
    atomicMax(reinterpret_cast<int*>(overflow), static_cast<int>(bits_of(flag)));
  }
}

template <class W>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const __grid_constant__ Table<WireTensor> table, const float* scale) {
  const Share share = share_of_block(table);
  float* target = table.entries[share.entry].values;
  const W* source = static_cast<const W*>(table.entries[share.entry].wire);
  const float factor = *scale;
  deal(
      share, aligned(source) && aligned(target),
      [&](int64_t at) {
        const Vector<W> values = vector_at(source, at);
        Vector<float> unpacked;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          unpacked.values[i] = unpack_rule(from_wire(values.values[i]), factor);
        }
        vector_at(target, at) = unpacked;
      },
      [&](int64_t at) { target[at] = unpack_rule(from_wire(source[at]), factor); });
}

// launch(table, blocks) for as many tensors at a time as a table has room for.
template <class Entry, class Launch>
void in_tables(const std::vector<Entry>& tensors, const Launch& launch) {
  Table<Entry> table;
  table.size = 0;
  uint32_t blocks = 0;
  for (const Entry& tensor : tensors) {
    if (tensor.count == 0) continue;
    if (table.size == Table<Entry>::kRoom) {
      launch(table, blocks);
      table.size = 0;
      blocks = 0;
    }
    blocks += static_cast<uint32_t>((tensor.count + kBlockElements - 1) / kBlockElements);
    table.entries[table.size] = tensor;
    table.ends[table.size++] = blocks;
  }
  if (table.size > 0) launch(table, blocks);
}

template <class W>
void pack_as(const std::vector<WireTensor>& tensors, const float* scale, float* overflow,
             float summands, cudaStream_t stream) {
  in_tables(tensors, [&](const Table<WireTensor>& table, uint32_t blocks) {
    pack_kernel<W><<<blocks, kThreads, 0, stream>>>(table, scale, overflow, summands);
  });
}

template <class W>
void unpack_as(const std::vector<WireTensor>& tensors, const float* scale, cudaStream_t stream) {
  in_tables(tensors, [&](const Table<WireTensor>& table, uint32_t blocks) {
    unpack_kernel<W><<<blocks, kThreads, 0, stream>>>(table, scale);
  });
}

}  // namespace

void cuda_sgd(const std::vector<SgdTensor>& tensors, const float* grad_scale,
              const float* found_inf, const SgdSettings& settings, cudaStream_t stream) {
  in_tables(tensors, [&](const Table<SgdTensor>& table, uint32_t blocks) {
    sgd_kernel<<<blocks, kThreads, 0, stream>>>(table, grad_scale, found_inf, settings);
  });
}

void cuda_pack(const std::vector<WireTensor>& tensors, Form form, const float* scale,
               float* overflow, float summands, cudaStream_t stream) {
  switch (form) {
    case Form::kFloat:
      return pack_as<float>(tensors, scale, overflow, summands, stream);
    case Form::kHalf:
      return pack_as<Half>(tensors, scale, overflow, summands, stream);
    case Form::kBfloat16:
      return pack_as<Bfloat16>(tensors, scale, overflow, summands, stream);
  }
}

void cuda_unpack(const std::vector<WireTensor>& tensors, Form form, const float* scale,
                 cudaStream_t stream) {
  switch (form) {
    case Form::kFloat:
      return unpack_as<float>(tensors, scale, stream);
    case Form::kHalf:
      return unpack_as<Half>(tensors, scale, stream);
    case Form::kBfloat16:
      return unpack_as<Bfloat16>(tensors, scale, stream);
  }
}

}  // namespace hvd_lbt
