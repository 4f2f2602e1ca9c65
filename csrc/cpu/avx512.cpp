// AVX-512 (foundation only): 16 elements at a time.
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC target("avx512f")
#include "loops.h"

namespace hvd_lbt {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int64_t kWidth = 16;

  static V load(const float* from) { return _mm512_loadu_ps(from); }
  static V load(const Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static V load(const Bfloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  static void store(float* to, V value) { _mm512_storeu_ps(to, value); }
  static void store(Half* to, V value) {
    const __m256i bits = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  }
  static void store(Bfloat16* to, V value) {  // to_wire(float, Bfloat16*), sixteen at a time
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i words = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
  }

  struct Peak {
    __m512i value;
    // Written out: an implicit constructor would miss the instruction set.
    Peak() : value(_mm512_setzero_si512()) {}
    void see(V seen) {
      const __m512i mask = _mm512_set1_epi32(static_cast<int>(kMagnitude));
      value = _mm512_max_epi32(value, _mm512_and_si512(_mm512_castps_si512(seen), mask));
    }
    uint32_t get() const { return static_cast<uint32_t>(_mm512_reduce_max_epi32(value)); }
  };
};

}  // namespace

const CpuKernels kAvx512Kernels = kernels_of<Avx512>("avx512");

}  // namespace hvd_lbt
#pragma GCC pop_options
#endif
