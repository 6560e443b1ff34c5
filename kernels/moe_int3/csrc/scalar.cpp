// Vectors of 8 lanes in portable C++, for CPUs without AVX2.
#include "table.hpp"

namespace rl_accel::moe_int3 {
namespace {

struct Scalar {
  static constexpr size_t kOctets = 1;
  static constexpr size_t kRowVectors = 1;
  static constexpr size_t kFewTokens = 0;   // that use weights as they are unpacked
  static constexpr size_t kTileTokens = 0;  // of them, that use all vectors of rows at a time
  static constexpr size_t kManyTokens = 1;

  struct Floats {
    float at[kLanes];
  };
  struct Ints {
    u32 at[kLanes];
  };

  template <class F>
  static Floats each(F&& f) {
    Floats out;
    for (size_t i = 0; i < kLanes; ++i) out.at[i] = f(i);
    return out;
  }
  template <class F>
  static Ints each_int(F&& f) {
    Ints out;
    for (size_t i = 0; i < kLanes; ++i) out.at[i] = f(i);
    return out;
  }

  static float from_half(u16 half) {
    const u32 sign = static_cast<u32>(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 0) {
      const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
      return sign ? -magnitude : magnitude;
    }
    const u32 wide = exponent == 31 ? 0xFF : exponent + 112;
    return __builtin_bit_cast(float, sign | wide << 23 | mantissa << 13);
  }
  static u16 to_half(float x) {  // nearest, half to even
    const u32 bits = __builtin_bit_cast(u32, x), magnitude = bits & 0x7FFFFFFF;
    const u32 sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7F800000) return static_cast<u16>(sign | 0x7E00);
    if (magnitude >= 0x477FF000) return static_cast<u16>(sign | 0x7C00);
    if (magnitude < 0x38800000) {  // subnormal: 0.5 has the last place of the result
      const float moved = __builtin_bit_cast(float, magnitude) + 0.5f;
      return static_cast<u16>(sign | (__builtin_bit_cast(u32, moved) - 0x3F000000));
    }
    return static_cast<u16>(sign | (magnitude + 0xC8000FFF + (magnitude >> 13 & 1)) >> 13);
  }
  static void to_floats(const u16* from, float* to, size_t count) {
    for (size_t i = 0; i < count; ++i) to[i] = from_half(from[i]);
  }

  static Floats load(const float* x) {
    Floats out;
    std::memcpy(out.at, x, sizeof out.at);
    return out;
  }
  static Floats load_octets(const float* x, size_t) { return load(x); }
  static Floats load_same(const float* x) { return load(x); }
  static Floats broadcast(const float* x, size_t) { return set(*x); }
  static void store(float* to, const Floats& x) { std::memcpy(to, x.at, sizeof x.at); }
  static void store(u32* to, const Ints& x) { std::memcpy(to, x.at, sizeof x.at); }
  static void store_octets(float* const* to, size_t at, const Floats& x) { store(to[0] + at, x); }

