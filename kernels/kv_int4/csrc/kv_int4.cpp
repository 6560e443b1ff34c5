// Splits calls into items for threads. An item of attention is a block of query rows of one request and KV head; where
// these are too few for the threads, also a range of splits, whose parts are merged in order when all are there.
#include "kv_int4.hpp"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "../../common/csrc/parallel.hpp"
#include "dispatch.hpp"

namespace rl_accel::kv_int4 {
namespace {

constexpr size_t kItemsPerThread = 4;      // enough for uneven ones to even out
constexpr size_t kStoredPerThread = 32;    // token-heads; less is done before another thread has begun
constexpr size_t kTileRowsPerThread = 16;  // tiles of 128 tokens times rows, likewise

// Working memory that stays with the calling thread: allocating it would cost page faults in every call.
template <class T>
T* kept(size_t count) {
  struct Aligned {
    void operator()(T* data) const { ::operator delete[](data, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<T[], Aligned> data;
  thread_local size_t capacity = 0;
  if (count > capacity) {
    data.reset();
    capacity = 0;
    data.reset(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t{64})));
    capacity = count;
  }
  return data.get();
}

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

std::vector<Item> whole_items(const Attend& task) {
  const size_t groups = task.num_heads / task.num_kv_heads;
  std::vector<Item> items;
  for (size_t request = 0; request < task.num_requests; ++request) {
    const i32 first = task.query_start[request], last = task.query_start[request + 1];
    if (last <= first) continue;
    const size_t num_queries = static_cast<size_t>(last - first), num_rows = num_queries * groups;
    const size_t seq_len = static_cast<size_t>(std::max(task.seq_lens[request], 0));
    // Blocks of like size. Those at the end see most and start first.
    const size_t num_blocks = divide_up(num_rows, kMaxRows);
    for (size_t block = num_blocks; block-- > 0;) {
      const size_t row_begin = num_rows * block / num_blocks, row_end = num_rows * (block + 1) / num_blocks;
      const size_t unseen = num_queries - 1 - (row_end - 1) / groups;
      const size_t visible = seq_len > unseen ? seq_len - unseen : 0;
      for (size_t head = 0; head < task.num_kv_heads; ++head)
        items.push_back({task.block_table + request * task.table_stride, static_cast<size_t>(first), num_queries,
                         seq_len, head, row_begin, row_end, 0, divide_up(visible, kSplit), nullptr, 0});
    }
  }
  return items;
}

// Cuts items into ranges of splits, about kItemsPerThread for each thread; all get memory for their parts.
std::vector<Item> cut_items(std::vector<Item>& items, size_t num_splits, size_t head_size, unsigned threads) {
  const size_t range = std::max<size_t>(1, num_splits / (kItemsPerThread * threads));
  const size_t part_size = kPartHead + head_size;
  size_t num_floats = 0;
  for (const Item& item : items) num_floats += (item.row_end - item.row_begin) * item.split_end * part_size;
  float* parts = kept<float>(num_floats);
  std::vector<Item> cut;
  for (Item& item : items) {
    item.parts = parts;
    item.num_parts = item.split_end;
    parts += (item.row_end - item.row_begin) * item.split_end * part_size;
    for (size_t begin = 0; begin < item.split_end; begin += range) {
      cut.push_back(item);
      cut.back().split_begin = begin;
      cut.back().split_end = std::min(begin + range, item.split_end);
    }
  }
  return cut;
}

}  // namespace

void store(const Store& task, unsigned threads) {
  const StoreHead store_head = chosen_routines().store[task.layout.bits == 8];
  const size_t useful = divide_up(task.num_tokens * task.num_heads, kStoredPerThread);
  threads = static_cast<unsigned>(std::clamp<size_t>(useful, 1, std::max(threads, 1u)));
  const size_t num_parts = divide_up(threads, task.num_heads);
  Scratch* scratch = kept<Scratch>(threads);
  parallel(task.num_heads * num_parts, threads, [&](size_t item, unsigned worker) {
    store_head(task, item / num_parts, item % num_parts, num_parts, scratch[worker]);
  });
}

void attend(const Attend& task, unsigned threads) {
  const Routines& routines = chosen_routines();
  const AttendItem attend_item = routines.attend[task.layout.bits == 8];
  std::vector<Item> items = whole_items(task);
  size_t num_splits = 0, tile_rows = 0;
  for (const Item& item : items) {
    num_splits += item.split_end;
    tile_rows += item.split_end * (kSplit / kTile) * (item.row_end - item.row_begin);
  }
  threads =
      static_cast<unsigned>(std::clamp<size_t>(divide_up(tile_rows, kTileRowsPerThread), 1, std::max(threads, 1u)));
  Scratch* scratch = kept<Scratch>(threads);
  const auto run = [&](const std::vector<Item>& todo) {
    parallel(todo.size(), threads,
             [&](size_t item, unsigned worker) { attend_item(task, todo[item], scratch[worker]); });
  };
  if (threads == 1 || items.size() >= kItemsPerThread * threads || num_splits <= items.size()) {
    run(items);
    return;
  }
  run(cut_items(items, num_splits, task.layout.head_size, threads));
  parallel(items.size(), threads, [&](size_t item, unsigned worker) {
    for (size_t row = items[item].row_begin; row < items[item].row_end; ++row)
      routines.merge(task, items[item], row, scratch[worker]);
  });
}

}  // namespace rl_accel::kv_int4
