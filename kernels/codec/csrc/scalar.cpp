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

  static Block rotate(Block x) {
    hadamard<kBlock>(x.at);
    return x;
  }

  struct Bits {
    int at[8];
  };
  static Bits no_bits() { return {}; }
  static Bits max_bits(Bits most, const Block& x) {
    for (size_t i = 0; i < kBlock; i += 8)
      for (size_t k = 0; k < 8; ++k) {
        const int bits = __builtin_bit_cast(int, x.at[i + k]) & static_cast<int>(kMagnitude);
        most.at[k] = bits > most.at[k] ? bits : most.at[k];
      }
    return most;
  }
  static u32 reduce(const Bits& most) {
    int out = 0;
    for (const int bits : most.at) out = bits > out ? bits : out;
    return static_cast<u32>(out);
  }

  static NoiseRun noise_run(NoiseRun run) { return run; }
  static Block add_noise(Block x, NoiseRun& run) {
    rl_accel::add_noise<kBlock>(x.at, run);
    return x;
  }

  // Half to even: adding 1.5 * 2^23 leaves no bits behind the point, and its low bits are the integer.
  static u32 rounded(float x) { return __builtin_bit_cast(u32, x + 0x1.8p23f); }
  static void write4(u8* codes, const Block& x) {
    for (size_t i = 0; i < 16; ++i) codes[i] = static_cast<u8>((rounded(x.at[i]) & 15) | rounded(x.at[i + 16]) << 4);
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
        Block out;
        for (size_t i = 0; i < 16; ++i) {
          out.at[i] = static_cast<float>(((codes[i] & 15) ^ 8) - 8) * scale;
          out.at[i + 16] = static_cast<float>((codes[i] >> 4 ^ 8) - 8) * scale;
        }
        return out;
      }
    }
  };
};

}  // namespace

constinit const Routines kScalar = routines<Scalar>("scalar");

}  // namespace rl_accel::codec
