// The three operations. They go through the values a batch at a time: some groups that fit into the first-level cache.
// A first pass over a batch finds the largest magnitudes, a second one encodes, so that no group waits for its own
// maximum.
#include "codec.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

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

// Writes rows of blocks, of `numel` values each.
class Packer {
 public:
  Packer(u8* out, size_t numel, Format format, Rounding rounding, const Routines& routines)
      : out_(out),
        row_numel_(format.padded(numel)),
        row_bytes_(format.packed_bytes(numel)),
        code_bytes_(format.code_bytes(numel)),
        format_(format),
        rounding_(rounding),
        encode_(routines.encode[format.bits == 8][rounding.stochastic]),
        top_(format.bits == 8 ? 127.f : 7.f),
        step_(static_cast<float>(format.bits == 8 ? 1.0 / 127 : 1.0 / 7)) {}

  // `total` values of whole groups of one row, from value `first` of all rows, with the bits of their largest
  // magnitudes.
  void write(const float* values, size_t first, size_t total, const u32* largest) const {
    const size_t num_groups = total / format_.group_size;
    float scales[kMostGroups], inverses[kMostGroups];
    for (size_t g = 0; g < num_groups; ++g) {
      const float most = __builtin_bit_cast(float, largest[g]);
      const bool finite = largest[g] < kInfinity, live = finite && most >= kTiny;
      scales[g] = live ? most * step_ : finite ? 0.f : std::numeric_limits<float>::quiet_NaN();
      inverses[g] = live ? 1.0f / most * top_ : 0.f;  // two roundings, as torch divides a number by a tensor
    }
    u8* const row = out_ + first / row_numel_ * row_bytes_;
    const size_t within = first % row_numel_;
    std::memcpy(row + code_bytes_ + within / format_.group_size * sizeof(float), scales, num_groups * sizeof(float));
    encode_(row + within / 8 * static_cast<size_t>(format_.bits), values, total, format_.group_size, inverses,
            {rounding_.key, rounding_.offset + first});
  }

 private:
  u8* out_;
  size_t row_numel_, row_bytes_, code_bytes_;
  Format format_;
  Rounding rounding_;
  Encode encode_;
  float top_, step_;
};

// Reads layers, which follow each other, of `num_rows` rows of blocks of `numel` values.
struct Unpacker {
  const u8* blocks;
  Format format;
  size_t row_numel, row_bytes, layer_bytes, code_bytes;

  Unpacker(const u8* from, size_t num_rows, size_t numel, Format of)
      : blocks(from),
        format(of),
        row_numel(of.padded(numel)),
        row_bytes(of.packed_bytes(numel)),
        layer_bytes(num_rows * row_bytes),
        code_bytes(of.code_bytes(numel)) {}

  // Of value `first`, counted over all rows.
  const u8* codes(size_t layer, size_t first) const {
    return blocks + layer * layer_bytes + first / row_numel * row_bytes +
           first % row_numel / 8 * static_cast<size_t>(format.bits);
  }
  const u8* scales(size_t layer, size_t first) const {
    return blocks + layer * layer_bytes + first / row_numel * row_bytes + code_bytes +
           first % row_numel / format.group_size * sizeof(float);
  }
  // Sum of the first `num_layers`; `count` values from `first` are whole groups or lie in one.
  void sum(float* values, size_t first, size_t count, size_t num_layers, const Routines& routines) const {
    for (size_t layer = 0; layer < num_layers; ++layer)
      routines.accumulate[format.bits == 8][layer > 0](values, codes(layer, first), count, format.group_size,
                                                       scales(layer, first));
  }
};

// Calls work(piece, first, last, scratch) for parts of the pieces' spans that start at multiples of `batch` in them.
template <class Work>
void split_pieces(const Rows& rows, size_t batch, unsigned threads, Work&& work) {
  std::vector<size_t> ends(rows.num_pieces);  // in batches
  size_t total = 0;
  for (size_t i = 0; i < rows.num_pieces; ++i)
    ends[i] = total += (static_cast<size_t>(rows.pieces[i].span) + batch - 1) / batch;
  split(total * batch, batch, threads, [&](size_t begin, size_t end, float* scratch) {
    size_t first = begin / batch;
    const size_t last = end / batch;
    for (size_t i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), first) - ends.begin()); first < last;
         ++i) {
      const size_t origin = i ? ends[i - 1] : 0, stop = std::min(last, ends[i]);
      const Piece& piece = rows.pieces[i];
      work(piece, (first - origin) * batch, std::min((stop - origin) * batch, static_cast<size_t>(piece.span)),
           scratch);
      first = stop;
    }
  });
}

}  // namespace

