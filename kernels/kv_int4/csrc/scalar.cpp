// Vectors of 16 in portable C++, for CPUs without AVX2.
#include "table.hpp"

namespace rl_accel::kv_int4 {
namespace {

struct Scalar {
  static constexpr size_t kRows = 4;

  struct Floats {
    float at[kLanes];
  };
  struct Ints {
    i32 at[kLanes];
  };

  template <class F>
  static Floats each(F&& f) {
    Floats out;
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

  static Floats load(const float* x) {
    Floats out;
    std::memcpy(out.at, x, sizeof out.at);
    return out;
  }
  static Floats load(const Bfloat16* x) {
    return each([&](size_t i) { return __builtin_bit_cast(float, static_cast<u32>(x[i].bits) << 16); });
  }
  static Floats load(const Float16* x) {
    return each([&](size_t i) { return from_half(x[i].bits); });
  }
  static Floats load_half(const u16* x) {
    return each([&](size_t i) { return from_half(x[i]); });
  }
  static Ints load(const i32* x) {
    Ints out;
    std::memcpy(out.at, x, sizeof out.at);
    return out;
  }
  static void store(float* to, const Floats& x) { std::memcpy(to, x.at, sizeof x.at); }
  static void store(i32* to, const Ints& x) { std::memcpy(to, x.at, sizeof x.at); }
  static void store(Bfloat16* to, const Floats& x) {
    for (size_t i = 0; i < kLanes; ++i) {
      const u32 bits = __builtin_bit_cast(u32, x.at[i]);
      const u32 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
      to[i].bits = static_cast<u16>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
  }
  static void store(Float16* to, const Floats& x) {
    for (size_t i = 0; i < kLanes; ++i) to[i].bits = to_half(x.at[i]);
  }

  static Floats set(float x) {
    return each([&](size_t) { return x; });
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
  static Floats min(const Floats& x, const Floats& y) {
    return each([&](size_t i) { return x.at[i] < y.at[i] ? x.at[i] : y.at[i]; });
  }
  static Floats max(const Floats& x, const Floats& y) {
    return each([&](size_t i) { return x.at[i] > y.at[i] ? x.at[i] : y.at[i]; });
  }
  static Floats abs(const Floats& x) {
    return each([&](size_t i) { return __builtin_fabsf(x.at[i]); });
  }
  static Floats floor(const Floats& x) {
    return each([&](size_t i) { return __builtin_floorf(x.at[i]); });
  }
  // Half to even: adding 1.5 * 2^23 leaves no bits behind the point, and its low bits are the integer.
  static Ints round(const Floats& x) {
    Ints out;
    for (size_t i = 0; i < kLanes; ++i)
      out.at[i] = static_cast<i32>(__builtin_bit_cast(u32, x.at[i] + 0x1.8p23f) - __builtin_bit_cast(u32, 0x1.8p23f));
    return out;
  }
  static Floats to_floats(const Ints& x) {
    return each([&](size_t i) { return static_cast<float>(x.at[i]); });
  }
  static Floats times_power(const Floats& y, const Floats& n) {  // whatever n is below -126: the result is not used
    return each([&](size_t i) {
      const u32 exponent = n.at[i] >= -126.0f && n.at[i] <= 127.0f ? static_cast<u32>(n.at[i] + 127.0f) : 1;
      return y.at[i] * __builtin_bit_cast(float, exponent << 23);
    });
  }
  static Floats zero_where_less(const Floats& x, const Floats& limit, const Floats& other) {
    return each([&](size_t i) { return x.at[i] < limit.at[i] ? 0.0f : other.at[i]; });
  }
  static Floats first_of(size_t count, const Floats& x, const Floats& y) {
    return each([&](size_t i) { return i < count ? x.at[i] : y.at[i]; });
  }

  static float first(const Floats& x) { return x.at[0]; }
  static float sum(Floats x) {
    for (size_t half = kLanes / 2; half; half /= 2)
      for (size_t i = 0; i < half; ++i) x.at[i] += x.at[i + half];
    return x.at[0];
  }
  static float highest(const Floats& x) {
    float out = x.at[0];
    for (const float value : x.at) out = value > out ? value : out;
    return out;
  }
  static float lowest(const Floats& x) {
    float out = x.at[0];
    for (const float value : x.at) out = value < out ? value : out;
    return out;
  }

  static void store_bytes(u8* to, const Ints& x) {
    for (size_t i = 0; i < kLanes; ++i) to[i] = static_cast<u8>(x.at[i]);
  }
  template <int kBits>
  static void store_pairs(i32* to, const Ints& x) {
    constexpr size_t kCodes = 32 / kBits, kPairs = kCodes / 2;
    for (size_t word = 0; word < kLanes; word += kCodes)
      for (size_t k = 0; k < kPairs; ++k)
        *to++ = static_cast<i32>((static_cast<u32>(x.at[word + k]) & 0xFFFF) | static_cast<u32>(x.at[word + k + kPairs])
                                                                                   << 16);
  }

  static Ints no_ints() { return {}; }
  template <int kNumRows, int kBits, int kStep, int kRowStep>
  static void dot(const u32* words, size_t count, const i32* pairs, Ints (&acc)[kNumRows]) {
    constexpr int kPairs = 16 / kBits;
    constexpr u32 kMask = (1u << kBits) - 1;
    for (size_t i = 0; i < count; ++i, words += kLanes)
      for (int k = 0; k < kPairs; ++k, pairs += kStep)
        for (int row = 0; row < kNumRows; ++row) {
          const i32 pair = pairs[row * kRowStep], first = static_cast<std::int16_t>(pair), second = pair >> 16;
          for (size_t lane = 0; lane < kLanes; ++lane)
            acc[row].at[lane] += first * static_cast<i32>(words[lane] >> (k * kBits) & kMask) +
                                 second * static_cast<i32>(words[lane] >> ((k + kPairs) * kBits) & kMask);
        }
  }

  template <size_t kOrder>
  static void rotate(float* x) {
    hadamard<kOrder>(x);
  }
};

}  // namespace

constinit const Routines kScalar = routines<Scalar>("scalar");

}  // namespace rl_accel::kv_int4
