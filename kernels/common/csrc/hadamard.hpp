// Hadamard transform of a block of values, not normalized, in portable C++ and in the instruction sets for which the
// including file is compiled. All give the same bits: one addition or subtraction per value and stage, strides 1, 2, 4
// and on; a fused multiply-add stands only where the product is exact. Internal linkage: files are compiled for
// different CPUs. kernels/common/README.md has the maths.
#pragma once

#include <cstddef>

#include "intrinsics.hpp"

namespace rl_accel {
namespace {

// In place, kOrder values.
template <std::size_t kOrder, std::size_t kStride = 1>
inline void hadamard(float* x) {
  static_assert((kOrder & (kOrder - 1)) == 0);
  if constexpr (kStride < kOrder) {
    for (std::size_t i = 0; i < kOrder; i += 2 * kStride)
      for (std::size_t k = i; k < i + kStride; ++k) {
        const float first = x[k], second = x[k + kStride];
        x[k] = first + second;
        x[k + kStride] = first - second;
      }
    hadamard<kOrder, 2 * kStride>(x);
  }
}

#if defined(__AVX2__)
// Within a register: partner + x in the first of a pair, partner - x in the second.
inline __m256 hadamard8(__m256 x) {
  x = _mm256_fmadd_ps(x, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(x, 0xB1));
  x = _mm256_fmadd_ps(x, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(x, 0x4E));
  return _mm256_fmadd_ps(x, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(x, x, 1));
}

// In place, order 8 kRegisters.
template <int kRegisters>
inline void hadamard(__m256 (&x)[kRegisters]) {
  for (int i = 0; i < kRegisters; ++i) x[i] = hadamard8(x[i]);
  for (int stride = 1; stride < kRegisters; stride *= 2)
    for (int i = 0; i < kRegisters; ++i)
      if (!(i & stride)) {
        const __m256 first = x[i], second = x[i + stride];
        x[i] = _mm256_add_ps(first, second);
        x[i + stride] = _mm256_sub_ps(first, second);
      }
}
#endif

#if defined(__AVX512F__)
inline __m512 hadamard16(__m512 x) {
  const auto signs = [](__mmask16 second) {
    return _mm512_mask_blend_ps(second, _mm512_set1_ps(1), _mm512_set1_ps(-1));
  };
  x = _mm512_fmadd_ps(x, signs(0xAAAA), _mm512_permute_ps(x, 0xB1));
  x = _mm512_fmadd_ps(x, signs(0xCCCC), _mm512_permute_ps(x, 0x4E));
  x = _mm512_fmadd_ps(x, signs(0xF0F0), _mm512_shuffle_f32x4(x, x, 0xB1));
  return _mm512_fmadd_ps(x, signs(0xFF00), _mm512_shuffle_f32x4(x, x, 0x4E));
}

// In place, order 16 kRegisters.
template <int kRegisters>
inline void hadamard(__m512 (&x)[kRegisters]) {
  for (int i = 0; i < kRegisters; ++i) x[i] = hadamard16(x[i]);
  for (int stride = 1; stride < kRegisters; stride *= 2)
    for (int i = 0; i < kRegisters; ++i)
      if (!(i & stride)) {
        const __m512 first = x[i], second = x[i + stride];
        x[i] = _mm512_add_ps(first, second);
        x[i + stride] = _mm512_sub_ps(first, second);
      }
}
#endif

}  // namespace
}  // namespace rl_accel
