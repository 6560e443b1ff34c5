// The three operations, group by group. The first pass over a group finds its largest magnitude and leaves its values in
// the first-level cache, the second encodes them.
#include "codec.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "dispatch.hpp"
#include "parallel.hpp"

namespace rl_accel::codec {
namespace {

constexpr u32 kInfinity = 0x7F800000;
constexpr float kTiny = 0x1p-100f;
constexpr size_t kChunk = 2048;  // values that are summed over all blocks before the next; 8 KiB

size_t bytes_per_value(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

const void* at(Values values, size_t i) {
  return values.data ? static_cast<const u8*>(values.data) + i * bytes_per_value(values.dtype) : nullptr;
}

u32 mix(u32 word) {
  word = (word ^ word >> 16) * kMix1;
  word = (word ^ word >> 15) * kMix2;
  return word ^ word >> 16;
}

Noise noise_of(const Rounding& rounding, size_t first) {
  const u64 index = rounding.offset + first;
  return {static_cast<u32>(index) * kWeyl + static_cast<u32>(rounding.key),
          mix(static_cast<u32>(index >> 32) ^ static_cast<u32>(rounding.key >> 32))};
}

// Where a block's codes and scales go.
struct Packer {
  u8* codes;
  u8* scales;
  Format format;
  Rounding rounding;
  Encode encode;
  float top, step;

  Packer(u8* out, size_t numel, Format of, Rounding with, const Routines& routines)
      : codes(out),
        scales(out + of.code_bytes(numel)),
        format(of),
        rounding(with),
        encode(routines.encode[of.bits == 8][with.stochastic]),
        top(of.bits == 8 ? 127.f : 7.f),
        step(static_cast<float>(of.bits == 8 ? 1.0 / 127 : 1.0 / 7)) {}

  void write(size_t group, const float* values, u32 largest_bits) const {
    const size_t num_bytes = format.group_size / 8 * static_cast<size_t>(format.bits);
    const float largest = __builtin_bit_cast(float, largest_bits);
    float scale = 0;
    if (largest_bits < kInfinity && largest >= kTiny) {
      scale = largest * step;
      const float inverse = 1.0f / largest * top;  // as torch divides a number by a tensor: two roundings
      encode(codes + group * num_bytes, values, format.group_size, inverse, noise_of(rounding, group * format.group_size));
    } else {
      if (largest_bits >= kInfinity) scale = std::numeric_limits<float>::quiet_NaN();
      std::memset(codes + group * num_bytes, 0, num_bytes);
    }
    std::memcpy(scales + group * sizeof scale, &scale, sizeof scale);
  }
};

// Reads blocks that follow each other.
struct Unpacker {
  const u8* blocks;
  size_t num_blocks, block_bytes, code_bytes;
  Format format;
  const Routines& routines;

  Unpacker(const u8* from, size_t count, size_t numel, Format of, const Routines& with)
      : blocks(from),
        num_blocks(count),
        block_bytes(of.packed_bytes(numel)),
        code_bytes(of.code_bytes(numel)),
        format(of),
        routines(with) {}

  const u8* codes(size_t block, size_t first) const {
    return blocks + block * block_bytes + first / 8 * static_cast<size_t>(format.bits);
  }
  float scale(size_t block, size_t first) const {
    float out;
    std::memcpy(&out, blocks + block * block_bytes + code_bytes + first / format.group_size * sizeof out, sizeof out);
    return out;
  }
  // Sum of the first `count` blocks over values that lie in one group.
  void sum(float* values, size_t first, size_t size, size_t count) const {
    for (size_t block = 0; block < count; ++block)
      routines.accumulate[format.bits == 8][block > 0](values, codes(block, first), size, scale(block, first));
  }
};

}  // namespace

void quantize(u8* out, size_t numel, Values x, Values subtract, Format format, Rounding rounding, bool hadamard,
              unsigned threads) {
  const Routines& routines = chosen_routines();
  const size_t size = format.group_size;
  const bool x_half = x.dtype == Dtype::kBfloat16;
  const int other = !subtract.data ? 0 : subtract.dtype == Dtype::kFloat32 ? 1 : 2;
  const Fill fill = routines.fill[x_half][other][hadamard];
  const bool as_is = !x_half && !other && !hadamard;
  const Packer packer(out, numel, format, rounding, routines);
  split_groups(format.num_groups(numel), size, threads, size, [&](size_t first, size_t last, float* scratch) {
    for (size_t group = first; group < last; ++group) {
      const size_t start = group * size, count = std::min(size, numel - start);
      if (as_is && count == size) {
        const float* values = static_cast<const float*>(at(x, start));
        packer.write(group, values, routines.largest(values, size));
      } else {
        packer.write(group, scratch, fill(scratch, at(x, start), at(subtract, start), count, size));
      }
    }
  });
}

void dequantize(void* out, Dtype dtype, size_t numel, const u8* blocks, size_t num_blocks, Format format, bool hadamard,
                bool add, unsigned threads) {
  const Routines& routines = chosen_routines();
  const Unpacker unpacker(blocks, num_blocks, numel, format, routines);
  const Finish finish = routines.finish[format.bits == 8][dtype == Dtype::kBfloat16][hadamard][add];
  const size_t size = format.group_size, last_block = num_blocks - 1, chunk = last_block ? std::min(size, kChunk) : size;
  split_groups(format.num_groups(numel), size, threads, last_block ? chunk : 0, [&](size_t first, size_t last, float* sum) {
    const size_t end = std::min(last * size, numel);
    for (size_t start = first * size; start < end; start += chunk) {
      if (last_block) unpacker.sum(sum, start, chunk, last_block);
      finish(static_cast<u8*>(out) + start * bytes_per_value(dtype), unpacker.codes(last_block, start),
             std::min(chunk, end - start), unpacker.scale(last_block, start), last_block ? sum : nullptr);
    }
  });
}

void requantize(u8* out, size_t numel, const u8* blocks, size_t num_blocks, Format from, Format format,
                Rounding rounding, unsigned threads) {
  const Routines& routines = chosen_routines();
  const Unpacker unpacker(blocks, num_blocks, numel, from, routines);
  const Packer packer(out, numel, format, rounding, routines);
  const size_t size = format.group_size, chunk = std::min({size, from.group_size, kChunk}), held = from.padded(numel);
  split_groups(format.num_groups(numel), size, threads, size, [&](size_t first, size_t last, float* values) {
    for (size_t group = first; group < last; ++group) {
      for (size_t i = 0; i < size; i += chunk) {
        if (group * size + i < held) {
          unpacker.sum(values + i, group * size + i, chunk, num_blocks);
        } else {
          std::memset(values + i, 0, chunk * sizeof(float));
        }
      }
      packer.write(group, values, routines.largest(values, size));
    }
  });
}

}  // namespace rl_accel::codec
