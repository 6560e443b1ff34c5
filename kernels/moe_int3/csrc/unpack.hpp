// From codes to the weights that they stand for, over vectors that the file of each instruction set brings as `Isa`.
// All of it has internal linkage, since those files are compiled for different CPUs.
#pragma once

#include "routines.hpp"

// Called, the innermost functions would pass registers through memory.
#define RL_ACCEL_INLINE __attribute__((always_inline))

namespace rl_accel::moe_int3 {
namespace {

// Words of a block, from which one code of each lane after the other is taken. What stands above a code is whatever
// `Isa::lookup` does not look at.
template <class Isa, int kBits>
struct PlainCodes {
  typename Isa::Ints words;

  RL_ACCEL_INLINE inline void set(typename Isa::Ints found) { words = found; }
  template <int kCode>
  RL_ACCEL_INLINE inline typename Isa::Ints at() const {
    return Isa::template shift_right<kBits * kCode>(words);
  }
};

// What the codes of a group stand for.
template <class Isa, int kBits>
struct Levels {
  typename Isa::Floats first, second;

  // Octet o has the scale and offset that stand o * stride behind.
  RL_ACCEL_INLINE inline void read(const float* scales, const float* offsets, size_t stride) {
    const auto scale = Isa::broadcast(scales, stride), offset = Isa::broadcast(offsets, stride);
    if constexpr (kBits == 4) {
      first = scale;
      second = offset;
    } else {  // a table of 8 levels, or of 4 levels twice: bits above a code select nothing
      first = Isa::fma(Isa::template count<(1 << kBits)>(), scale, offset);
    }
  }
  // Of a code of each lane. The product is exact, so this is the one rounding of a weight.
  RL_ACCEL_INLINE inline typename Isa::Floats of(typename Isa::Ints code) const {
    if constexpr (kBits == 4)
      return Isa::fma(Isa::to_floats(Isa::bit_and(code, 15)), first, second);
    else
      return Isa::template lookup<kBits>(first, code);
  }
};

// kVectors vectors of rows: their codes, and scales and offsets that stand `stride` apart from row to row.
template <class Isa, size_t kVectors>
struct Tile {
  const u8* codes[kVectors * Isa::kOctets];
  const float *scales, *offsets;
  size_t stride;
};

// Calls visit(v, k, 8 weights from k on of each row of vector v) in order of k for K from `begin` to `end`, multiples
// of 32 and `begin` of 64. Lines `prefetch` bytes ahead of the codes are fetched.
template <int kBits, size_t kGroup, class Isa, size_t kVectors, class Visit>
RL_ACCEL_INLINE inline void unpack(const Tile<Isa, kVectors>& tile, size_t begin, size_t end, size_t prefetch,
                                   Visit&& visit) {
  constexpr size_t kOctets = Isa::kOctets;
  Levels<Isa, kBits> levels[kVectors];
  typename Isa::template Codes<kBits> codes[kVectors];
  const auto read = [&](size_t group) RL_ACCEL_INLINE {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      const size_t at = v * kOctets * tile.stride + group;
      levels[v].read(tile.scales + at, tile.offsets + at, tile.stride);
    }
  };
  const auto code = [&]<int kCode>(size_t k) RL_ACCEL_INLINE {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) visit(v, k + kCode * kLanes, levels[v].of(codes[v].template at<kCode>()));
  };
  for (size_t k = begin; k < end; k += kBlock) {
    const size_t at = k / kBlock * kLanes * kBits;
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      codes[v].set(Isa::template load_words<kBits>(tile.codes + v * kOctets, at));
      for (size_t o = 0; o < kOctets; ++o) __builtin_prefetch(tile.codes[v * kOctets + o] + at + prefetch);
    }
    read(k / kGroup);
    code.template operator()<0>(k);
    code.template operator()<1>(k);
    code.template operator()<2>(k);
    code.template operator()<3>(k);
    if (k + kBlock / 2 >= end) return;
    if constexpr (kGroup < kBlock) read(k / kGroup + 1);
    code.template operator()<4>(k);
    code.template operator()<5>(k);
    code.template operator()<6>(k);
    code.template operator()<7>(k);
  }
}

}  // namespace
}  // namespace rl_accel::moe_int3
