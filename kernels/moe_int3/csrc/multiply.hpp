// Rows of quantized weights times tokens, over vectors that the file of each instruction set brings as `Isa`: kOctets
// times 8 lanes, every octet a row of its own. Weight k of a row is added in lane k % 8, in order, whatever the tile,
// so that a result depends on its row and its token alone. All of it has internal linkage, since those files are
// compiled for different CPUs. For the same reason nothing of the C++ library is used here.
#pragma once

#include <cstring>

#include "../../common/csrc/exp.hpp"
#include "unpack.hpp"

namespace rl_accel::moe_int3 {
namespace {

// Few tokens: weights are used as they are unpacked. out[m * out_stride + row] of kVectors vectors of rows.
template <int kBits, size_t kGroup, size_t kTokens, class Isa, size_t kVectors>
void multiply_few(const Tile<Isa, kVectors>& tile, size_t in_features, size_t prefetch, const float* const* x,
                  typename Isa::Floats (&sums)[kTokens][kVectors]) {
  const float* tokens[kTokens];
  for (size_t m = 0; m < kTokens; ++m) tokens[m] = x[m];
  typename Isa::Floats acc[kTokens][kVectors];
  for (size_t m = 0; m < kTokens; ++m)
    for (size_t v = 0; v < kVectors; ++v) acc[m][v] = Isa::set(0.0f);
  unpack<kBits, kGroup>(tile, 0, in_features, prefetch,
                        [&](size_t v, size_t k, typename Isa::Floats weights) RL_ACCEL_INLINE {
#pragma GCC unroll 8
                          for (size_t m = 0; m < kTokens; ++m)
                            acc[m][v] = Isa::fma(weights, Isa::load_same(tokens[m] + k), acc[m][v]);
                        });
  for (size_t m = 0; m < kTokens; ++m)
    for (size_t v = 0; v < kVectors; ++v) sums[m][v] = acc[m][v];
}

// Many tokens: a chunk of unpacked weights, Isa::kRowVectors of them every 8 along K, times kTokens of them.
template <class Isa, size_t kTokens>
void multiply_chunk(const float* chunk, size_t length, const float* const* x, size_t begin, float* sums) {
  constexpr size_t kWidth = Isa::kOctets * kLanes;
  const float* tokens[kTokens];
  for (size_t m = 0; m < kTokens; ++m) tokens[m] = x[m] + begin;
  typename Isa::Floats acc[kTokens][Isa::kRowVectors];
#pragma GCC unroll 8
  for (size_t m = 0; m < kTokens; ++m)
#pragma GCC unroll 4
    for (size_t v = 0; v < Isa::kRowVectors; ++v) acc[m][v] = Isa::load(sums + (m * Isa::kRowVectors + v) * kWidth);
  for (size_t k = 0; k < length; k += kLanes, chunk += Isa::kRowVectors * kWidth) {
    typename Isa::Floats at[kTokens];
#pragma GCC unroll 8
    for (size_t m = 0; m < kTokens; ++m) at[m] = Isa::load_same(tokens[m] + k);
#pragma GCC unroll 4
    for (size_t v = 0; v < Isa::kRowVectors; ++v) {
      const auto weights = Isa::load(chunk + v * kWidth);
#pragma GCC unroll 8
      for (size_t m = 0; m < kTokens; ++m) acc[m][v] = Isa::fma(weights, at[m], acc[m][v]);
    }
  }
#pragma GCC unroll 8
  for (size_t m = 0; m < kTokens; ++m)
#pragma GCC unroll 4
    for (size_t v = 0; v < Isa::kRowVectors; ++v) Isa::store(sums + (m * Isa::kRowVectors + v) * kWidth, acc[m][v]);
}

template <class Isa>
void multiply_chunk_rest(size_t count, const float* chunk, size_t length, const float* const* x, size_t begin,
                         float* sums) {
  if constexpr (Isa::kManyTokens > 1)
    if (count == 1) return multiply_chunk<Isa, 1>(chunk, length, x, begin, sums);
  if constexpr (Isa::kManyTokens > 2)
    if (count == 2) return multiply_chunk<Isa, 2>(chunk, length, x, begin, sums);
  if constexpr (Isa::kManyTokens > 3) {
    if (count == 3) return multiply_chunk<Isa, 3>(chunk, length, x, begin, sums);
    if (count == 4) return multiply_chunk<Isa, 4>(chunk, length, x, begin, sums);
    return multiply_chunk<Isa, 5>(chunk, length, x, begin, sums);
  }
}

template <class Isa, int kBits, size_t kGroup>
void multiply_many(const Tile<Isa, Isa::kRowVectors>& tile, const Product& product, size_t prefetch,
                   const Scratch& scratch) {
  constexpr size_t kWidth = Isa::kOctets * kLanes, kSums = Isa::kRowVectors * kWidth, kTokens = Isa::kManyTokens;
  std::memset(scratch.sums, 0, product.num_tokens * kSums * sizeof(float));
  for (size_t begin = 0; begin < product.layout.in_features; begin += kChunk) {
    const size_t rest = product.layout.in_features - begin, length = rest < kChunk ? rest : kChunk;
    unpack<kBits, kGroup>(tile, begin, begin + length, prefetch,
                          [to = scratch.chunk](size_t, size_t, typename Isa::Floats weights) mutable RL_ACCEL_INLINE {
                            Isa::store(to, weights);  // vectors follow each other at each k
                            to += kWidth;
                          });
    size_t m = 0;
    for (; m + kTokens <= product.num_tokens; m += kTokens)
      multiply_chunk<Isa, kTokens>(scratch.chunk, length, product.x + m, begin, scratch.sums + m * kSums);
    if (m < product.num_tokens)
      multiply_chunk_rest<Isa>(product.num_tokens - m, scratch.chunk, length, product.x + m, begin,
                               scratch.sums + m * kSums);
  }
}

// `sums` of kVectors vectors of rows, of which the first `count` rows are wanted.
template <class Isa, size_t kVectors>
void write_rows(const typename Isa::Floats* sums, size_t count, float* out) {
  float totals[kVectors * Isa::kOctets];
  for (size_t v = 0; v < kVectors; ++v) Isa::octet_totals(sums[v], totals + v * Isa::kOctets);
  for (size_t row = 0; row < count && row < kVectors * Isa::kOctets; ++row) out[row] = totals[row];
}

// Half of the vectors of a tile, for as many tokens as leave no registers for all of them.
template <class Isa>
Tile<Isa, 2> half_of(const Tile<Isa, Isa::kRowVectors>& tile, size_t half) {
  constexpr size_t kRows = 2 * Isa::kOctets;
  Tile<Isa, 2> out{
      {}, tile.scales + half * kRows * tile.stride, tile.offsets + half * kRows * tile.stride, tile.stride};
  for (size_t row = 0; row < kRows; ++row) out.codes[row] = tile.codes[half * kRows + row];
  return out;
}

template <class Isa, int kBits, size_t kGroup, size_t kTokens>
void multiply_tile(const Tile<Isa, Isa::kRowVectors>& tile, const Product& product, size_t prefetch, size_t count,
                   float* out) {
  typename Isa::Floats sums[kTokens][Isa::kRowVectors];
  multiply_few<kBits, kGroup>(tile, product.layout.in_features, prefetch, product.x, sums);
  for (size_t m = 0; m < kTokens; ++m) write_rows<Isa, Isa::kRowVectors>(sums[m], count, out + m * product.out_stride);
}

template <class Isa, int kBits, size_t kGroup, size_t kTokens>
void multiply_halves(const Tile<Isa, Isa::kRowVectors>& tile, const Product& product, size_t prefetch, size_t count,
                     float* out) {
  constexpr size_t kRows = 2 * Isa::kOctets;
  for (size_t half = 0; half < 2 && half * kRows < count; ++half) {
    typename Isa::Floats sums[kTokens][2];
    multiply_few<kBits, kGroup>(half_of(tile, half), product.layout.in_features, prefetch, product.x, sums);
    for (size_t m = 0; m < kTokens; ++m)
      write_rows<Isa, 2>(sums[m], count - half * kRows, out + m * product.out_stride + half * kRows);
  }
}

// Returns false if these are more tokens than weights are used for as they are unpacked.
template <class Isa, int kBits, size_t kGroup, size_t kTokens = 1>
bool multiply_few_tokens(const Tile<Isa, Isa::kRowVectors>& tile, const Product& product, size_t prefetch, size_t count,
                         float* out) {
  if constexpr (kTokens <= Isa::kFewTokens) {
    if (product.num_tokens != kTokens)
      return multiply_few_tokens<Isa, kBits, kGroup, kTokens + 1>(tile, product, prefetch, count, out);
    if constexpr (kTokens <= Isa::kTileTokens)
      multiply_tile<Isa, kBits, kGroup, kTokens>(tile, product, prefetch, count, out);
    else
      multiply_halves<Isa, kBits, kGroup, kTokens>(tile, product, prefetch, count, out);
    return true;
  }
  return false;
}

template <class Isa, int kBits, size_t kGroup>
void multiply_rows(const Product& product, const Scratch& scratch) {
  constexpr size_t kRows = Isa::kRowVectors * Isa::kOctets, kWidth = Isa::kOctets * kLanes;
  const size_t in_features = product.layout.in_features, groups = divide_up(in_features, kGroup);
  const size_t bytes = product.layout.bytes();
  Tile<Isa, Isa::kRowVectors> tile{{}, scratch.scales, scratch.offsets, groups};
  for (size_t first = 0; first < product.num_rows; first += kRows) {
    const size_t rest = product.num_rows - first, count = rest < kRows ? rest : kRows;
    for (size_t row = 0; row < kRows; ++row) {  // rows behind the last are copies of it and not written
      const size_t from = first + (row < count ? row : count - 1);
      tile.codes[row] = product.codes + from * bytes;
      float *scales = scratch.scales + row * groups, *offsets = scratch.offsets + row * groups;
      Isa::to_floats(product.scales + from * groups, scales, groups);
      if (product.offsets)
        Isa::to_floats(product.offsets + from * groups, offsets, groups);
      else
        for (size_t i = 0; i < groups; ++i) offsets[i] = scales[i] * -static_cast<float>(kFactorZero);
    }
    float* out = product.out + first;
    const size_t prefetch = kRows * bytes;
    if (multiply_few_tokens<Isa, kBits, kGroup>(tile, product, prefetch, count, out)) continue;
    multiply_many<Isa, kBits, kGroup>(tile, product, prefetch, scratch);
    for (size_t m = 0; m < product.num_tokens; ++m) {
      typename Isa::Floats sums[Isa::kRowVectors];
      for (size_t v = 0; v < Isa::kRowVectors; ++v)
        sums[v] = Isa::load(scratch.sums + (m * Isa::kRowVectors + v) * kWidth);
      write_rows<Isa, Isa::kRowVectors>(sums, count, out + m * product.out_stride);
    }
  }
}

// Values of kOctets rows of a factor, 64 of each from a block on; no rounding. Rows behind `count` are
// copies of the last.
template <class Isa>
void unpack_factor(const u8* codes, size_t bytes, const u16* scales, size_t blocks, size_t count, float* const* to) {
  float units[Isa::kOctets], offsets[Isa::kOctets];
  Tile<Isa, 1> tile{{}, units, offsets, 1};
  for (size_t o = 0; o < Isa::kOctets; ++o) {
    const size_t row = o < count ? o : count - 1;
    tile.codes[o] = codes + row * bytes;
    units[o] = Isa::from_half(scales[row * blocks]);
    offsets[o] = units[o] * -static_cast<float>(kFactorZero);
  }
  unpack<kFactorBits, kBlock>(tile, 0, kBlock, 0, [&](size_t, size_t k, typename Isa::Floats values) RL_ACCEL_INLINE {
    Isa::store_octets(to, k, values);
  });
}

template <class Isa>
void dequantize_factor(const u8* codes, const u16* scales, size_t rows, size_t length, float* values) {
  const size_t blocks = divide_up(length, kBlock), bytes = blocks * kLanes * kFactorBits;
  for (size_t row = 0; row < rows; row += Isa::kOctets)
    for (size_t block = 0; block < blocks; ++block) {
      const size_t rest = length - block * kBlock, count = rest < kBlock ? rest : kBlock;
      float found[Isa::kOctets][kBlock], *to[Isa::kOctets];
      for (size_t o = 0; o < Isa::kOctets; ++o) to[o] = found[o];
      unpack_factor<Isa>(codes + row * bytes + block * kLanes * kFactorBits, bytes, scales + row * blocks + block,
                         blocks, rows - row, to);
      for (size_t o = 0; o < Isa::kOctets && row + o < rows; ++o)
        std::memcpy(values + (row + o) * length + block * kBlock, found[o], count * sizeof(float));
    }
}

// out += U^ t of those rows that lie in a block, rank by rank.
template <class Isa>
void add_compensator(const Product& product, size_t block, const Scratch& scratch) {
  constexpr size_t kWidth = Isa::kOctets * kLanes;
  for (size_t rank = 0; rank < product.rank; rank += Isa::kOctets) {
    float* to[Isa::kOctets];
    for (size_t o = 0; o < Isa::kOctets; ++o) to[o] = scratch.u + (rank + o) * kBlock;
    unpack_factor<Isa>(product.u_codes + rank * product.u_bytes + block * kLanes * kFactorBits, product.u_bytes,
                       product.u_scales + rank * product.u_blocks + block, product.u_blocks, product.rank - rank, to);
  }
  const size_t skip = block ? 0 : product.u_skip, first = block * kBlock + skip - product.u_skip;
  const size_t rest = product.num_rows - first, count = rest < kBlock - skip ? rest : kBlock - skip;
  for (size_t m = 0; m < product.num_tokens; ++m) {
    float *out = product.out + m * product.out_stride + first, values[kBlock] = {};
    std::memcpy(values + skip, out, count * sizeof(float));
    const float* t = product.t + m * product.t_stride;
    typename Isa::Floats y[kBlock / kWidth];
#pragma GCC unroll 8
    for (size_t i = 0; i < kBlock / kWidth; ++i) y[i] = Isa::load(values + i * kWidth);
    for (size_t rank = 0; rank < product.rank; ++rank) {
      const auto factor = Isa::set(t[rank]);
      const float* u = scratch.u + rank * kBlock;
#pragma GCC unroll 8
      for (size_t i = 0; i < kBlock / kWidth; ++i) y[i] = Isa::fma(factor, Isa::load(u + i * kWidth), y[i]);
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < kBlock / kWidth; ++i) Isa::store(values + i * kWidth, y[i]);
    std::memcpy(out, values + skip, count * sizeof(float));
  }
}

template <class Isa>
void multiply(const Product& product, const Scratch& scratch) {
  const bool wide = product.layout.group_size == kBlock;
  switch (product.layout.bits) {
    case 2:
      (wide ? multiply_rows<Isa, 2, 64> : multiply_rows<Isa, 2, 32>)(product, scratch);
      break;
    case 3:
      (wide ? multiply_rows<Isa, 3, 64> : multiply_rows<Isa, 3, 32>)(product, scratch);
      break;
    default:
      (wide ? multiply_rows<Isa, 4, 64> : multiply_rows<Isa, 4, 32>)(product, scratch);
  }
  if (product.rank)
    for (size_t block = 0; block * kBlock < product.u_skip + product.num_rows; ++block)
      add_compensator<Isa>(product, block, scratch);
}

template <class Isa, int kBits, size_t kGroup>
void dequantize_rows(const Matrix& matrix, size_t rows, float* weights) {
  constexpr size_t kOctets = Isa::kOctets;
  const size_t in_features = matrix.layout.in_features, groups = matrix.layout.groups();
  for (size_t first = 0; first < rows; first += kOctets) {
    // Few groups at a time: their scales lie on the stack.
    constexpr size_t kGroups = kChunk / kGroup;
    float scales[kOctets * kGroups], offsets[kOctets * kGroups];
    for (size_t begin = 0; begin < in_features; begin += kChunk) {
      const size_t rest = in_features - begin, length = rest < kChunk ? rest : kChunk;
      Tile<Isa, 1> tile{{}, scales, offsets, kGroups};
      float* to[kOctets];
      for (size_t o = 0; o < kOctets; ++o) {
        const size_t row = first + o < rows ? first + o : rows - 1, at = row * groups + begin / kGroup;
        tile.codes[o] = matrix.codes + row * matrix.layout.bytes() + begin / kBlock * kLanes * kBits;
        to[o] = weights + row * in_features + begin;
        Isa::to_floats(matrix.scales + at, scales + o * kGroups, length / kGroup);
        Isa::to_floats(matrix.offsets + at, offsets + o * kGroups, length / kGroup);
      }
      unpack<kBits, kGroup>(tile, 0, length, 0, [&](size_t, size_t k, typename Isa::Floats values) RL_ACCEL_INLINE {
        Isa::store_octets(to, k, values);
      });
    }
  }
}

template <class Isa>
void dequantize(const Matrix& matrix, size_t rows, float* weights) {
  const bool wide = matrix.layout.group_size == kBlock;
  switch (matrix.layout.bits) {
    case 2:
      return (wide ? dequantize_rows<Isa, 2, 64> : dequantize_rows<Isa, 2, 32>)(matrix, rows, weights);
    case 3:
      return (wide ? dequantize_rows<Isa, 3, 64> : dequantize_rows<Isa, 3, 32>)(matrix, rows, weights);
    default:
      return (wide ? dequantize_rows<Isa, 4, 64> : dequantize_rows<Isa, 4, 32>)(matrix, rows, weights);
  }
}

// f of the vectors of values that follow each other; the last may be incomplete.
template <class Isa, class F>
void each_vector(float* values, const float* others, size_t count, F&& f) {
  constexpr size_t kWidth = Isa::kOctets * kLanes;
  size_t i = 0;
  for (; i + kWidth <= count; i += kWidth) Isa::store(values + i, f(Isa::load(values + i), Isa::load(others + i)));
  if (i == count) return;
  float a[kWidth] = {}, b[kWidth] = {};
  std::memcpy(a, values + i, (count - i) * sizeof(float));
  std::memcpy(b, others + i, (count - i) * sizeof(float));
  Isa::store(a, f(Isa::load(a), Isa::load(b)));
  std::memcpy(values + i, a, (count - i) * sizeof(float));
}

template <class Isa>
void activate(float* gate, const float* up, size_t count) {
  each_vector<Isa>(gate, up, count, [](auto x, auto y) { return Isa::mul(silu<Isa>(x), y); });
}

template <class Isa>
void add_scaled(float* out, const float* x, float weight, size_t count) {
  each_vector<Isa>(out, x, count, [&](auto sum, auto y) { return Isa::add(sum, Isa::mul(Isa::set(weight), y)); });
}

}  // namespace
}  // namespace rl_accel::moe_int3

#undef RL_ACCEL_INLINE
