// Vectors of 16 in two AVX2 registers. Compiled with -mavx2 -mfma -mf16c; fused multiply-adds stand only where the
// product is exact (hadamard.hpp).
#if defined(__x86_64__)
#include "table.hpp"

namespace rl_accel::kv_int4 {
namespace {

struct Avx2 {
  static constexpr size_t kRows = 4;  // two accumulators each; 16 registers

  struct Floats {
    __m256 at[2];
  };
  struct Ints {
    __m256i at[2];
  };

  static __m128i load8(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
  template <class F>
  static Floats each(F&& f) {
    return {{f(0), f(1)}};
  }

  static float from_half(u16 half) { return _cvtsh_ss(half); }
  static u16 to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

  static Floats load(const float* x) { return {{_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}}; }
  static Floats load(const Bfloat16* x) {
    return each(
        [&](int i) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load8(x + 8 * i)), 16)); });
  }
  static Floats load_half(const u16* x) { return {{_mm256_cvtph_ps(load8(x)), _mm256_cvtph_ps(load8(x + 8))}}; }
  static Floats load(const Float16* x) { return load_half(reinterpret_cast<const u16*>(x)); }
  static Ints load(const i32* x) {
    const __m256i* from = reinterpret_cast<const __m256i*>(x);
    return {{_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)}};
  }
  static void store(float* to, Floats x) {
    _mm256_storeu_ps(to, x.at[0]);
    _mm256_storeu_ps(to + 8, x.at[1]);
  }
  static void store(i32* to, Ints x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x.at[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), x.at[1]);
  }
  static __m256i bfloat16(__m256 x) {  // in 32-bit lanes
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
  }
  static void store(Bfloat16* to, Floats x) {
    const __m256i both = _mm256_packus_epi32(bfloat16(x.at[0]), bfloat16(x.at[1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(both, 0xD8));
  }
  static void store(Float16* to, Floats x) {
    for (int i = 0; i < 2; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * i), _mm256_cvtps_ph(x.at[i], _MM_FROUND_TO_NEAREST_INT));
  }

  static Floats set(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
  static Floats add(Floats x, Floats y) {
    return each([&](int i) { return _mm256_add_ps(x.at[i], y.at[i]); });
  }
  static Floats sub(Floats x, Floats y) {
    return each([&](int i) { return _mm256_sub_ps(x.at[i], y.at[i]); });
  }
  static Floats mul(Floats x, Floats y) {
    return each([&](int i) { return _mm256_mul_ps(x.at[i], y.at[i]); });
  }
  static Floats div(Floats x, Floats y) {
    return each([&](int i) { return _mm256_div_ps(x.at[i], y.at[i]); });
  }
  static Floats min(Floats x, Floats y) {
    return each([&](int i) { return _mm256_min_ps(x.at[i], y.at[i]); });
  }
  static Floats max(Floats x, Floats y) {
    return each([&](int i) { return _mm256_max_ps(x.at[i], y.at[i]); });
  }
  static Floats abs(Floats x) {
    return each([&](int i) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.at[i]); });
  }
  static Floats floor(Floats x) {
    return each([&](int i) { return _mm256_floor_ps(x.at[i]); });
  }
  static Ints round(Floats x) { return {{_mm256_cvtps_epi32(x.at[0]), _mm256_cvtps_epi32(x.at[1])}}; }
  static Floats to_floats(Ints x) {
    return each([&](int i) { return _mm256_cvtepi32_ps(x.at[i]); });
  }
  static Floats times_power(Floats y, Floats n) {  // whatever n is below -126: the result is not used
    return each([&](int i) {
      const __m256i exponent = _mm256_add_epi32(_mm256_cvttps_epi32(n.at[i]), _mm256_set1_epi32(127));
      return _mm256_mul_ps(y.at[i], _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    });
  }
  static Floats zero_where_less(Floats x, Floats limit, Floats other) {
    return each([&](int i) { return _mm256_andnot_ps(_mm256_cmp_ps(x.at[i], limit.at[i], _CMP_LT_OQ), other.at[i]); });
  }
  static Floats first_of(size_t count, Floats x, Floats y) {
    const __m256i limit = _mm256_set1_epi32(count < kLanes ? static_cast<int>(count) : static_cast<int>(kLanes));
    return each([&](int i) {
      const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(8 * i));
      return _mm256_blendv_ps(y.at[i], x.at[i], _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, lane)));
    });
  }

  static float first(Floats x) { return _mm256_cvtss_f32(x.at[0]); }
  template <class F8, class F4>
  static float fold(Floats x, F8&& f8, F4&& f4) {  // lanes i and i + 8, then + 4, + 2, + 1
    const __m256 both = f8(x.at[0], x.at[1]);
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

  static void store_bytes(u8* to, Ints x) {
    const __m256i words = _mm256_packs_epi32(x.at[0], x.at[1]);  // crosswise by halves
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi32(bytes, 0xD8));
  }
  template <int kBits>
  static void store_pairs(i32* to, Ints x) {
    __m256i pairs;
    if constexpr (kBits == 4) {  // tokens i and i + 4 of 8
      const __m256i low = _mm256_permute2x128_si256(x.at[0], x.at[1], 0x20);
      const __m256i high = _mm256_permute2x128_si256(x.at[0], x.at[1], 0x31);
      pairs = _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xAA);
    } else {  // tokens i and i + 2 of 4
      const auto pair = [](__m256i a) {
        return _mm256_blend_epi16(a, _mm256_slli_epi32(_mm256_bsrli_epi128(a, 8), 16), 0xAA);
      };
      pairs = _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(pair(x.at[0]), pair(x.at[1])), 0xD8);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pairs);
  }

  static Ints no_ints() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }

  // Code `number` of each half of a word, in that half.
  template <int kBits, int kNumber>
  static __m256i codes(__m256i words) {
    if constexpr (kNumber == 16 / kBits - 1) return _mm256_srli_epi16(words, 16 - kBits);
    return _mm256_and_si256(_mm256_srli_epi32(words, kNumber * kBits), _mm256_set1_epi16((1 << kBits) - 1));
  }
  template <int kNumRows, int kBits, int kRowStep, int kNumber>
  static void add_products(__m256i first, __m256i second, const i32* pairs, Ints (&acc)[kNumRows]) {
    first = codes<kBits, kNumber>(first);
    second = codes<kBits, kNumber>(second);
#pragma GCC unroll 8
    for (int row = 0; row < kNumRows; ++row) {
      const __m256i pair = _mm256_set1_epi32(pairs[row * kRowStep]);
      acc[row].at[0] = _mm256_add_epi32(acc[row].at[0], _mm256_madd_epi16(first, pair));
      acc[row].at[1] = _mm256_add_epi32(acc[row].at[1], _mm256_madd_epi16(second, pair));
      // Compilers reorder sums of integers into trees, whose leaves do not fit the registers.
      __asm__("" : "+x"(acc[row].at[0]), "+x"(acc[row].at[1]));
    }
  }
  // acc[row] += products of `count` words of 16 lanes with the pairs of the row, kStep apart.
  template <int kNumRows, int kBits, int kStep, int kRowStep>
  static void dot(const u32* words, size_t count, const i32* pairs, Ints (&out)[kNumRows]) {
    Ints acc[kNumRows];
#pragma GCC unroll 8
    for (int row = 0; row < kNumRows; ++row) acc[row] = out[row];
    for (size_t i = 0; i < count; ++i, words += kLanes, pairs += 16 / kBits * kStep) {
      const __m256i* from = reinterpret_cast<const __m256i*>(words);
      const __m256i first = _mm256_loadu_si256(from), second = _mm256_loadu_si256(from + 1);
      add_products<kNumRows, kBits, kRowStep, 0>(first, second, pairs, acc);
      add_products<kNumRows, kBits, kRowStep, 1>(first, second, pairs + kStep, acc);
      if constexpr (kBits == 4) {
        add_products<kNumRows, kBits, kRowStep, 2>(first, second, pairs + 2 * kStep, acc);
        add_products<kNumRows, kBits, kRowStep, 3>(first, second, pairs + 3 * kStep, acc);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kNumRows; ++row) out[row] = acc[row];
  }

  template <size_t kOrder>
  static void rotate(float* x) {
    __m256 at[kOrder / 8];
    for (size_t i = 0; i < kOrder / 8; ++i) at[i] = _mm256_loadu_ps(x + 8 * i);
    hadamard(at);
    for (size_t i = 0; i < kOrder / 8; ++i) _mm256_storeu_ps(x + 8 * i, at[i]);
  }
};

}  // namespace

constinit const Routines kAvx2 = routines<Avx2>("avx2");

}  // namespace rl_accel::kv_int4
#endif
