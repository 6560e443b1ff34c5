// The three operations. They go through the values a batch at a time: some groups that fit into the first-level cache.
// A first pass over a batch finds the largest magnitudes, a second one encodes, so that no group waits for its own
// maximum.
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
constexpr size_t kBatch = 2048;  // values, or one group if that is larger
constexpr size_t kMostGroups = kBatch / kBlock;

size_t bytes_per_value(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

const void* at(Values values, size_t i) {
  return values.data ? static_cast<const u8*>(values.data) + i * bytes_per_value(values.dtype) : nullptr;
}

// Writes a block.
class Packer {
 public:
  Packer(u8* out, size_t numel, Format format, Rounding rounding, const Routines& routines)
      : codes_(out),
        scales_(out + format.code_bytes(numel)),
        format_(format),
        rounding_(rounding),
        encode_(routines.encode[format.bits == 8][rounding.stochastic]),
        top_(format.bits == 8 ? 127.f : 7.f),
        step_(static_cast<float>(format.bits == 8 ? 1.0 / 127 : 1.0 / 7)) {}

  // `total` values of whole groups, from value `first` of the block, with the bits of their largest magnitudes.
  void write(const float* values, size_t first, size_t total, const u32* largest) const {
    const size_t num_groups = total / format_.group_size;
    float scales[kMostGroups], inverses[kMostGroups];
    for (size_t g = 0; g < num_groups; ++g) {
      const float most = __builtin_bit_cast(float, largest[g]);
      const bool finite = largest[g] < kInfinity, live = finite && most >= kTiny;
      scales[g] = live ? most * step_ : finite ? 0.f : std::numeric_limits<float>::quiet_NaN();
      inverses[g] = live ? 1.0f / most * top_ : 0.f;  // two roundings, as torch divides a number by a tensor
    }
    std::memcpy(scales_ + first / format_.group_size * sizeof(float), scales, num_groups * sizeof(float));
    encode_(codes_ + first / 8 * static_cast<size_t>(format_.bits), values, total, format_.group_size, inverses,
            {rounding_.key, rounding_.offset + first});
  }

 private:
  u8* codes_;
  u8* scales_;
  Format format_;
  Rounding rounding_;
  Encode encode_;
  float top_, step_;
};

// Reads blocks that follow each other.
struct Unpacker {
  const u8* blocks;
  Format format;
  size_t block_bytes, code_bytes;

  Unpacker(const u8* from, size_t numel, Format of)
      : blocks(from), format(of), block_bytes(of.packed_bytes(numel)), code_bytes(of.code_bytes(numel)) {}

  const u8* codes(size_t block, size_t first) const {
    return blocks + block * block_bytes + first / 8 * static_cast<size_t>(format.bits);
  }
  const u8* scales(size_t block, size_t first) const {
    return blocks + block * block_bytes + code_bytes + first / format.group_size * sizeof(float);
  }
  // Sum of the first `num_blocks`; `count` values from `first` are whole groups or lie in one.
  void sum(float* values, size_t first, size_t count, size_t num_blocks, const Routines& routines) const {
    for (size_t block = 0; block < num_blocks; ++block)
      routines.accumulate[format.bits == 8][block > 0](values, codes(block, first), count, format.group_size,
                                                       scales(block, first));
  }
};

}  // namespace

void quantize(u8* out, size_t numel, Values x, Values subtract, Format format, Rounding rounding, bool hadamard,
              unsigned threads) {
  const Routines& routines = chosen_routines();
  const size_t group_size = format.group_size, batch = std::max(group_size, kBatch);
  const bool half = x.dtype == Dtype::kBfloat16;
  const int other = !subtract.data ? 0 : subtract.dtype == Dtype::kFloat32 ? 1 : 2;
  const Fill fill = routines.fill[half][other][hadamard];
  const bool as_is = !half && !other && !hadamard;
  const Packer packer(out, numel, format, rounding, routines);
  split(numel, batch, threads, [&](size_t begin, size_t end, float* scratch) {
    for (size_t first = begin; first < end; first += batch) {
      const size_t count = std::min(batch, end - first), total = format.padded(count);
      const float* values = scratch;
      u32 largest[kMostGroups];
      if (as_is && count == total) {
        values = static_cast<const float*>(at(x, first));
        routines.largest(values, total, group_size, largest);
      } else {
        fill(scratch, at(x, first), at(subtract, first), count, total, group_size, largest);
      }
      packer.write(values, first, total, largest);
    }
  });
}

void dequantize(void* out, Dtype dtype, size_t numel, const u8* blocks, size_t num_blocks, Format format, bool hadamard,
                bool add, unsigned threads) {
  const Routines& routines = chosen_routines();
  const Unpacker unpacker(blocks, numel, format);
  const Finish finish = routines.finish[format.bits == 8][dtype == Dtype::kBfloat16][hadamard][add];
  const size_t group_size = format.group_size, last = num_blocks - 1;
  split(numel, std::max(group_size, kBatch), threads, [&](size_t begin, size_t end, float* sum) {
    for (size_t first = begin; first < end; first += kBatch) {
      const size_t count = std::min(kBatch, end - first);
      unpacker.sum(sum, first, (count + kBlock - 1) / kBlock * kBlock, last, routines);
      finish(static_cast<u8*>(out) + first * bytes_per_value(dtype), unpacker.codes(last, first), count, group_size,
             unpacker.scales(last, first), last ? sum : nullptr);
    }
  });
}

void requantize(u8* out, size_t numel, const u8* blocks, size_t num_blocks, Format from, Format format,
                Rounding rounding, unsigned threads) {
  const Routines& routines = chosen_routines();
  const Unpacker unpacker(blocks, numel, from);
  const Packer packer(out, numel, format, rounding, routines);
  const size_t group_size = format.group_size, batch = std::max(group_size, kBatch), held = from.padded(numel);
  split(numel, batch, threads, [&](size_t begin, size_t end, float* values) {
    for (size_t first = begin; first < end; first += batch) {
      const size_t total = format.padded(std::min(batch, end - first)), common = std::min(total, held - first);
      for (size_t i = 0; i < common; i += kBatch)
        unpacker.sum(values + i, first + i, std::min(kBatch, common - i), num_blocks, routines);
      std::memset(values + common, 0, (total - common) * sizeof(float));
      u32 largest[kMostGroups];
      routines.largest(values, total, group_size, largest);
      packer.write(values, first, total, largest);
    }
  });
}

}  // namespace rl_accel::codec
