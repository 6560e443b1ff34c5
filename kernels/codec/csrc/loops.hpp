// The loops of routines.hpp, written once over blocks of 32 values. Included by the file of each instruction set, which
// brings `Isa`; all of it has internal linkage, since those files are compiled for different CPUs. For the same reason
// nothing of the C++ library is used here.
#pragma once

#include <cstring>

#include "../../common/csrc/hadamard.hpp"
#include "../../common/csrc/noise.hpp"
#include "routines.hpp"

namespace rl_accel::codec {
namespace {

struct Bfloat16 {
  u16 bits;
};

struct None {};

template <class T, class U>
constexpr bool kSame = false;
template <class T>
constexpr bool kSame<T, T> = true;

template <class Isa, class X, class S, bool kHadamard>
typename Isa::Block difference(const X* x, [[maybe_unused]] const S* subtract) {
  auto block = Isa::load(x);
  if constexpr (!kSame<S, None>) block = Isa::sub(block, Isa::load(subtract));
  if constexpr (kHadamard) block = Isa::rotate(block);
  return block;
}

template <class Isa, class X, class S, bool kHadamard>
u32 fill_group(float* values, const X* x, const S* subtract, size_t count, size_t total) {
  auto bits = Isa::no_bits();
  size_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    const auto block = difference<Isa, X, S, kHadamard>(x + i, subtract + i);
    Isa::store(values + i, block);
    bits = Isa::max_bits(bits, block);
  }
  if (i < count) {
    X x_rest[kBlock] = {};
    S subtract_rest[kBlock] = {};
    std::memcpy(x_rest, x + i, (count - i) * sizeof(X));
    if constexpr (!kSame<S, None>) std::memcpy(subtract_rest, subtract + i, (count - i) * sizeof(S));
    const auto block = difference<Isa, X, S, kHadamard>(x_rest, subtract_rest);
    Isa::store(values + i, block);
    bits = Isa::max_bits(bits, block);
    i += kBlock;
  }
  if (i < total) std::memset(values + i, 0, (total - i) * sizeof(float));
  return Isa::reduce(bits);
}

template <class Isa, class X, class S, bool kHadamard>
void fill(float* values, const void* x, const void* subtract, size_t count, size_t total, size_t group_size,
          u32* largest) {
  for (size_t i = 0; i < total; i += group_size) {
    const size_t left = count > i ? count - i : 0;
    *largest++ =
        fill_group<Isa, X, S, kHadamard>(values + i, static_cast<const X*>(x) + i, static_cast<const S*>(subtract) + i,
                                         left < group_size ? left : group_size, group_size);
  }
}

template <class Isa>
void largest(const float* values, size_t total, size_t group_size, u32* largest) {
  for (size_t i = 0; i < total;) {
    auto bits = Isa::no_bits();
    for (const size_t end = i + group_size; i < end; i += kBlock) bits = Isa::max_bits(bits, Isa::load(values + i));
    *largest++ = Isa::reduce(bits);
  }
}

// Nearest needs no clamp: |value| <= largest and the inverse is exact to 2^-21, so no product rounds to top + 1.
template <class Isa, int kBits, bool kStochastic>
void encode(u8* codes, const float* values, size_t total, size_t group_size, const float* inverses,
            [[maybe_unused]] Noise noise) {
  for (size_t i = 0; i < total;) {
    const float inverse = *inverses++;
    if (inverse == 0) {
      std::memset(codes, 0, group_size * kBits / 8);
      codes += group_size * kBits / 8;
      i += group_size;
      continue;
    }
    // A group starts at a multiple of its size, so all its values share the bits above the lowest 32.
    [[maybe_unused]] auto run = Isa::noise_run(rl_accel::noise_run(noise.key, noise.index + i));
    for (const size_t end = i + group_size; i < end; i += kBlock, codes += kBlock * kBits / 8) {
      auto block = Isa::mul(Isa::load(values + i), inverse);
      if constexpr (kStochastic) block = Isa::clamp(Isa::add_noise(block, run), (1 << (kBits - 1)) - 1);
      if constexpr (kBits == 4) {
        Isa::write4(codes, block);
      } else {
        Isa::write8(codes, block);
      }
    }
  }
}

float scale_at(const u8* scales) {
  float scale;
  std::memcpy(&scale, scales, sizeof scale);
  return scale;
}

template <class Isa, int kBits, bool kAdd>
void accumulate(float* values, const u8* codes, size_t count, size_t group_size, const u8* scales) {
  for (size_t i = 0; i < count; scales += sizeof(float)) {
    const typename Isa::template Decoder<kBits> decode(scale_at(scales));
    const size_t end = count - i < group_size ? count : i + group_size;
    for (; i < end; i += kBlock) {
      auto block = decode(codes + i * kBits / 8);
      if constexpr (kAdd) block = Isa::add(Isa::load(values + i), block);
      Isa::store(values + i, block);
    }
  }
}

template <class Isa, int kBits, class Out, bool kHadamard, bool kAdd>
void finish(void* out_data, const u8* codes, size_t count, size_t group_size, const u8* scales, const float* sum) {
  Out* out = static_cast<Out*>(out_data);
  for (size_t i = 0; i < count; scales += sizeof(float)) {
    const typename Isa::template Decoder<kBits> decode(scale_at(scales));
    const auto finish_block = [&](Out* to) {
      auto block = decode(codes + i * kBits / 8);
      if (sum) block = Isa::add(Isa::load(sum + i), block);
      if constexpr (kHadamard) block = Isa::mul(Isa::rotate(block), 1.0f / kBlock);
      if constexpr (kAdd) block = Isa::add(Isa::load(to), block);
      Isa::store(to, block);
    };
    const size_t end = count - i < group_size ? count : i + group_size;
    for (; i + kBlock <= end; i += kBlock) finish_block(out + i);
    if (i < end) {
      Out rest[kBlock] = {};
      if constexpr (kAdd) std::memcpy(rest, out + i, (end - i) * sizeof(Out));
      finish_block(rest);
      std::memcpy(out + i, rest, (end - i) * sizeof(Out));
      i = end;
    }
  }
}

template <class Isa>
constexpr Routines routines(const char* name) {
  using F = float;
  using B = Bfloat16;
  using N = None;
  return {
      name,
      {{{fill<Isa, F, N, false>, fill<Isa, F, N, true>},
        {fill<Isa, F, F, false>, fill<Isa, F, F, true>},
        {fill<Isa, F, B, false>, fill<Isa, F, B, true>}},
       {{fill<Isa, B, N, false>, fill<Isa, B, N, true>},
        {fill<Isa, B, F, false>, fill<Isa, B, F, true>},
        {fill<Isa, B, B, false>, fill<Isa, B, B, true>}}},
      largest<Isa>,
      {{encode<Isa, 4, false>, encode<Isa, 4, true>}, {encode<Isa, 8, false>, encode<Isa, 8, true>}},
      {{accumulate<Isa, 4, false>, accumulate<Isa, 4, true>}, {accumulate<Isa, 8, false>, accumulate<Isa, 8, true>}},
      {{{{finish<Isa, 4, F, false, false>, finish<Isa, 4, F, false, true>},
         {finish<Isa, 4, F, true, false>, finish<Isa, 4, F, true, true>}},
        {{finish<Isa, 4, B, false, false>, finish<Isa, 4, B, false, true>},
         {finish<Isa, 4, B, true, false>, finish<Isa, 4, B, true, true>}}},
       {{{finish<Isa, 8, F, false, false>, finish<Isa, 8, F, false, true>},
         {finish<Isa, 8, F, true, false>, finish<Isa, 8, F, true, true>}},
        {{finish<Isa, 8, B, false, false>, finish<Isa, 8, B, false, true>},
         {finish<Isa, 8, B, true, false>, finish<Isa, 8, B, true, true>}}}},
  };
}

}  // namespace
}  // namespace rl_accel::codec
