// Counter-based rounding noise: a function of a 64-bit key and a 64-bit index, uniform over the 2^24 multiples of 2^-24
// in [-1/2, 1/2). In portable C++ and in the instruction sets for which the including file is compiled; the same bits.
// A run of values shares the upper half of its indices: it may not cross a multiple of 2^32. kernels/common/README.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "intrinsics.hpp"

namespace rl_accel {

constexpr std::uint32_t kWeyl = 0x9E3779B9;  // as in kernels/common/noise.py
constexpr std::uint32_t kMix1 = 0x7FEB352D;
constexpr std::uint32_t kMix2 = 0x846CA68B;

namespace {

inline std::uint32_t mix32(std::uint32_t word) {
  word = (word ^ word >> 16) * kMix1;
  word = (word ^ word >> 15) * kMix2;
  return word ^ word >> 16;
}

// Noise of a run: value i starts from the word first + i * kWeyl; high stands for all bits above the lowest 32.
struct NoiseRun {
  std::uint32_t first;
  std::uint32_t high;
};

inline NoiseRun noise_run(std::uint64_t key, std::uint64_t index) {
  using u32 = std::uint32_t;
  return {static_cast<u32>(index) * kWeyl + static_cast<u32>(key),
          mix32(static_cast<u32>(index >> 32) ^ static_cast<u32>(key >> 32))};
}

// x[i] += noise of the next kCount values of the run.
template <std::size_t kCount>
inline void add_noise(float* x, NoiseRun& run) {
  for (std::size_t i = 0; i < kCount; ++i) {
    std::uint32_t word = run.first + static_cast<std::uint32_t>(i) * kWeyl;
    word = (word ^ word >> 16) * kMix1 ^ run.high;
    word = (word ^ word >> 15) * kMix2;
    word ^= word >> 16;
    x[i] += static_cast<float>(static_cast<int>(word >> 8)) * 0x1p-24f - 0.5f;
  }
  run.first += static_cast<std::uint32_t>(kCount) * kWeyl;
}

// In registers the high word is mixed in with a later step: x ^ x >> 15 of it beforehand. (word >> 8) - 2^23 is one
// shift after a flip of the sign, and the product with 2^-24 is exact.
#if defined(__AVX2__)
struct NoiseRun8 {
  __m256i next, high;
};

inline NoiseRun8 noise_run8(NoiseRun run) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i steps = _mm256_mullo_epi32(lane, _mm256_set1_epi32(static_cast<int>(kWeyl)));
  return {_mm256_add_epi32(steps, _mm256_set1_epi32(static_cast<int>(run.first))),
          _mm256_set1_epi32(static_cast<int>(run.high ^ run.high >> 15))};
}

inline __m256 add_noise(__m256 x, NoiseRun8& run) {
  const auto shift_xor = [](__m256i x, int by) { return _mm256_xor_si256(x, _mm256_srli_epi32(x, by)); };
  __m256i word = _mm256_mullo_epi32(shift_xor(run.next, 16), _mm256_set1_epi32(static_cast<int>(kMix1)));
  word = _mm256_xor_si256(shift_xor(word, 15), run.high);
  word = shift_xor(_mm256_mullo_epi32(word, _mm256_set1_epi32(static_cast<int>(kMix2))), 16);
  word = _mm256_srai_epi32(_mm256_xor_si256(word, _mm256_set1_epi32(static_cast<int>(0x80000000))), 8);
  run.next = _mm256_add_epi32(run.next, _mm256_set1_epi32(static_cast<int>(8 * kWeyl)));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(word), _mm256_set1_ps(0x1p-24f), x);
}
#endif

#if defined(__AVX512F__)
struct NoiseRun16 {
  __m512i next, high;
};

inline NoiseRun16 noise_run16(NoiseRun run) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i steps = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(kWeyl)));
  return {_mm512_add_epi32(steps, _mm512_set1_epi32(static_cast<int>(run.first))),
          _mm512_set1_epi32(static_cast<int>(run.high ^ run.high >> 15))};
}

inline __m512 add_noise(__m512 x, NoiseRun16& run) {
  const auto set1 = [](std::uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); };
  constexpr int kXor3 = 0x96;
  __m512i word = _mm512_xor_si512(run.next, _mm512_srli_epi32(run.next, 16));
  word = _mm512_mullo_epi32(word, set1(kMix1));
  word = _mm512_ternarylogic_epi32(word, _mm512_srli_epi32(word, 15), run.high, kXor3);
  word = _mm512_mullo_epi32(word, set1(kMix2));
  word = _mm512_ternarylogic_epi32(word, _mm512_srli_epi32(word, 16), set1(0x80000000), kXor3);
  run.next = _mm512_add_epi32(run.next, set1(16 * kWeyl));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(word, 8)), _mm512_set1_ps(0x1p-24f), x);
}
#endif

}  // namespace
}  // namespace rl_accel
