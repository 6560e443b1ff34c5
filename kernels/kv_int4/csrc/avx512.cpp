// Vectors of 16 in an AVX-512 register. Compiled with -mavx512f, its bw, dq and vl parts, and vnni; fused multiply-adds
// stand only where the product is exact (hadamard.hpp).
#if defined(__x86_64__)
#include "table.hpp"

namespace rl_accel::kv_int4 {
namespace {

struct Avx512 {
  static constexpr size_t kRows = 8;

  using Floats = __m512;
  using Ints = __m512i;

  static __m256i load16(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }

  static float from_half(u16 half) { return _cvtsh_ss(half); }
  static u16 to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

  static Floats load(const float* x) { return _mm512_loadu_ps(x); }
  static Floats load(const Bfloat16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(x)), 16));
  }
  static Floats load_half(const u16* x) { return _mm512_cvtph_ps(load16(x)); }
  static Floats load(const Float16* x) { return _mm512_cvtph_ps(load16(x)); }
  static Ints load(const i32* x) { return _mm512_loadu_si512(x); }
  static void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
  static void store(i32* to, Ints x) { _mm512_storeu_si512(to, x); }
  static void store(Bfloat16* to, Floats x) {  // vcvtneps2bf16 would flush subnormal numbers
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __m512i kept =
        _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
  static void store(Float16* to, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static Floats set(float x) { return _mm512_set1_ps(x); }
  static Floats add(Floats x, Floats y) { return _mm512_add_ps(x, y); }
  static Floats sub(Floats x, Floats y) { return _mm512_sub_ps(x, y); }
  static Floats mul(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
  static Floats div(Floats x, Floats y) { return _mm512_div_ps(x, y); }
  static Floats min(Floats x, Floats y) { return _mm512_min_ps(x, y); }
  static Floats max(Floats x, Floats y) { return _mm512_max_ps(x, y); }
  static Floats abs(Floats x) { return _mm512_abs_ps(x); }
  static Floats floor(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static Ints round(Floats x) { return _mm512_cvtps_epi32(x); }
  static Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
  static Floats times_power(Floats y, Floats n) { return _mm512_scalef_ps(y, n); }
  static Floats zero_where_less(Floats x, Floats limit, Floats other) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), other);
  }
  static Floats first_of(size_t count, Floats x, Floats y) {
    const auto mask = static_cast<__mmask16>(count < kLanes ? (1u << count) - 1 : 0xFFFF);
    return _mm512_mask_mov_ps(y, mask, x);
  }

  static float first(Floats x) { return _mm512_cvtss_f32(x); }
  template <class F8, class F4>
  static float fold(Floats x, F8&& f8, F4&& f4) {  // lanes i and i + 8, then + 4, + 2, + 1
    const __m256 both = f8(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 half = f4(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    half = f4(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(f4(half, _mm_movehdup_ps(half)));
  }
  static float sum(Floats x) {
    return fold(
        x, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); }, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
  }
  static float highest(Floats x) {
    return fold(
        x, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); }, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
  }
  static float lowest(Floats x) {
    return fold(
        x, [](__m256 a, __m256 b) { return _mm256_min_ps(a, b); }, [](__m128 a, __m128 b) { return _mm_min_ps(a, b); });
  }

  static void store_bytes(u8* to, Ints x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x)); }
  template <int kBits>
  static void store_pairs(i32* to, Ints x) {
    const __m256i low = _mm512_castsi512_si256(x), high = _mm512_extracti64x4_epi64(x, 1);
    __m256i pairs;
    if constexpr (kBits == 4) {  // tokens i and i + 4 of 8
      pairs = _mm256_blend_epi16(_mm256_permute2x128_si256(low, high, 0x20),
                                 _mm256_slli_epi32(_mm256_permute2x128_si256(low, high, 0x31), 16), 0xAA);
    } else {  // tokens i and i + 2 of 4
      const auto pair = [](__m256i a) {
        return _mm256_blend_epi16(a, _mm256_slli_epi32(_mm256_bsrli_epi128(a, 8), 16), 0xAA);
      };
      pairs = _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(pair(low), pair(high)), 0xD8);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pairs);
  }

  static Ints no_ints() { return _mm512_setzero_si512(); }

  // Code `number` of each half of a word, in that half.
  template <int kBits, int kNumber>
  static __m512i codes(__m512i words) {
    if constexpr (kNumber == 16 / kBits - 1) return _mm512_srli_epi16(words, 16 - kBits);
    return _mm512_and_si512(_mm512_srli_epi32(words, kNumber * kBits), _mm512_set1_epi16((1 << kBits) - 1));
  }
  template <int kNumRows, int kBits, int kRowStep, int kNumber, int kChains>
  static void add_products(__m512i words, const i32* pairs, Ints (&acc)[kNumRows][kChains]) {
    const __m512i unpacked = codes<kBits, kNumber>(words);
#pragma GCC unroll 8
    for (int row = 0; row < kNumRows; ++row) {
      Ints& sum = acc[row][kNumber % kChains];
      sum = _mm512_dpwssd_epi32(sum, unpacked, _mm512_set1_epi32(pairs[row * kRowStep]));
    }
  }
  // acc[row] += products of `count` words of 16 lanes with the pairs of the row, kStep apart.
  template <int kNumRows, int kBits, int kStep, int kRowStep>
  static void dot(const u32* words, size_t count, const i32* pairs, Ints (&out)[kNumRows]) {
    // A product waits for the one before it in its sum, so few rows take several sums.
    constexpr int kMost = kNumRows <= 2 ? 4 : kNumRows <= 4 ? 2 : 1, kChains = kMost < 16 / kBits ? kMost : 16 / kBits;
    Ints acc[kNumRows][kChains];
#pragma GCC unroll 8
    for (int row = 0; row < kNumRows; ++row) {
      acc[row][0] = out[row];
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) acc[row][chain] = no_ints();
    }
    for (size_t i = 0; i < count; ++i, words += kLanes, pairs += 16 / kBits * kStep) {
      const __m512i packed = _mm512_loadu_si512(words);
      add_products<kNumRows, kBits, kRowStep, 0>(packed, pairs, acc);
      add_products<kNumRows, kBits, kRowStep, 1>(packed, pairs + kStep, acc);
      if constexpr (kBits == 4) {
        add_products<kNumRows, kBits, kRowStep, 2>(packed, pairs + 2 * kStep, acc);
        add_products<kNumRows, kBits, kRowStep, 3>(packed, pairs + 3 * kStep, acc);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kNumRows; ++row) {
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) acc[row][0] = _mm512_add_epi32(acc[row][0], acc[row][chain]);
      out[row] = acc[row][0];
    }
  }

  template <size_t kOrder>
  static void rotate(float* x) {
    __m512 at[kOrder / 16];
    for (size_t i = 0; i < kOrder / 16; ++i) at[i] = _mm512_loadu_ps(x + 16 * i);
    hadamard(at);
    for (size_t i = 0; i < kOrder / 16; ++i) _mm512_storeu_ps(x + 16 * i, at[i]);
  }
};

}  // namespace

constinit const Routines kAvx512 = routines<Avx512>("avx512");

}  // namespace rl_accel::kv_int4
#endif
