// The loops of CpuKernels, written once for any instruction set. A file that includes this has
// switched the compiler to its instruction set before, and names the set's vector type in
//   struct Isa { V; kWidth; load(form*); store(form*, V); Peak }.
// Everything has internal linkage: these are different functions in every file.
#pragma once

#include "kernels.h"

namespace hvd_lbt {
namespace {

// One element at a time: heads, tails, and all there is in plain code.
struct Scalar {
  using V = float;
  static constexpr int64_t kWidth = 1;
  template <class W>
  static V load(const W* from) {
    return from_wire(*from);
  }
  template <class W>
  static void store(W* to, V value) {
    to_wire(value, to);
  }
  // The largest magnitude seen, as bits.
  struct Peak {
    uint32_t value = 0;
    void see(V seen) {
      const uint32_t bits = bits_of(seen) & kMagnitude;
      value = bits > value ? bits : value;
    }
    uint32_t get() const { return value; }
  };
};

template <class I, class G>
inline int64_t sgd_range(const SgdSpan& span, int64_t at, int64_t end, float grad_scale,
                         const SgdSettings& settings) {
  const G* gradient = static_cast<const G*>(span.gradient);
  for (; at + I::kWidth <= end; at += I::kWidth) {
    typename I::V weight = I::load(span.weight + at);
    typename I::V buffer{};
    if (settings.has_momentum) buffer = I::load(span.buffer + at);
    sgd_rule(weight, I::load(gradient + at), buffer, grad_scale, settings);
    if (settings.has_momentum) I::store(span.buffer + at, buffer);
    I::store(span.weight + at, weight);
  }
  return at;
}

// How many elements lie before `pointer` is aligned to a whole vector.
template <class I, class T>
inline int64_t head(const T* pointer, int64_t count) {
  const int64_t past =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer) / sizeof(T)) % I::kWidth;
  const int64_t before = past == 0 ? 0 : I::kWidth - past;
  return before < count ? before : count;
}

template <class I, class G>
void sgd(const SgdSpan& span, float grad_scale, const SgdSettings& settings) {
  int64_t at =
      sgd_range<Scalar, G>(span, 0, head<I>(span.weight, span.count), grad_scale, settings);
  at = sgd_range<I, G>(span, at, span.count, grad_scale, settings);
  sgd_range<Scalar, G>(span, at, span.count, grad_scale, settings);
}

template <class I, class W>
inline int64_t pack_range(W* wire, const float* source, int64_t at, int64_t end, float scale,
                          Magnitudes* magnitudes) {
  typename I::Peak source_peak, scaled_peak;
  for (; at + I::kWidth <= end; at += I::kWidth) {
    const typename I::V value = I::load(source + at);
    const typename I::V scaled = pack_rule(value, scale);
    source_peak.see(value);
    scaled_peak.see(scaled);
    I::store(wire + at, scaled);
  }
  const uint32_t source_seen = source_peak.get(), scaled_seen = scaled_peak.get();
  if (source_seen > magnitudes->source) magnitudes->source = source_seen;
  if (scaled_seen > magnitudes->scaled) magnitudes->scaled = scaled_seen;
  return at;
}

template <class I, class W>
void pack(void* to, const float* source, int64_t count, float scale, Magnitudes* magnitudes) {
  W* wire = static_cast<W*>(to);
  int64_t at = pack_range<Scalar>(wire, source, 0, head<I>(source, count), scale, magnitudes);
  at = pack_range<I>(wire, source, at, count, scale, magnitudes);
  pack_range<Scalar>(wire, source, at, count, scale, magnitudes);
}

template <class I, class W>
inline int64_t unpack_range(float* target, const W* wire, int64_t at, int64_t end, float scale) {
  for (; at + I::kWidth <= end; at += I::kWidth) {
    I::store(target + at, unpack_rule(I::load(wire + at), scale));
  }
  return at;
}

template <class I, class W>
void unpack(float* target, const void* from, int64_t count, float scale) {
  const W* wire = static_cast<const W*>(from);
  int64_t at = unpack_range<Scalar>(target, wire, 0, head<I>(target, count), scale);
  at = unpack_range<I>(target, wire, at, count, scale);
  unpack_range<Scalar>(target, wire, at, count, scale);
}

template <class I>
constexpr CpuKernels kernels_of(const char* name) {
  return {name,
          {sgd<I, float>, sgd<I, Half>, sgd<I, Bfloat16>},
          {pack<I, float>, pack<I, Half>, pack<I, Bfloat16>},
          {unpack<I, float>, unpack<I, Half>, unpack<I, Bfloat16>}};
}

}  // namespace
}  // namespace hvd_lbt
