// The forms a gradient takes on the wire, and the way of one element there and back.
#pragma once

#include <stdint.h>
#include <string.h>

#include "rule.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace hvd_lbt {

enum class Form : uint8_t { kFloat, kHalf, kBfloat16 };
constexpr int kForms = 3;

// One wire element as it lies in memory.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

HVD_RULE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

HVD_RULE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr uint32_t kMagnitude = 0x7fffffffu;  // all but the sign
constexpr uint32_t kInfinity = 0x7f800000u;   // and above it the NaNs

// The least magnitude that the form cannot hold: it rounds to infinity (or is infinite, or NaN).
// Magnitudes of floats order as the integers of their bits do.
template <class W>
struct Overflow;
template <>
struct Overflow<float> {
  static constexpr uint32_t limit = kInfinity;
};
template <>
struct Overflow<Half> {
  static constexpr uint32_t limit = 0x477ff000u;  // 65520, half-way from 65504 to 2^16
};
template <>
struct Overflow<Bfloat16> {
  static constexpr uint32_t limit = 0x7f7f8000u;  // half-way from the largest bfloat16 to 2^128
};

// Rounding to the nearest, ties to even; a NaN stays a (quiet) NaN.
HVD_RULE void to_wire(float value, float* wire) { *wire = value; }

HVD_RULE void to_wire(float value, Half* wire) {
#if defined(__CUDA_ARCH__)
  wire->bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & kMagnitude;
  if (magnitude > kInfinity) {
    magnitude = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= Overflow<Half>::limit) {
    magnitude = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a sum with 0.5 rounds to multiples of 2^-24
    magnitude = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {  // the exponent's bias falls from 127 to 15, 13 bits of the fraction are rounded away
    magnitude = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  wire->bits = static_cast<uint16_t>(sign | magnitude);
#endif
}

HVD_RULE void to_wire(float value, Bfloat16* wire) {
#if defined(__CUDA_ARCH__)
  wire->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const bool is_nan = (bits & kMagnitude) > kInfinity;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  wire->bits = static_cast<uint16_t>((is_nan ? bits | 0x400000u : rounded) >> 16);
#endif
}

HVD_RULE float from_wire(float wire) { return wire; }

HVD_RULE float from_wire(Half wire) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(wire.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(wire.bits & 0x8000u) << 16;
  const uint32_t magnitude = wire.bits & 0x7fffu;
  if (magnitude < 0x400u) {  // zero and the subnormals: multiples of 2^-24
    return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  }
  const uint32_t bias = magnitude < 0x7c00u ? 112u << 23 : 224u << 23;  // infinity and NaN stay so
  return float_of(sign | ((magnitude << 13) + bias));
#endif
}

HVD_RULE float from_wire(Bfloat16 wire) { return float_of(static_cast<uint32_t>(wire.bits) << 16); }

// On the way to the wire a gradient is multiplied by the wire's scale, on the way back divided by
// it.
template <class V>
HVD_RULE V pack_rule(V source, float scale) {
  return source * scale;
}

template <class V>
HVD_RULE V unpack_rule(V wire, float scale) {
  return wire / scale;
}

// The largest magnitudes' bits, before and after scaling -> 0 all fits; 1 a finite source became
// infinite on the wire, or a sum of so many such summands may (lower the scale); 2 a source was
// infinite or NaN (no scale helps). A sum has half the room: it is rounded once a summand, and
// (1 + 2^-11)^1024 < 2.
template <class W>
HVD_RULE float overflow_rule(uint32_t source_magnitude, uint32_t scaled_magnitude, float summands) {
  if (source_magnitude >= kInfinity) return 2.0f;
  if (scaled_magnitude >= Overflow<W>::limit) return 1.0f;
  const float sum = 2.0f * summands * float_of(scaled_magnitude);
  return summands > 1.0f && sum >= float_of(Overflow<W>::limit) ? 1.0f : 0.0f;
}

}  // namespace hvd_lbt
