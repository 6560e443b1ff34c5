// What one instruction set offers: the work of one thread. Tables of function pointers, so that one binary holds all
// sets and chooses when it runs.
#pragma once

#include "moe_int3.hpp"

namespace rl_accel::moe_int3 {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using i32 = std::int32_t;
using std::size_t;

constexpr size_t kMaxOctets = 2;                          // of 8 lanes in a vector
constexpr size_t kMaxRowVectors = 4;                      // vectors of rows that run beside each other
constexpr size_t kMaxRows = kMaxOctets * kMaxRowVectors;  // rows, likewise
constexpr size_t kChunkBlocks = 8;                        // blocks of a row that are unpacked at a time for many tokens
constexpr size_t kChunk = kChunkBlocks * kBlock;          // weights
constexpr size_t kMaxLanes = kMaxOctets * kLanes;         // of a vector
constexpr size_t kQuantizedGroups = 512;                  // of a part of a quantization

// Rows of a matrix, or of V, times some tokens, plus the compensator.
struct Product {
  const u8* codes;  // of the first row
  const u16* scales;
  const u16* offsets;  // null: those of a factor, -8 times the scale
  Layout layout;       // of a factor: groups of 64, the last may be half
  size_t num_rows;
  const float* const* x;  // [num_tokens], each in_features
  size_t num_tokens;
  float* out;  // [num_tokens, num_rows], tokens out_stride apart
  size_t out_stride;
  // Rank 0: there is no compensator.
  const u8* u_codes;  // of the block of 64 in which the rows begin, for the first rank
  const u16* u_scales;
  size_t u_bytes, u_blocks;  // from one rank to the next
  size_t u_skip;             // rows of the block before the first
  size_t rank;
  const float* t;  // V^ x, [num_tokens, rank], tokens t_stride apart
  size_t t_stride;
};

// Working memory of a thread for products of up to so many groups in a row, tokens and ranks.
struct Scratch {
  float *scales, *offsets;  // [kMaxRows, groups]
  float* chunk;             // [kMaxRowVectors, kChunk, 8, octets]
  float* sums;              // [num_tokens, kMaxRowVectors, kMaxLanes]
  float* u;                 // [rank, or one more, 64]

  static size_t num_floats(size_t groups, size_t num_tokens, size_t rank) {
    return 2 * kMaxRows * padded(groups) + kMaxRows * kChunk + num_tokens * kMaxRowVectors * kMaxLanes +
           divide_up(rank, kMaxOctets) * kMaxOctets * kBlock;
  }
  Scratch(float* memory, size_t groups, size_t num_tokens)
      : scales(memory),
        offsets(scales + kMaxRows * padded(groups)),
        chunk(offsets + kMaxRows * padded(groups)),
        sums(chunk + kMaxRows * kChunk),
        u(sums + num_tokens * kMaxRowVectors * kMaxLanes) {}

 private:
  static size_t padded(size_t groups) { return divide_up(groups, kMaxLanes) * kMaxLanes; }
};

using Multiply = void (*)(const Product& product, const Scratch& scratch);
// gate = silu(gate) * up.
using Activate = void (*)(float* gate, const float* up, size_t count);
// out += weight * x.
using AddScaled = void (*)(float* out, const float* x, float weight, size_t count);
using Quantize = void (*)(const float* weights, size_t rows, const Layout& layout, int iterations, u8* codes,
                          u16* scales, u16* offsets);
using Dequantize = void (*)(const Matrix& matrix, size_t rows, float* weights);
using QuantizeFactor = void (*)(const float* values, size_t rows, size_t length, int iterations, u8* codes,
                                u16* scales);
using DequantizeFactor = void (*)(const u8* codes, const u16* scales, size_t rows, size_t length, float* values);

struct Routines {
  const char* name;
  Quantize quantize;
  QuantizeFactor quantize_factor;
  Dequantize dequantize;
  DequantizeFactor dequantize_factor;
  Multiply multiply;
  Activate activate;
  AddScaled add_scaled;
};

extern const Routines kScalar;
#if defined(__x86_64__)
extern const Routines kAvx2;
extern const Routines kAvx512;
#endif

}  // namespace rl_accel::moe_int3
