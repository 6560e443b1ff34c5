// Blocks of 32 values in two AVX-512 registers. Compiled with -mavx512f and its bw, dq and vl parts; fused
// multiply-adds stand only where the product is exact.
#if defined(__x86_64__)
#include "loops.hpp"

namespace rl_accel::codec {
namespace {

struct Avx512 {
  struct Block {
    __m512 at[2];
  };

  static Block load(const float* x) { return {{_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)}}; }
  static __m512 load16(const Bfloat16* x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Block load(const Bfloat16* x) { return {{load16(x), load16(x + 16)}}; }
  static void store(float* to, const Block& x) {
    _mm512_storeu_ps(to, x.at[0]);
    _mm512_storeu_ps(to + 16, x.at[1]);
  }
  static __m512i bfloat16(__m512 x) {  // in the high halves of 32-bit lanes; vcvtneps2bf16 would flush denormals
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
  }
  static void store(Bfloat16* to, const Block& x) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // Words 4 i + 1 and 4 i + 3 go to lane i.
    const __m512i odd_words =
        _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x00040004)), _mm512_set1_epi32(0x00030001));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(bfloat16(x.at[0]), odd_words, bfloat16(x.at[1])));
  }

  static Block add(const Block& x, const Block& y) {
    return {{_mm512_add_ps(x.at[0], y.at[0]), _mm512_add_ps(x.at[1], y.at[1])}};
  }
  static Block sub(const Block& x, const Block& y) {
    return {{_mm512_sub_ps(x.at[0], y.at[0]), _mm512_sub_ps(x.at[1], y.at[1])}};
  }
  static Block mul(const Block& x, float factor) {
    return {{_mm512_mul_ps(x.at[0], _mm512_set1_ps(factor)), _mm512_mul_ps(x.at[1], _mm512_set1_ps(factor))}};
  }
  static __m512 clamp(__m512 x, float top) {
    return _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(top)), _mm512_set1_ps(-top));
  }
  static Block clamp(const Block& x, int top) {
    return {{clamp(x.at[0], static_cast<float>(top)), clamp(x.at[1], static_cast<float>(top))}};
  }

  static Block rotate(Block x) {
    hadamard(x.at);
    return x;
  }

  struct Bits {
    __m512i at[2];
  };
  static Bits no_bits() { return {{_mm512_setzero_si512(), _mm512_setzero_si512()}}; }
  static Bits max_bits(Bits most, const Block& x) {
    for (int i = 0; i < 2; ++i) {
      const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x.at[i]), _mm512_set1_epi32(kMagnitude));
      most.at[i] = _mm512_max_epi32(most.at[i], bits);
    }
    return most;
  }
  static u32 reduce(const Bits& most) {
    return static_cast<u32>(_mm512_reduce_max_epi32(_mm512_max_epi32(most.at[0], most.at[1])));
  }

  static NoiseRun16 noise_run(NoiseRun run) { return noise_run16(run); }
  static Block add_noise(const Block& x, NoiseRun16& run) {
    const __m512 first = rl_accel::add_noise(x.at[0], run);
    return {{first, rl_accel::add_noise(x.at[1], run)}};
  }

  static void write4(u8* codes, const Block& x) {
    constexpr int kLowFromSecond = 0xD8;  // bits of the second operand where the mask is 1, of the first elsewhere
    const __m512i low = _mm512_cvtps_epi32(x.at[0]);
    const __m512i high = _mm512_slli_epi32(_mm512_cvtps_epi32(x.at[1]), 4);
    const __m512i both = _mm512_ternarylogic_epi32(high, low, _mm512_set1_epi32(15), kLowFromSecond);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(both));
  }
  static void write8(u8* codes, const Block& x) {
    for (int i = 0; i < 2; ++i) {
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.at[i]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16 * i), bytes);
    }
  }

  template <int kBits>
  struct Decoder;
};

template <>
struct Avx512::Decoder<8> {
  __m512 scale;
  explicit Decoder(float of) : scale(_mm512_set1_ps(of)) {}
  __m512 part(const u8* codes) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale);
  }
  Block operator()(const u8* codes) const { return {{part(codes), part(codes + 16)}}; }
};

// The 16 products of a group in a register; vpermps looks up by the lowest four bits of each lane.
template <>
struct Avx512::Decoder<4> {
  __m512 products;
  explicit Decoder(float scale)
      : products(_mm512_mul_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1),
                               _mm512_set1_ps(scale))) {}
  Block operator()(const u8* codes) const {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return {{_mm512_permutexvar_ps(pairs, products), _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), products)}};
  }
};

}  // namespace

constinit const Routines kAvx512 = routines<Avx512>("avx512");

}  // namespace rl_accel::codec
#endif
