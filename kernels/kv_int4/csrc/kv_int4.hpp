// Paged KV cache with codes of 4 or 8 bits on the CPU: what kernels/kv_int4/reference.py specifies, bit for bit.
//
// Pages are described in kernels/kv_int4/layout.py and start at multiples of 64 bytes. Nothing is checked here:
// head_size is a multiple of 16 and at most kMaxHead, block_size a multiple of 16, order a power of two that divides
// head_size. Calls keep working memory per calling thread and may run at the same time, on one page only if none of
// them stores. Time O(tokens * heads * head_size) a store, O(visible tokens * query heads * head_size) an attention.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rl_accel::kv_int4 {

constexpr std::size_t kMaxHead = 512;

enum class Dtype : std::uint8_t { kFloat32, kBfloat16, kFloat16 };

struct Layout {
  std::size_t block_size;
  std::size_t head_size;
  int bits;

  std::size_t codes_per_word() const { return 32 / static_cast<std::size_t>(bits); }
  std::size_t code_bytes() const { return block_size * head_size * static_cast<std::size_t>(bits) / 8; }
  std::size_t half_bytes() const { return code_bytes() + 4 * block_size; }
  std::size_t page_bytes() const { return 2 * half_bytes(); }
};

// [tokens, heads, head_size]; a token's heads follow each other, tokens are `stride` values apart.
struct Heads {
  const void* data;
  std::size_t stride;
};

struct Store {
  std::uint8_t* pages;  // [blocks, num_heads, page_bytes]
  Layout layout;
  std::size_t num_heads;
  const std::int64_t* slots;  // [num_tokens]; negative: nothing is stored; of equal ones the last wins
  std::size_t num_tokens;
  Heads k, v;
  Dtype dtype;
  const float* shift;  // [num_heads, head_size], or null
  std::size_t order;   // of the rotation of K
};

struct Attend {
  void* out;
  std::size_t out_stride;
  Heads query;
  Dtype dtype;  // of query and out
  std::size_t num_heads, num_kv_heads;
  const std::uint8_t* pages;
  Layout layout;
  const std::int32_t* block_table;  // [num_requests], table_stride apart
  std::size_t table_stride;
  const std::int32_t* query_start;  // [num_requests + 1]
  const std::int32_t* seq_lens;     // [num_requests]
  std::size_t num_requests;
  float scale;
  std::size_t order;
};

void store(const Store& task, unsigned threads);
void attend(const Attend& task, unsigned threads);

// Instruction sets: "scalar", "avx2", "avx512" (with VNNI); "auto" is the widest that this CPU has, and the default.
// Returns false for one that it lacks. The setting is for tests and benchmarks: it holds for the whole process.
bool set_instructions(const char* name);
const char* instructions();

}  // namespace rl_accel::kv_int4
