// Blocks of 32 values in portable C++, for CPUs without AVX2; compilers make SSE2 or NEON of most of it.
#include "loops.hpp"

namespace rl_accel::codec {
namespace {

struct Scalar {
  struct Block {
    float at[kBlock];
  };

  template <class F>
  static Block each(F&& f) {
    Block out;
    for (size_t i = 0; i < kBlock; ++i) out.at[i] = f(i);
    return out;
  }

  static Block load(const float* x) {
    Block out;
    std::memcpy(out.at, x, sizeof out.at);
    return out;
  }
  static Block load(const Bfloat16* x) {
    u16 bits[kBlock];
    std::memcpy(bits, x, sizeof bits);
    return each([&](size_t i) { return __builtin_bit_cast(float, static_cast<u32>(bits[i]) << 16); });
  }
  static void store(float* to, const Block& x) { std::memcpy(to, x.at, sizeof x.at); }
  static void store(Bfloat16* to, const Block& x) {
    u16 out[kBlock];
    for (size_t i = 0; i < kBlock; ++i) {
      const u32 bits = __builtin_bit_cast(u32, x.at[i]);
      const u32 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
      out[i] = static_cast<u16>((bits & kMagnitude) > 0x7F800000 ? 0x7FC0 : rounded);
    }
    std::memcpy(to, out, sizeof out);
  }

  static Block add(const Block& x, const Block& y) {
    return each([&](size_t i) { return x.at[i] + y.at[i]; });
  }
  static Block sub(const Block& x, const Block& y) {
    return each([&](size_t i) { return x.at[i] - y.at[i]; });
  }
  static Block mul(const Block& x, float factor) {
    return each([&](size_t i) { return x.at[i] * factor; });
  }
  static Block clamp(const Block& x, int top) {
    const float high = static_cast<float>(top);
    return each([&](size_t i) { return x.at[i] > high ? high : x.at[i] < -high ? -high : x.at[i]; });
  }

  template <size_t kStride>
  static void butterfly(float* x) {
    for (size_t i = 0; i < kBlock; i += 2 * kStride)
      for (size_t k = i; k < i + kStride; ++k) {
        const float first = x[k], second = x[k + kStride];
        x[k] = first + second;
        x[k + kStride] = first - second;
      }
  }
  static Block rotate(Block x) {
    butterfly<1>(x.at);
    butterfly<2>(x.at);
    butterfly<4>(x.at);
    butterfly<8>(x.at);
    butterfly<16>(x.at);
    return x;
  }

  struct Bits {
    u32 at[8];
  };
  static Bits no_bits() { return {}; }
  static Bits max_bits(Bits most, const Block& x) {
    for (size_t i = 0; i < kBlock; ++i) {
      const u32 bits = __builtin_bit_cast(u32, x.at[i]) & kMagnitude;
      if (bits > most.at[i % 8]) most.at[i % 8] = bits;
    }
    return most;
  }
  static u32 reduce(const Bits& most) {
    u32 out = 0;
    for (const u32 bits : most.at) out = bits > out ? bits : out;
    return out;
  }

  static Words words(Words from) { return from; }
  static Block add_noise(const Block& x, Words& words) {
    Block out;
    for (size_t i = 0; i < kBlock; ++i) {
      u32 word = words.first + static_cast<u32>(i) * kWeyl;
      word = (word ^ word >> 16) * kMix1 ^ words.high;
      word = (word ^ word >> 15) * kMix2;
      word ^= word >> 16;
      out.at[i] = x.at[i] + (static_cast<float>(static_cast<int>(word >> 8)) * 0x1p-24f - 0.5f);
    }
    words.first += static_cast<u32>(kBlock) * kWeyl;
    return out;
  }

  // Half to even: adding 1.5 * 2^23 leaves no bits behind the point, and its low bits are the integer.
  static u32 rounded(float x) { return __builtin_bit_cast(u32, x + 0x1.8p23f); }
  static void write4(u8* codes, const Block& x) {
    for (size_t i = 0; i < 16; ++i)
      codes[i] = static_cast<u8>((rounded(x.at[i]) & 15) | rounded(x.at[i + 16]) << 4);
  }
  static void write8(u8* codes, const Block& x) {
    for (size_t i = 0; i < kBlock; ++i) codes[i] = static_cast<u8>(rounded(x.at[i]));
  }

  template <int kBits>
  struct Decoder {
    float scale;
    explicit Decoder(float of) : scale(of) {}
    Block operator()(const u8* codes) const {
      if constexpr (kBits == 8) {
        return each([&](size_t i) { return static_cast<float>(static_cast<signed char>(codes[i])) * scale; });
      } else {
        return each([&](size_t i) {
          const int nibble = i < 16 ? codes[i] & 15 : codes[i - 16] >> 4;
          return static_cast<float>((nibble ^ 8) - 8) * scale;
        });
      }
    }
  };
};

}  // namespace

constinit const Routines kScalar = routines<Scalar>("scalar");

}  // namespace rl_accel::codec
