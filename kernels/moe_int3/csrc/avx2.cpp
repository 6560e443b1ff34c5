// Vectors of 8 lanes in AVX2 registers. Compiled with -mavx2 -mfma -mf16c.
#include "../../common/csrc/intrinsics.hpp"
#if defined(__x86_64__)
#include "table.hpp"

namespace rl_accel::moe_int3 {
namespace {

struct Avx2 {
  static constexpr size_t kOctets = 1;
  static constexpr size_t kRowVectors = 4;
  static constexpr size_t kFewTokens = 4;   // that use weights as they are unpacked
  static constexpr size_t kTileTokens = 1;  // of them, that use all vectors of rows at a time
  static constexpr size_t kManyTokens = 3;  // 12 sums, 3 tokens, 1 vector of weights: all 16 registers

  using Floats = __m256;
  using Ints = __m256i;

  static float from_half(u16 half) { return _cvtsh_ss(half); }
  static u16 to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
  static void to_floats(const u16* from, float* to, size_t count) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8) store(to + i, _mm256_cvtph_ps(load16(from + i)));
    for (; i < count; ++i) to[i] = from_half(from[i]);
  }

  static __m128i load16(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
  static Floats load(const float* x) { return _mm256_loadu_ps(x); }
  static Floats load_octets(const float* x, size_t) { return load(x); }
  static Floats load_same(const float* x) { return load(x); }
  static Floats broadcast(const float* x, size_t) { return _mm256_broadcast_ss(x); }
  static void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
  static void store(u32* to, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
  static void store_octets(float* const* to, size_t at, Floats x) { store(to[0] + at, x); }

  static Floats set(float x) { return _mm256_set1_ps(x); }
  template <int kModulus>
  static Floats count() {
    return _mm256_setr_ps(0, 1, 2, 3, 4 % kModulus, 5 % kModulus, 6 % kModulus, 7 % kModulus);
  }
  static Floats add(Floats x, Floats y) { return _mm256_add_ps(x, y); }
  static Floats sub(Floats x, Floats y) { return _mm256_sub_ps(x, y); }
  static Floats mul(Floats x, Floats y) { return _mm256_mul_ps(x, y); }
  static Floats div(Floats x, Floats y) { return _mm256_div_ps(x, y); }
  static Floats fma(Floats x, Floats y, Floats z) { return _mm256_fmadd_ps(x, y, z); }
  static Floats min(Floats x, Floats y) { return _mm256_min_ps(x, y); }  // y if one is NaN
  static Floats max(Floats x, Floats y) { return _mm256_max_ps(x, y); }
  static Floats abs(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  static Floats round(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Floats floor(Floats x) { return _mm256_floor_ps(x); }
  static Floats zero_if_nan(Floats x) { return _mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q)); }
  static Floats select_less(Floats x, Floats limit, Floats y, Floats other) {
    return _mm256_blendv_ps(other, y, _mm256_cmp_ps(x, limit, _CMP_LT_OQ));
  }
  static Floats zero_where_less(Floats x, Floats limit, Floats y) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), y);
  }
  static Floats times_power(Floats y, Floats n) {  // whatever n is below -126: the result is not used
    const Ints exponent = _mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127));
    return mul(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static bool any_differs(Floats x, Floats y) { return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_NEQ_UQ)) != 0; }

  // Of the lanes of each octet, in all of them: lanes i and i + 4, then + 2, + 1.
  template <class F>
  static Floats fold(Floats x, F&& f) {
    x = f(x, _mm256_permute2f128_ps(x, x, 1));
    x = f(x, _mm256_permute_ps(x, 0x4E));
    return f(x, _mm256_permute_ps(x, 0xB1));
  }
  static Floats octet_sum(Floats x) { return fold(x, add); }
  static Floats octet_min(Floats x) { return fold(x, min); }
  static Floats octet_max(Floats x) { return fold(x, max); }
  static void octet_totals(Floats x, float* to) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    *to = _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  static Ints to_ints(Floats x) { return _mm256_cvtps_epi32(x); }
  static Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
  static Ints bit_or(Ints x, Ints y) { return _mm256_or_si256(x, y); }
  static Ints bit_and(Ints x, int mask) { return _mm256_and_si256(x, _mm256_set1_epi32(mask)); }
  static Ints shift_left(Ints x, int count) { return _mm256_slli_epi32(x, count); }
  template <int kCount>
  static Ints shift_right(Ints x) {
    return kCount ? _mm256_srli_epi32(x, kCount) : x;
  }
  // By the low bits of an index. Within halves, where the levels stand twice: one micro-operation instead of two.
  template <int kBits>
  static Floats lookup(Floats table, Ints index) {
    return kBits == 2 ? _mm256_permutevar_ps(table, index) : _mm256_permutevar8x32_ps(table, index);
  }

  template <int kBits>
  using Codes = PlainCodes<Avx2, kBits>;

  // A lane's codes of a block in a word; what stands above them is not used.
  template <int kBits>
  static Ints load_words(const u8* const* rows, size_t at) {
    const u8* from = rows[0] + at;
    if constexpr (kBits == 2) return _mm256_cvtepu16_epi32(load16(from));
    if constexpr (kBits == 4) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const Ints both = _mm256_inserti128_si256(_mm256_castsi128_si256(load16(from)), load16(from + 8), 1);
    const Ints bytes = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                        4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    return _mm256_shuffle_epi8(both, bytes);
  }
};

}  // namespace

constinit const Routines kAvx2 = routines<Avx2>("avx2");

}  // namespace rl_accel::moe_int3
#endif
