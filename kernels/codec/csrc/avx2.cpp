// Blocks of 32 values in four AVX2 registers. Compiled with -mavx2 -mfma; fused multiply-adds stand only where the
// product is exact.
#if defined(__x86_64__)
#include "loops.hpp"

namespace rl_accel::codec {
namespace {

struct Avx2 {
  struct Block {
    __m256 at[4];
  };

  static Block load(const float* x) {
    return {{_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8), _mm256_loadu_ps(x + 16), _mm256_loadu_ps(x + 24)}};
  }
  static Block load(const Bfloat16* x) {
    const auto part = [x](int i) {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    };
    return {{part(0), part(8), part(16), part(24)}};
  }
  static void store(float* to, const Block& x) {
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + 8 * i, x.at[i]);
  }
  static __m256i bfloat16(__m256 x) {  // in 32-bit lanes
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
  }
  static void store(Bfloat16* to, const Block& x) {
    for (int i = 0; i < 2; ++i) {
      const __m256i both = _mm256_packus_epi32(bfloat16(x.at[2 * i]), bfloat16(x.at[2 * i + 1]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * i), _mm256_permute4x64_epi64(both, 0xD8));
    }
  }

  template <class F>
  static Block each(F&& f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  static Block add(const Block& x, const Block& y) {
    return each([&](int i) { return _mm256_add_ps(x.at[i], y.at[i]); });
  }
  static Block sub(const Block& x, const Block& y) {
    return each([&](int i) { return _mm256_sub_ps(x.at[i], y.at[i]); });
  }
  static Block mul(const Block& x, float factor) {
    return each([&](int i) { return _mm256_mul_ps(x.at[i], _mm256_set1_ps(factor)); });
  }
  static Block clamp(const Block& x, int top) {
    const __m256 high = _mm256_set1_ps(static_cast<float>(top)), low = _mm256_set1_ps(static_cast<float>(-top));
    return each([&](int i) { return _mm256_max_ps(_mm256_min_ps(x.at[i], high), low); });
  }

  static Block rotate(Block x) {
    hadamard(x.at);
    return x;
  }

  struct Bits {
    __m256i at[2];
  };
  static Bits no_bits() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  static Bits max_bits(Bits most, const Block& x) {
    for (int i = 0; i < 4; ++i) {
      const __m256i bits = _mm256_and_si256(_mm256_castps_si256(x.at[i]), _mm256_set1_epi32(kMagnitude));
      most.at[i % 2] = _mm256_max_epi32(most.at[i % 2], bits);
    }
    return most;
  }
  static u32 reduce(const Bits& most) {
    const __m256i both = _mm256_max_epi32(most.at[0], most.at[1]);
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1));
    return static_cast<u32>(_mm_cvtsi128_si32(half));
  }

  static NoiseRun8 noise_run(NoiseRun run) { return noise_run8(run); }
  static Block add_noise(const Block& x, NoiseRun8& run) {
    return each([&](int i) { return rl_accel::add_noise(x.at[i], run); });
  }

  static __m256i words16(const Block& x, int i) {  // two registers' codes, crosswise by halves
    return _mm256_packs_epi32(_mm256_cvtps_epi32(x.at[i]), _mm256_cvtps_epi32(x.at[i + 1]));
  }
  static void write4(u8* codes, const Block& x) {
    const __m256i low = _mm256_and_si256(words16(x, 0), _mm256_set1_epi16(15));
    const __m256i high = _mm256_and_si256(_mm256_slli_epi16(words16(x, 2), 4), _mm256_set1_epi16(0xF0));
    const __m256i both = _mm256_or_si256(low, high);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm_shuffle_epi32(bytes, 0xD8));
  }
  static void write8(u8* codes, const Block& x) {
    const __m256i bytes = _mm256_packs_epi16(words16(x, 0), words16(x, 2));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32(bytes, order));
  }

  template <int kBits>
  struct Decoder {
    __m256 scale;
    explicit Decoder(float of) : scale(_mm256_set1_ps(of)) {}
    __m256 part(__m128i codes) const { return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), scale); }
    Block operator()(const u8* codes) const {
      if constexpr (kBits == 8) {
        return each([&](int i) { return part(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i))); });
      } else {
        const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), mask = _mm_set1_epi8(15);
        const __m128i signs = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
        const __m128i low = _mm_shuffle_epi8(signs, _mm_and_si128(pairs, mask));
        const __m128i high = _mm_shuffle_epi8(signs, _mm_and_si128(_mm_srli_epi16(pairs, 4), mask));
        return {{part(low), part(_mm_srli_si128(low, 8)), part(high), part(_mm_srli_si128(high, 8))}};
      }
    }
  };
};

}  // namespace

constinit const Routines kAvx2 = routines<Avx2>("avx2");

}  // namespace rl_accel::codec
#endif
