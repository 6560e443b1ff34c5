// What one instruction set offers: the work of one thread. Tables of function pointers, so that one binary holds all
// sets and chooses when it runs.
#pragma once

#include "kv_int4.hpp"

namespace rl_accel::kv_int4 {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using i32 = std::int32_t;
using std::size_t;

constexpr size_t kLanes = 16;
constexpr size_t kTile = 128;           // tokens between two looks at the largest score
constexpr size_t kSplit = 4 * kTile;    // tokens whose sums begin anew
constexpr size_t kMaxRows = 32;         // query rows that use a tile while it is in the first-level cache
constexpr size_t kMaxRegisterRows = 8;  // of them, those that share unpacked codes
constexpr size_t kPartHead = 16;        // floats before the sums of codes in a part: largest, total, offset

// Rows of one request and KV head over a range of splits. A row is a query head of a token: token * groups + head.
struct Item {
  const i32* blocks;
  size_t first_query;  // token of `query` that is the request's first
  size_t num_queries, seq_len;
  size_t kv_head;
  size_t row_begin, row_end;  // kMaxRows at most
  size_t split_begin, split_end;
  float* parts;  // [rows, num_parts, kPartHead + head_size]: one of every split, for merging; null: out is written
  size_t num_parts;
};

// Of one row. The sums over codes are in `acc` for the split at hand, in `merged` for those before it.
struct Row {
  float unit, q_sum;
  size_t visible;  // tokens
  float largest, total, offset;
  float merged_largest, merged_total, merged_offset;
  float *acc, *merged;
};

struct alignas(64) Scratch {
  i32 query[kMaxRows * kMaxHead / 2];  // pairs of int16, interleaved over the rows that share codes
  float acc[2 * kMaxRows * kMaxHead];
  float k_scale[kTile], k_offset[kTile], v_scale[kTile], v_offset[kTile];
  float weights[kTile];
  i32 dots[kMaxRegisterRows * kTile];
  i32 pairs[kMaxRegisterRows * kTile / 2];  // of weights, int16
  float values[kMaxHead];
  u8 codes[kMaxHead];
  Row rows[kMaxRows];
};

// Stores the tokens of one head whose group of 16 slots belongs to `part`: a word of V holds several tokens.
using StoreHead = void (*)(const Store& task, size_t head, size_t part, size_t num_parts, Scratch& scratch);
using AttendItem = void (*)(const Attend& task, const Item& item, Scratch& scratch);
// Merges the parts of one row of an item in order and writes its output.
using MergeRow = void (*)(const Attend& task, const Item& item, size_t row, Scratch& scratch);

struct Routines {
  const char* name;
  StoreHead store[2];    // 8 bits
  AttendItem attend[2];  // 8 bits
  MergeRow merge;
};

extern const Routines kScalar;
#if defined(__x86_64__)
extern const Routines kAvx2;
extern const Routines kAvx512;
#endif

}  // namespace rl_accel::kv_int4
