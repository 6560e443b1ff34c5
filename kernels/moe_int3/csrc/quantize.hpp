// Least squares of scale and offset, and packing, over vectors that the file of each instruction set brings as `Isa`:
// kOctets times 8 lanes, every octet a group of its own, and values of a group in all lanes of its octet. So sums stay
// in registers, and where a vector is wider the bits are the same. All of it has internal linkage, since those files
// are compiled for different CPUs. For the same reason nothing of the C++ library is used here.
#pragma once

#include <cstring>

#include "routines.hpp"

namespace rl_accel::moe_int3 {
namespace {

constexpr u16 kNan = 0x7E00;  // float16
constexpr float kInfinity = __builtin_inff();
constexpr size_t kSideBySide = 2;  // vectors of groups: one waits for its sums while the other computes

template <class Isa>
using Floats = typename Isa::Floats;

inline bool finite(float x) { return __builtin_fabsf(x) < kInfinity; }

template <class Isa>
Floats<Isa> inverse(Floats<Isa> scale) {
  const auto zero = Isa::set(0.0f);
  return Isa::select_less(zero, scale, Isa::div(Isa::set(1.0f), scale), zero);
}

// Codes 0 .. max_code of a vector; a product that is NaN counts as 0. Rounding after clamping is the same and exact.
template <class Isa>
Floats<Isa> codes_of(Floats<Isa> x, Floats<Isa> offset, Floats<Isa> inverse, Floats<Isa> max_code) {
  const auto code = Isa::max(Isa::mul(Isa::sub(x, offset), inverse), Isa::set(0.0f));
  return Isa::round(Isa::min(code, max_code));
}

template <class Isa>
Floats<Isa> factor_codes_of(Floats<Isa> x, Floats<Isa> inverse) {
  const auto code = Isa::zero_if_nan(Isa::mul(x, inverse));
  return Isa::round(Isa::min(Isa::max(code, Isa::set(-8.0f)), Isa::set(7.0f)));
}

// Neighboring groups of 8 kVectors values, kOctets in each of kSideBySide vectors.
template <class Isa, size_t kVectors>
struct Groups {
  static constexpr size_t kSize = kVectors * kLanes, kCount = kSideBySide * Isa::kOctets;

  const float* values;
  float max_code;
  Floats<Isa> scale[kSideBySide], offset[kSideBySide];

  Floats<Isa> load(size_t u, size_t i) const {
    return Isa::load_octets(values + u * Isa::kOctets * kSize + i * kLanes, kSize);
  }

  void start() {
    constexpr float kRanges[] = {1.0f, 0.9f, 0.8f, 0.7f};
    for (size_t u = 0; u < kSideBySide; ++u) {
      auto low = load(u, 0), high = low;
      for (size_t i = 1; i < kVectors; ++i) {
        const auto x = load(u, i);
        low = Isa::min(low, x);
        high = Isa::max(high, x);
      }
      low = Isa::octet_min(low);
      high = Isa::octet_max(high);
      const auto middle = Isa::mul(Isa::add(low, high), Isa::set(0.5f));
      const auto half = Isa::mul(Isa::sub(high, low), Isa::set(0.5f));
      auto best = Isa::set(kInfinity);
      scale[u] = Isa::set(0.0f);
      offset[u] = low;
      for (const float part : kRanges) {
        const auto reach = Isa::mul(half, Isa::set(part));
        const auto s = Isa::div(Isa::add(reach, reach), Isa::set(max_code)), b = Isa::sub(middle, reach);
        const auto inverted = inverse<Isa>(s);
        auto error = Isa::set(0.0f);
#pragma GCC unroll 8
        for (size_t i = 0; i < kVectors; ++i) {
          const auto x = load(u, i), q = codes_of<Isa>(x, b, inverted, Isa::set(max_code));
          const auto difference = Isa::sub(x, Isa::add(Isa::mul(q, s), b));
          error = Isa::add(error, Isa::mul(difference, difference));
        }
        error = Isa::octet_sum(error);
        scale[u] = Isa::select_less(error, best, s, scale[u]);
        offset[u] = Isa::select_less(error, best, b, offset[u]);
        best = Isa::select_less(error, best, error, best);
      }
    }
  }

