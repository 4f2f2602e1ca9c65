// AVX2 with the half-precision conversions (f16c): 8 elements at a time.
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#include "loops.h"

namespace hvd_lbt {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int64_t kWidth = 8;

  static V load(const float* from) { return _mm256_loadu_ps(from); }
  static V load(const Half* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static V load(const Bfloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  static void store(float* to, V value) { _mm256_storeu_ps(to, value); }
  static void store(Half* to, V value) {
    const __m128i bits = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
  }
  static void store(Bfloat16* to, V value) {  // to_wire(float, Bfloat16*), eight at a time
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }

  struct Peak {
    __m256i value;
    // Written out: an implicit constructor would miss the instruction set.
    Peak() : value(_mm256_setzero_si256()) {}
    void see(V seen) {
      const __m256i mask = _mm256_set1_epi32(static_cast<int>(kMagnitude));
      value = _mm256_max_epi32(value, _mm256_and_si256(_mm256_castps_si256(seen), mask));
    }
    uint32_t get() const {
      alignas(32) uint32_t lanes[kWidth];
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), value);
      uint32_t most = 0;
      for (const uint32_t lane : lanes) most = lane > most ? lane : most;
      return most;
    }
  };
};

}  // namespace

const CpuKernels kAvx2Kernels = kernels_of<Avx2>("avx2");

}  // namespace hvd_lbt
#pragma GCC pop_options
#endif