  static Floats set(float x) {
    return each([&](size_t) { return x; });
  }
  template <int kModulus>
  static Floats count() {
    return each([](size_t i) { return static_cast<float>(i % kModulus); });
  }
  static Floats add(const Floats& x, const Floats& y) {
    return each([&](size_t i) { return x.at[i] + y.at[i]; });
  }
  static Floats sub(const Floats& x, const Floats& y) {
    return each([&](size_t i) { return x.at[i] - y.at[i]; });
  }
  static Floats mul(const Floats& x, const Floats& y) {
    return each([&](size_t i) { return x.at[i] * y.at[i]; });
  }
  static Floats div(const Floats& x, const Floats& y) {
    return each([&](size_t i) { return x.at[i] / y.at[i]; });
  }
  static Floats fma(const Floats& x, const Floats& y, const Floats& z) {
    return each([&](size_t i) { return __builtin_fmaf(x.at[i], y.at[i], z.at[i]); });
  }
  static Floats min(const Floats& x, const Floats& y) {  // y if one is NaN
    return each([&](size_t i) { return x.at[i] < y.at[i] ? x.at[i] : y.at[i]; });
  }
  static Floats max(const Floats& x, const Floats& y) {
    return each([&](size_t i) { return x.at[i] > y.at[i] ? x.at[i] : y.at[i]; });
  }
  static Floats abs(const Floats& x) {
    return each([&](size_t i) { return __builtin_fabsf(x.at[i]); });
  }
  // Half to even, of magnitudes below 2^22.
  static Floats round(const Floats& x) {
    return each([&](size_t i) { return x.at[i] + 0x1.8p23f - 0x1.8p23f; });
  }
  static Floats floor(const Floats& x) {
    return each([&](size_t i) { return __builtin_floorf(x.at[i]); });
  }
  static Floats zero_if_nan(const Floats& x) {
    return each([&](size_t i) { return x.at[i] == x.at[i] ? x.at[i] : 0.0f; });
  }
  static Floats select_less(const Floats& x, const Floats& limit, const Floats& y, const Floats& other) {
    return each([&](size_t i) { return x.at[i] < limit.at[i] ? y.at[i] : other.at[i]; });
  }
  static Floats zero_where_less(const Floats& x, const Floats& limit, const Floats& y) {
    return select_less(x, limit, set(0.0f), y);
  }
  static Floats times_power(const Floats& y, const Floats& n) {  // whatever n is below -126: the result is not used
    return each([&](size_t i) {
      const u32 exponent = n.at[i] >= -126.0f && n.at[i] <= 127.0f ? static_cast<u32>(n.at[i] + 127.0f) : 1;
      return y.at[i] * __builtin_bit_cast(float, exponent << 23);
    });
  }
  static bool any_differs(const Floats& x, const Floats& y) {
    for (size_t i = 0; i < kLanes; ++i)
      if (!(x.at[i] == y.at[i])) return true;
    return false;
  }

  // Of the lanes of each octet, in all of them: lanes i and i + 4, then + 2, + 1.
  template <class F>
  static Floats fold(Floats x, F&& f) {
    for (size_t stride = kLanes / 2; stride > 0; stride /= 2)
      x = f(x, each([&](size_t i) { return x.at[i ^ stride]; }));
    return x;
  }
  static Floats octet_sum(const Floats& x) { return fold(x, add); }
  static Floats octet_min(const Floats& x) { return fold(x, min); }
  static Floats octet_max(const Floats& x) { return fold(x, max); }
  static void octet_totals(const Floats& x, float* to) { *to = octet_sum(x).at[0]; }

  static Ints to_ints(const Floats& x) {
    return each_int([&](size_t i) { return static_cast<u32>(x.at[i]); });
  }
  static Floats to_floats(const Ints& x) {
    return each([&](size_t i) { return static_cast<float>(x.at[i]); });
  }
  static Ints bit_or(const Ints& x, const Ints& y) {
    return each_int([&](size_t i) { return x.at[i] | y.at[i]; });
  }
  static Ints bit_and(const Ints& x, u32 mask) {
    return each_int([&](size_t i) { return x.at[i] & mask; });
  }
  static Ints shift_left(const Ints& x, int count) {
    return each_int([&](size_t i) { return x.at[i] << count; });
  }
  template <int kCount>
  static Ints shift_right(const Ints& x) {
    return each_int([&](size_t i) { return x.at[i] >> kCount; });
  }
  // By the low three bits of an index.
  template <int>
  static Floats lookup(const Floats& table, const Ints& index) {
    return each([&](size_t i) { return table.at[index.at[i] & 7]; });
  }

  template <int kBits>
  using Codes = PlainCodes<Scalar, kBits>;

  // A lane's codes of a block in a word.
  template <int kBits>
  static Ints load_words(const u8* const* rows, size_t at) {
    return each_int([&](size_t i) {
      u32 word = 0;
      std::memcpy(&word, rows[0] + at + i * kBits, kBits);
      return word;
    });
  }
};

}  // namespace

constinit const Routines kScalar = routines<Scalar>("scalar");

}  // namespace rl_accel::moe_int3