  void fit(int iterations) {
    constexpr float kPart = 1.0f / kSize;  // a power of two: times it is as divided by the size
    Floats<Isa> x_sum[kSideBySide];
    for (size_t u = 0; u < kSideBySide; ++u) {
      x_sum[u] = load(u, 0);
      for (size_t i = 1; i < kVectors; ++i) x_sum[u] = Isa::add(x_sum[u], load(u, i));
      x_sum[u] = Isa::octet_sum(x_sum[u]);
    }
    for (bool moved = true; moved && iterations > 0; --iterations) {
      moved = false;
      Floats<Isa> q_sum[kSideBySide], qq_sum[kSideBySide], qx_sum[kSideBySide];
#pragma GCC unroll 2
      for (size_t u = 0; u < kSideBySide; ++u) {
        const auto inverted = inverse<Isa>(scale[u]);
        q_sum[u] = qq_sum[u] = qx_sum[u] = Isa::set(0.0f);
#pragma GCC unroll 8
        for (size_t i = 0; i < kVectors; ++i) {
          const auto x = load(u, i), q = codes_of<Isa>(x, offset[u], inverted, Isa::set(max_code));
          q_sum[u] = Isa::add(q_sum[u], q);
          qq_sum[u] = Isa::fma(q, q, qq_sum[u]);  // integers: exact
          qx_sum[u] = Isa::add(qx_sum[u], Isa::mul(q, x));
        }
      }
#pragma GCC unroll 2
      for (size_t u = 0; u < kSideBySide; ++u) {
        const auto part = Isa::set(kPart), zero = Isa::set(0.0f);
        const auto q = Isa::octet_sum(q_sum[u]), qq = Isa::octet_sum(qq_sum[u]), qx = Isa::octet_sum(qx_sum[u]);
        const auto variance = Isa::sub(qq, Isa::mul(Isa::mul(q, q), part));
        const auto covariance = Isa::sub(qx, Isa::mul(Isa::mul(q, x_sum[u]), part));
        const auto fitted = Isa::div(covariance, variance);
        const auto moved_offset = Isa::mul(Isa::sub(x_sum[u], Isa::mul(fitted, q)), part);
        // Both must be above zero, and a variance never is below.
        const auto s = Isa::select_less(zero, variance, Isa::select_less(zero, covariance, fitted, scale[u]), scale[u]);
        const auto b =
            Isa::select_less(zero, variance, Isa::select_less(zero, covariance, moved_offset, offset[u]), offset[u]);
        // Equal codes give an equal scale and offset, and the other way round.
        moved |= Isa::any_differs(s, scale[u]) || Isa::any_differs(b, offset[u]);
        scale[u] = s;
        offset[u] = b;
      }
    }
  }
};

// Octets of `words` get the codes of a group each, code i of a lane at bit bits * i.
template <class Isa, size_t kVectors, class Codes>
void gather_codes(int bits, u32* words, Codes&& codes) {
  auto word = Isa::to_ints(codes(0));
  for (size_t i = 1; i < kVectors; ++i)
    word = Isa::bit_or(word, Isa::shift_left(Isa::to_ints(codes(i)), static_cast<int>(i) * bits));
  Isa::store(words, word);
}

inline void store_block(u8* to, const u32* words, int bits) {
  const auto store = [&]<size_t kBits>() {
    for (size_t lane = 0; lane < kLanes; ++lane) std::memcpy(to + lane * kBits, words + lane, kBits);
  };
  if (bits == 2)
    store.template operator()<2>();
  else if (bits == 3)
    store.template operator()<3>();
  else
    store.template operator()<4>();
}

// `count` groups of `values`, at most Groups::kCount, to words of 8 lanes each, scales and offsets.
template <class Isa, size_t kVectors>
void quantize_groups(const float* values, size_t count, int bits, int iterations, u32* words, u16* scales,
                     u16* offsets) {
  using These = Groups<Isa, kVectors>;
  constexpr size_t kCount = These::kCount, kSize = These::kSize;
  alignas(64) float copy[kCount * kSize];
  bool bad[kCount] = {};
  bool clean = count == kCount;
  if (clean) {
    auto zeros = Isa::set(0.0f);  // NaN as soon as a value is not finite
    for (size_t i = 0; i < kCount * kSize; i += Isa::kOctets * kLanes)
      zeros = Isa::fma(Isa::load(values + i), Isa::set(0.0f), zeros);
    clean = !Isa::any_differs(zeros, Isa::set(0.0f));
  }
  if (!clean) {
    std::memset(copy, 0, sizeof copy);
    for (size_t group = 0; group < count; ++group) {
      for (size_t i = 0; i < kSize; ++i) bad[group] |= !finite(values[group * kSize + i]);
      if (!bad[group]) std::memcpy(copy + group * kSize, values + group * kSize, kSize * sizeof(float));
    }
    values = copy;
  }
  These groups{values, static_cast<float>((1 << bits) - 1), {}, {}};
  groups.start();
  groups.fit(iterations);
  alignas(64) float fitted[2][kSideBySide][Isa::kOctets * kLanes];
  alignas(64) u32 found[kCount * kLanes];
  for (size_t u = 0; u < kSideBySide; ++u) {
    Isa::store(fitted[0][u], groups.scale[u]);
    Isa::store(fitted[1][u], groups.offset[u]);
    for (size_t octet = 0; octet < Isa::kOctets; ++octet) {
      const size_t group = u * Isa::kOctets + octet;
      float &s = fitted[0][u][octet * kLanes], &b = fitted[1][u][octet * kLanes];
      u16 scale = Isa::to_half(s + 0.0f), offset = Isa::to_half(b + 0.0f);
      if (scale == 0x8000) scale = 0;
      if (offset == 0x8000) offset = 0;
      s = Isa::from_half(scale);
      b = Isa::from_half(offset);
      if (bad[group] || !finite(s) || !finite(b)) {
        scale = offset = kNan;
        s = b = 0.0f;  // whence codes of 0
      }
      if (group < count) {
        scales[group] = scale;
        offsets[group] = offset;
      }
    }
    const auto s = Isa::broadcast(fitted[0][u], kLanes), b = Isa::broadcast(fitted[1][u], kLanes);
    const auto inverted = inverse<Isa>(s), max_code = Isa::set(groups.max_code);
    gather_codes<Isa, kVectors>(bits, found + u * Isa::kOctets * kLanes,
                                [&](size_t i) { return codes_of<Isa>(groups.load(u, i), b, inverted, max_code); });
  }
  std::memcpy(words, found, count * kLanes * sizeof(u32));
}

template <class Isa, size_t kVectors>
void quantize_rows(const float* weights, size_t rows, const Layout& layout, int iterations, u8* codes, u16* scales,
                   u16* offsets) {
  constexpr size_t kCount = Groups<Isa, kVectors>::kCount, kSize = Groups<Isa, kVectors>::kSize;
  constexpr size_t kPerBlock = kBlock / kSize;
  const size_t groups = layout.groups(), blocks = divide_up(layout.in_features, kBlock);
  const size_t total = rows * groups, block_bytes = kLanes * static_cast<size_t>(layout.bits);
  // Groups follow each other in memory across rows, so that vectors are full where rows are short.
  u32 words[(kCount + 1) * kLanes];
  size_t row = 0, column = 0;
  u32 block[kLanes] = {};
  for (size_t first = 0; first < total; first += kCount) {
    const size_t count = total - first < kCount ? total - first : kCount;
    quantize_groups<Isa, kVectors>(weights + first * kSize, count, layout.bits, iterations, words, scales + first,
                                   offsets + first);
    for (size_t group = 0; group < count; ++group) {
      const int shift = static_cast<int>(column % kPerBlock * kVectors) * layout.bits;
      for (size_t lane = 0; lane < kLanes; ++lane) block[lane] |= words[group * kLanes + lane] << shift;
      if (++column % kPerBlock == 0 || column == groups) {
        store_block(codes + (row * blocks + (column - 1) / kPerBlock) * block_bytes, block, layout.bits);
        std::memset(block, 0, sizeof block);
      }
      if (column == groups) {
        column = 0;
        ++row;
      }
    }
  }
}

template <class Isa>
void quantize(const float* weights, size_t rows, const Layout& layout, int iterations, u8* codes, u16* scales,
              u16* offsets) {
  if (layout.group_size == kBlock)
    quantize_rows<Isa, 8>(weights, rows, layout, iterations, codes, scales, offsets);
  else
    quantize_rows<Isa, 4>(weights, rows, layout, iterations, codes, scales, offsets);
}

// Blocks of a factor, kOctets at a time; those behind `count` are copies without use.
template <class Isa>
void quantize_factor_blocks(const float* values, size_t count, int iterations, u32* words, u16* scales) {
  constexpr size_t kCount = Isa::kOctets, kVectors = kBlock / kLanes;
  alignas(64) float copy[kCount * kBlock] = {}, fitted[kCount * kLanes];
  alignas(64) u32 found[kCount * kLanes];
  bool bad[kCount] = {};
  for (size_t block = 0; block < count; ++block) {
    for (size_t i = 0; i < kBlock; ++i) bad[block] |= !finite(values[block * kBlock + i]);
    if (!bad[block]) std::memcpy(copy + block * kBlock, values + block * kBlock, kBlock * sizeof(float));
  }
  const auto load = [&](size_t i) { return Isa::load_octets(copy + i * kLanes, kBlock); };
  auto largest = Isa::abs(load(0));
  for (size_t i = 1; i < kVectors; ++i) largest = Isa::max(largest, Isa::abs(load(i)));
  auto scale = Isa::div(Isa::octet_max(largest), Isa::set(7.5f));
  for (bool moved = true; moved && iterations > 0; --iterations) {
    const auto inverted = inverse<Isa>(scale), zero = Isa::set(0.0f);
    auto qq = zero, qx = zero;
    for (size_t i = 0; i < kVectors; ++i) {
      const auto x = load(i), q = factor_codes_of<Isa>(x, inverted);
      qq = Isa::fma(q, q, qq);
      qx = Isa::add(qx, Isa::mul(q, x));
    }
    qq = Isa::octet_sum(qq);
    qx = Isa::octet_sum(qx);
    const auto fitted_scale = Isa::div(qx, Isa::max(qq, Isa::set(1.0f)));
    const auto s = Isa::select_less(zero, qq, Isa::select_less(zero, qx, fitted_scale, scale), scale);
    moved = Isa::any_differs(s, scale);
    scale = s;
  }
  Isa::store(fitted, scale);
  for (size_t block = 0; block < kCount; ++block) {
    float& s = fitted[block * kLanes];
    u16 half = Isa::to_half(s);
    s = Isa::from_half(half);
    if (bad[block] || !finite(s)) {
      half = kNan;
      s = 0.0f;
    }
    if (block < count) scales[block] = half;
  }
  const auto inverted = inverse<Isa>(Isa::broadcast(fitted, kLanes));
  gather_codes<Isa, kVectors>(kFactorBits, found, [&](size_t i) {
    return Isa::add(factor_codes_of<Isa>(load(i), inverted), Isa::set(static_cast<float>(kFactorZero)));
  });
  std::memcpy(words, found, count * kLanes * sizeof(u32));
}

template <class Isa>
void quantize_factor(const float* values, size_t rows, size_t length, int iterations, u8* codes, u16* scales) {
  const size_t blocks = divide_up(length, kBlock), whole = length / kBlock, block_bytes = kLanes * kFactorBits;
  u32 words[Isa::kOctets * kLanes];
  for (; rows-- > 0; values += length, codes += blocks * block_bytes, scales += blocks) {
    for (size_t first = 0; first < whole; first += Isa::kOctets) {
      const size_t count = whole - first < Isa::kOctets ? whole - first : Isa::kOctets;
      quantize_factor_blocks<Isa>(values + first * kBlock, count, iterations, words, scales + first);
      for (size_t i = 0; i < count; ++i)
        store_block(codes + (first + i) * block_bytes, words + i * kLanes, kFactorBits);
    }
    if (whole == blocks) continue;
    float last[kBlock] = {};
    const size_t rest = length - whole * kBlock;
    std::memcpy(last, values + whole * kBlock, rest * sizeof(float));
    quantize_factor_blocks<Isa>(last, 1, iterations, words, scales + whole);
    for (size_t k = rest; k < kBlock; ++k) words[k % kLanes] &= ~(15u << (kFactorBits * (k / kLanes)));
    store_block(codes + whole * block_bytes, words, kFactorBits);
  }
}

}  // namespace
}  // namespace rl_accel::moe_int3