void quantize_rows(u8* out, const Rows& rows, Values x, Values subtract, Format format, Rounding rounding,
                   bool hadamard, unsigned threads) {
  const Routines& routines = chosen_routines();
  const size_t group_size = format.group_size, batch = std::max(group_size, kBatch);
  const bool half = x.dtype == Dtype::kBfloat16;
  const int other = !subtract.data ? 0 : subtract.dtype == Dtype::kFloat32 ? 1 : 2;
  const Fill fill = routines.fill[half][other][hadamard];
  const bool as_is = !half && !other && !hadamard;
  const Packer packer(out, rows.numel, format, rounding, routines);
  split_pieces(rows, batch, threads, [&](const Piece& piece, size_t begin, size_t end, float* scratch) {
    const size_t start = static_cast<size_t>(piece.start), filled = static_cast<size_t>(piece.count);
    for (size_t first = begin; first < end; first += batch) {
      const size_t total = std::min(batch, end - first), count = std::min(total, filled - std::min(filled, first));
      const float* values = scratch;
      u32 largest[kMostGroups];
      if (as_is && count == total) {
        values = static_cast<const float*>(at(x, start + first));
        routines.largest(values, total, group_size, largest);
      } else {
        fill(scratch, at(x, start + first), at(subtract, start + first), count, total, group_size, largest);
      }
      packer.write(values, static_cast<size_t>(piece.target) + first, total, largest);
    }
  });
}

void quantize(u8* out, size_t numel, Values x, Values subtract, Format format, Rounding rounding, bool hadamard,
              unsigned threads) {
  const size_t padded = format.padded(numel);
  const Piece all{0, static_cast<std::int64_t>(numel), 0, static_cast<std::int64_t>(padded)};
  quantize_rows(out, {1, padded, &all, numel ? size_t{1} : 0}, x, subtract, format, rounding, hadamard, threads);
}

void dequantize_rows(void* out, Dtype dtype, const Rows& rows, const u8* blocks, size_t num_layers, Format format,
                     bool hadamard, bool add, unsigned threads) {
  const Routines& routines = chosen_routines();
  const Unpacker unpacker(blocks, rows.num_rows, rows.numel, format);
  const Finish finish = routines.finish[format.bits == 8][dtype == Dtype::kBfloat16][hadamard][add];
  const size_t group_size = format.group_size, last = num_layers - 1;
  split_pieces(rows, std::max(group_size, kBatch), threads,
               [&](const Piece& piece, size_t begin, size_t end, float* sum) {
                 u8* const to = static_cast<u8*>(out) + static_cast<size_t>(piece.start) * bytes_per_value(dtype);
                 for (size_t first = begin; first < std::min(end, static_cast<size_t>(piece.count)); first += kBatch) {
                   const size_t count = std::min(kBatch, std::min(end, static_cast<size_t>(piece.count)) - first);
                   const size_t at = static_cast<size_t>(piece.target) + first;
                   unpacker.sum(sum, at, (count + kBlock - 1) / kBlock * kBlock, last, routines);
                   finish(to + first * bytes_per_value(dtype), unpacker.codes(last, at), count, group_size,
                          unpacker.scales(last, at), last ? sum : nullptr);
                 }
               });
}

void dequantize(void* out, Dtype dtype, size_t numel, const u8* blocks, size_t num_blocks, Format format, bool hadamard,
                bool add, unsigned threads) {
  const size_t padded = format.padded(numel);
  const Piece all{0, static_cast<std::int64_t>(numel), 0, static_cast<std::int64_t>(padded)};
  dequantize_rows(out, dtype, {1, padded, &all, numel ? size_t{1} : 0}, blocks, num_blocks, format, hadamard, add,
                  threads);
}

void requantize(u8* out, size_t numel, const u8* blocks, size_t num_blocks, Format from, Format format,
                Rounding rounding, unsigned threads) {
  const Routines& routines = chosen_routines();
  const Unpacker unpacker(blocks, 1, numel, from);
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
