// Two octets of 8 lanes in an AVX-512 register: two rows, or two groups, beside each other. Compiled with -mavx512f and
// its bw, dq and vl parts.
#include "../../common/csrc/intrinsics.hpp"
#if defined(__x86_64__)
#include <type_traits>

#include "table.hpp"

namespace rl_accel::moe_int3 {
namespace {

struct Avx512 {
  static constexpr size_t kOctets = 2;
  static constexpr size_t kRowVectors = 4;
  static constexpr size_t kFewTokens = 6;   // that use weights as they are unpacked
  static constexpr size_t kTileTokens = 4;  // of them, that use all vectors of rows at a time
  static constexpr size_t kManyTokens = 6;  // 24 sums, 6 tokens, 1 vector of weights of 32 registers

  using Floats = __m512;
  using Ints = __m512i;

  static float from_half(u16 half) { return _cvtsh_ss(half); }
  static u16 to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
  static void to_floats(const u16* from, float* to, size_t count) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(load16(from + i)));
    for (; i < count; ++i) to[i] = from_half(from[i]);
  }

  static __m128i load16(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
  static __m256i load32(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
  static Floats both(__m256 first, __m256 second) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
  }
  static Ints both(__m256i first, __m256i second) {
    return _mm512_inserti32x8(_mm512_castsi256_si512(first), second, 1);
  }
  static Floats load(const float* x) { return _mm512_loadu_ps(x); }
  static Floats load_octets(const float* x, size_t stride) {
    return both(_mm256_loadu_ps(x), _mm256_loadu_ps(x + stride));
  }
  static Floats load_same(const float* x) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(x)); }
  static Floats broadcast(const float* x, size_t stride) {
    return both(_mm256_broadcast_ss(x), _mm256_broadcast_ss(x + stride));
  }
  static void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
  static void store(u32* to, Ints x) { _mm512_storeu_si512(to, x); }
  static void store_octets(float* const* to, size_t at, Floats x) {
    _mm256_storeu_ps(to[0] + at, _mm512_castps512_ps256(x));
    _mm256_storeu_ps(to[1] + at, _mm512_extractf32x8_ps(x, 1));
  }

  static Floats set(float x) { return _mm512_set1_ps(x); }
  template <int kModulus>
  static Floats count() {
    return _mm512_broadcast_f32x8(_mm256_setr_ps(0, 1, 2, 3, 4 % kModulus, 5 % kModulus, 6 % kModulus, 7 % kModulus));
  }
  static Floats add(Floats x, Floats y) { return _mm512_add_ps(x, y); }
  static Floats sub(Floats x, Floats y) { return _mm512_sub_ps(x, y); }
  static Floats mul(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
  static Floats div(Floats x, Floats y) { return _mm512_div_ps(x, y); }
  static Floats fma(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }
  static Floats min(Floats x, Floats y) { return _mm512_min_ps(x, y); }  // y if one is NaN
  static Floats max(Floats x, Floats y) { return _mm512_max_ps(x, y); }
  static Floats abs(Floats x) { return _mm512_abs_ps(x); }
  static Floats round(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Floats floor(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static Floats zero_if_nan(Floats x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x); }
  static Floats select_less(Floats x, Floats limit, Floats y, Floats other) {
    return _mm512_mask_mov_ps(other, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), y);
  }
  static Floats zero_where_less(Floats x, Floats limit, Floats y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y);
  }
  static Floats times_power(Floats y, Floats n) { return _mm512_scalef_ps(y, n); }
  static bool any_differs(Floats x, Floats y) { return _mm512_cmp_ps_mask(x, y, _CMP_NEQ_UQ) != 0; }

  // Of the lanes of each octet, in all of them: lanes i and i + 4, then + 2, + 1.
  template <class F>
  static Floats fold(Floats x, F&& f) {
    x = f(x, _mm512_shuffle_f32x4(x, x, 0xB1));
    x = f(x, _mm512_permute_ps(x, 0x4E));
    return f(x, _mm512_permute_ps(x, 0xB1));
  }
  static Floats octet_sum(Floats x) { return fold(x, add); }
  static Floats octet_min(Floats x) { return fold(x, min); }
  static Floats octet_max(Floats x) { return fold(x, max); }
  static void octet_totals(Floats x, float* to) {
    const Floats sum = octet_sum(x);
    to[0] = _mm512_cvtss_f32(sum);
    to[1] = _mm256_cvtss_f32(_mm512_extractf32x8_ps(sum, 1));
  }

  static Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
  static Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
  static Ints bit_or(Ints x, Ints y) { return _mm512_or_si512(x, y); }
  static Ints bit_and(Ints x, int mask) { return _mm512_and_si512(x, _mm512_set1_epi32(mask)); }
  static Ints shift_left(Ints x, int count) { return _mm512_sll_epi32(x, _mm_cvtsi32_si128(count)); }
  template <int kCount>
  static Ints shift_right(Ints x) {
    if constexpr (kCount == 0) return x;
    return _mm512_srli_epi32(x, kCount);
  }
  // By the low bits of an index: two of them within quarters, where the levels stand four times; of three bits the
  // fourth says which octet, so that one permutation reaches the levels of both rows.
  template <int kBits>
  static Floats lookup(Floats table, Ints index) {
    return kBits == 2 ? _mm512_permutevar_ps(table, index) : _mm512_permutexvar_ps(index, table);
  }

  // Codes of 3 bits by turns in two registers, each with the number of its octet in the bit above it: two masks a block
  // instead of one a code.
  struct MarkedCodes {
    Ints even, odd;

    void set(Ints words) {
      constexpr int kCodes = 0x1C71C7, kMarks = 0x208208;  // codes 0, 2, 4, 6; the bits above them
      const Ints marks = both(_mm256_setzero_si256(), _mm256_set1_epi32(kMarks)), mask = _mm512_set1_epi32(kCodes);
      even = _mm512_ternarylogic_epi32(words, mask, marks, 0xEA);  // (words & mask) | marks
      odd = _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 3), mask, marks, 0xEA);
    }
    template <int kCode>
    Ints at() const {
      return shift_right<3 * (kCode & ~1)>(kCode & 1 ? odd : even);
    }
  };
  template <int kBits>
  using Codes = std::conditional_t<kBits == 3, MarkedCodes, PlainCodes<Avx512, kBits>>;

  // A lane's codes of a block in a word; what stands above them is not used.
  template <int kBits>
  static Ints load_words(const u8* const* rows, size_t at) {
    const u8 *first = rows[0] + at, *second = rows[1] + at;
    if constexpr (kBits == 2)
      return _mm512_cvtepu16_epi32(_mm256_inserti128_si256(_mm256_castsi128_si256(load16(first)), load16(second), 1));
    if constexpr (kBits == 4) return both(load32(first), load32(second));
    const auto halves = [](const u8* from) {
      return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(from)), load16(from + 8), 1);
    };
    const __m256i bytes = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                           4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    return _mm512_shuffle_epi8(both(halves(first), halves(second)), both(bytes, bytes));
  }
};

}  // namespace

constinit const Routines kAvx512 = routines<Avx512>("avx512");

}  // namespace rl_accel::moe_int3
#endif
