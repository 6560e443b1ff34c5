// Group-wise 4- and 8-bit codec on the CPU: what kernels/codec/reference.py specifies, bit for bit.
//
// A block of N values is N * bits / 8 bytes of codes, padded to whole groups, then a float32 scale per group
// (kernels/codec/layout.py). Nothing here keeps state, so calls may run at the same time. Time O(R * N); memory: a
// group of float32 per thread. Buffers may start anywhere; inputs and outputs must not overlap. bits is 4 or 8,
// group_size a power of two from 32 to 32,768, num_blocks at least 1: callers check.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rl_accel::codec {

enum class Dtype : std::uint8_t { kFloat32, kBfloat16 };

struct Values {
  const void* data;
  Dtype dtype;
};

struct Format {
  int bits;
  std::size_t group_size;

  std::size_t num_groups(std::size_t numel) const { return (numel + group_size - 1) / group_size; }
  std::size_t padded(std::size_t numel) const { return num_groups(numel) * group_size; }
  std::size_t code_bytes(std::size_t numel) const { return padded(numel) / 8 * static_cast<std::size_t>(bits); }
  std::size_t packed_bytes(std::size_t numel) const { return code_bytes(numel) + num_groups(numel) * sizeof(float); }
};

struct Rounding {
  bool stochastic;
  std::uint64_t key;
  std::uint64_t offset;  // index of the first value; a multiple of the group size
};

// Where values of a tensor are in rows of blocks: `count` values from `start` of the tensor on are the values from
// `target` of the rows on, counted over all rows; zeros follow up to `target + span`. `target` and `span` are multiples
// of the group size, and a piece lies in one row.
struct Piece {
  std::int64_t start, count, target, span;
};

// Rows of blocks, each of `numel` values (whole groups).
struct Rows {
  std::size_t num_rows, numel;
  const Piece* pieces;
  std::size_t num_pieces;
};

// Writes packed_bytes(numel) bytes: the codes of x - subtract (null: of x), rotated by Hadamard-32 if asked for.
void quantize(std::uint8_t* out, std::size_t numel, Values x, Values subtract, Format format, Rounding rounding,
              bool hadamard, unsigned threads);

// Writes the sum of the blocks, or adds it to out. The blocks follow each other without a gap.
void dequantize(void* out, Dtype dtype, std::size_t numel, const std::uint8_t* blocks, std::size_t num_blocks,
                Format format, bool hadamard, bool add, unsigned threads);

// The same into rows: groups that no piece covers are left as they are. O(num_pieces) more time and memory.
void quantize_rows(std::uint8_t* out, const Rows& rows, Values x, Values subtract, Format format, Rounding rounding,
                   bool hadamard, unsigned threads);

// The pieces of `num_layers` sets of rows that follow each other, summed, to their positions in out.
void dequantize_rows(void* out, Dtype dtype, const Rows& rows, const std::uint8_t* blocks, std::size_t num_layers,
                     Format format, bool hadamard, bool add, unsigned threads);

// Quantizes the sum of the blocks anew. What the blocks hold beyond numel is kept where the new format has room: the
// rest of a rotated block of 32.
void requantize(std::uint8_t* out, std::size_t numel, const std::uint8_t* blocks, std::size_t num_blocks, Format from,
                Format format, Rounding rounding, unsigned threads);

// Instruction sets: "scalar", "avx2", "avx512"; "auto" is the widest that this CPU has, and the default. Returns false
// for one that it lacks. The setting is for tests and benchmarks: it holds for the whole process.
bool set_instructions(const char* name);
const char* instructions();

}  // namespace rl_accel::codec
