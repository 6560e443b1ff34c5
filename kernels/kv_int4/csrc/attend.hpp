// Attention of some rows over the pages of one request and KV head, tile by tile of 128 tokens.
//
// All rows use a tile while it is in the first-level cache. Lanes are 16 tokens for K and 16 dims for V, so nothing is
// summed across lanes. Both products are of pairs of int16, query or weights, with pairs of codes: `Isa::dot` unpacks
// a word once for up to Isa::kRows rows. The next tile is fetched while one is worked on.
#pragma once

#include "maths.hpp"

namespace rl_accel::kv_int4 {
namespace {

constexpr size_t kGroups = kTile / kLanes;
constexpr float kMaxQuery = 127 * 128;
constexpr float kMaxWeight = 32767;

// Where a tile lies: groups of 16 tokens, in one page or in several.
struct Tile {
  size_t num_groups;
  const u32* k_words[kGroups];
  const u16* k_scales[kGroups];  // offsets follow block_size later
  const u16* v_scales[kGroups];
  size_t num_runs;  // of words of V that follow each other
  struct Run {
    const u32* words;  // of the first 16 dims
    size_t count, group;
  } runs[kGroups];
};

template <class Isa, int kBits>
class Attention {
 public:
  Attention(const Attend& task, const Item& item, Scratch& scratch)
      : task_(task),
        item_(item),
        s_(scratch),
        d_(task.layout.head_size),
        num_rows_(item.row_end - item.row_begin),
        pages_(task.pages + item.kv_head * task.layout.page_bytes()),
        block_stride_(task.num_kv_heads * task.layout.page_bytes()),
        v_stride_(task.layout.block_size / kCodes * kLanes) {}

  void run() {
    const size_t longest = visible(num_rows_ - 1);
    size_t last = item_.split_end * kSplit;
    if (last > longest) last = longest;
    Tile tiles[2];
    size_t start = item_.split_begin * kSplit;
    if (start < last) {
      find(tiles[0], start, last);
      for (size_t group = 0; group < tiles[0].num_groups; ++group) fetch_k(tiles[0], group);
    }
    read_rows();
    for (size_t number = 0; start < last; ++number, start += kTile) {
      const Tile& tile = tiles[number % 2];
      Tile* next = start + kTile < last ? &tiles[(number + 1) % 2] : nullptr;
      if (next) find(*next, start + kTile, last);
      if (start % kSplit == 0) begin_split(start);
      add(tile, next, start);
      if (!next || (start + kTile) % kSplit == 0) end_split(start / kSplit);
    }
    if (!item_.parts) write_rows();
  }

 private:
  static constexpr size_t kCodes = 32 / kBits;
  static constexpr size_t kPairs = kCodes / 2;  // of a word

  // Calls f<rows>(first) for blocks of rows that share unpacked codes, from row `first` on.
  template <class F>
  static void in_blocks(size_t num_rows, F&& f) {
    size_t row = 0;
    if constexpr (Isa::kRows >= 8)
      for (; row + 8 <= num_rows; row += 8) f.template operator()<8>(row);
    for (; row + 4 <= num_rows; row += 4) f.template operator()<4>(row);
    if (row + 3 == num_rows) f.template operator()<3>(row);
    if (row + 2 == num_rows) f.template operator()<2>(row);
    if (row + 1 == num_rows) f.template operator()<1>(row);
  }

  // Tokens that a row sees.
  size_t visible(size_t row) const {
    const size_t token = (item_.row_begin + row) / (task_.num_heads / task_.num_kv_heads);
    const size_t later = item_.num_queries - 1 - token;
    return item_.seq_len > later ? item_.seq_len - later : 0;
  }

  // Inline always: GCC takes a function that only prefetches for one without effect and drops its calls.
  [[gnu::always_inline]] void fetch_k(const Tile& tile, size_t group) const {
    for (size_t i = 0; i < d_ / kCodes; ++i) __builtin_prefetch(tile.k_words[group] + i * kLanes);
    const u16* const both[] = {tile.k_scales[group], tile.v_scales[group]};
    for (const u16* scales : both) {
      __builtin_prefetch(scales);
      __builtin_prefetch(scales + task_.layout.block_size);
    }
  }

  void read_rows() {
    const size_t groups = task_.num_heads / task_.num_kv_heads;
    for (size_t i = 0; i < num_rows_; ++i) {
      const size_t token = (item_.row_begin + i) / groups, head = (item_.row_begin + i) % groups;
      s_.rows[i].visible = visible(i);
      s_.rows[i].acc = s_.acc + 2 * i * d_;
      s_.rows[i].merged = s_.acc + (2 * i + 1) * d_;
      read<Isa>(s_.acc + 2 * i * d_, task_.query.data, task_.dtype,
                (item_.first_query + token) * task_.query.stride + (item_.kv_head * groups + head) * d_, d_);
      rotate<Isa>(s_.acc + 2 * i * d_, d_, task_.order);
    }
    in_blocks(num_rows_, [&]<int kRows>(size_t first) {
      for (int row = 0; row < kRows; ++row) round_query(s_.rows[first + row], s_.query + first * d_ / 2 + row, kRows);
    });
  }

  // Query in row.acc -> pairs of int16, `step` apart.
  void round_query(Row& row, i32* pairs, size_t step) {
    const float* x = row.acc;
    auto highest = Isa::set(0.0f);
    for (size_t i = 0; i < d_; i += kLanes) highest = Isa::max(highest, Isa::abs(Isa::load(x + i)));
    const float largest = Isa::highest(highest), bad = not_finite<Isa>(x, d_);
    const bool zero = bad != 0.0f || largest < kTiny;
    const float inverse = zero ? 0.0f : 1.0f / largest * kMaxQuery;
    auto sum = Isa::set(0.0f);  // of integers, below 2^24: exact
    for (size_t i = 0; i < d_; i += kLanes) {
      const auto integers = zero ? Isa::no_ints() : Isa::round(Isa::mul(Isa::load(x + i), Isa::set(inverse)));
      sum = Isa::add(sum, Isa::to_floats(integers));
      i32 packed[kLanes / 2];
      Isa::template store_pairs<kBits>(packed, integers);
      for (const i32 pair : packed) {
        *pairs = pair;
        pairs += step;
      }
    }
    row.unit = (zero ? bad : largest * (1.0f / kMaxQuery)) * task_.scale;
    row.q_sum = Isa::sum(sum);
  }

  void find(Tile& tile, size_t start, size_t last) {
    const Layout& layout = task_.layout;
    const size_t count = last - start < kTile ? last - start : kTile;
    tile.num_groups = (count + kLanes - 1) / kLanes;
    tile.num_runs = 0;
    size_t block = start / layout.block_size, in_block = start % layout.block_size;
    const u8* page = nullptr;
    for (size_t group = 0; group < tile.num_groups; ++group, in_block += kLanes) {
      if (in_block == layout.block_size) {
        in_block = 0;
        ++block;
      }
      if (group == 0 || in_block == 0) {
        page = pages_ + static_cast<size_t>(item_.blocks[block]) * block_stride_;
        const u32* words = reinterpret_cast<const u32*>(page + layout.half_bytes()) + in_block / kCodes * kLanes;
        tile.runs[tile.num_runs++] = {words, 0, group};
      }
      tile.runs[tile.num_runs - 1].count += kLanes / kCodes;
      tile.k_words[group] = reinterpret_cast<const u32*>(page) + in_block / kLanes * (d_ / kCodes) * kLanes;
      tile.k_scales[group] = reinterpret_cast<const u16*>(page + layout.code_bytes()) + in_block;
      tile.v_scales[group] = reinterpret_cast<const u16*>(page + layout.half_bytes() + layout.code_bytes()) + in_block;
    }
  }

  void begin_split(size_t start) {
    for (size_t i = 0; i < num_rows_; ++i) {
      Row& row = s_.rows[i];
      if (row.visible <= start) continue;
      row.largest = -kInfinity;
      row.total = row.offset = 0.0f;
      std::memset(row.acc, 0, d_ * sizeof(float));
    }
  }

  void add(const Tile& tile, const Tile* next, size_t start) {
    for (size_t group = 0; group < tile.num_groups; ++group) {
      const size_t i = group * kLanes, offsets = task_.layout.block_size;
      Isa::store(s_.k_scale + i, Isa::load_half(tile.k_scales[group]));
      Isa::store(s_.k_offset + i, Isa::load_half(tile.k_scales[group] + offsets));
      Isa::store(s_.v_scale + i, Isa::load_half(tile.v_scales[group]));
      Isa::store(s_.v_offset + i, Isa::load_half(tile.v_scales[group] + offsets));
    }
    in_blocks(num_rows_, [&]<int kRows>(size_t first) {
      const size_t visible = s_.rows[first + kRows - 1].visible;
      if (visible <= start) return;
      const size_t seen = (visible - start + kLanes - 1) / kLanes;
      add_rows<kRows>(tile, first ? nullptr : next, start, first, seen < tile.num_groups ? seen : tile.num_groups);
    });
  }

  template <int kRows>
  void add_rows(const Tile& tile, const Tile* next, size_t start, size_t first, size_t num_groups) {
    const i32* query = s_.query + first * d_ / 2;
    const size_t num_words = d_ / kCodes;
    for (size_t group = 0; group < num_groups; ++group) {
      if (next && group < next->num_groups) fetch_k(*next, group);
      typename Isa::Ints acc[kRows];
      for (int row = 0; row < kRows; ++row) acc[row] = Isa::no_ints();
      Isa::template dot<kRows, kBits, kRows, 1>(tile.k_words[group], num_words, query, acc);
      for (int row = 0; row < kRows; ++row) Isa::store(s_.dots + row * kTile + group * kLanes, acc[row]);
    }
    float keep[kRows], unit[kRows];
    for (int row = 0; row < kRows; ++row)
      weigh(s_.rows[first + row], start, num_groups, s_.dots + row * kTile, s_.pairs + row * kTile / 2, keep[row],
            unit[row]);
    for (size_t dim = 0; dim < d_; dim += kLanes) {
      const size_t stride = dim / kLanes * v_stride_;
      if (next)
        for (size_t run = 0; run < next->num_runs; ++run)
          for (size_t i = 0; i < next->runs[run].count; ++i)
            __builtin_prefetch(next->runs[run].words + stride + i * kLanes);
      typename Isa::Ints acc[kRows];
      for (int row = 0; row < kRows; ++row) acc[row] = Isa::no_ints();
      for (size_t run = 0; run < tile.num_runs; ++run) {
        const auto [words, count, group] = tile.runs[run];
        if (group >= num_groups) break;
        const size_t seen = (num_groups - group) * (kLanes / kCodes);
        Isa::template dot<kRows, kBits, 1, kTile / 2>(words + stride, count < seen ? count : seen,
                                                      s_.pairs + group * kLanes / 2, acc);
      }
      for (int row = 0; row < kRows; ++row) {
        float* sums = s_.rows[first + row].acc + dim;
        const auto added = Isa::mul(Isa::to_floats(acc[row]), Isa::set(unit[row]));
        Isa::store(sums, Isa::add(Isa::mul(Isa::load(sums), Isa::set(keep[row])), added));
      }
    }
  }

  // Scores -> weights of V's codes, as pairs of int16; keep: of sums before, unit: of sums of these weights.
  void weigh(Row& row, size_t start, size_t num_groups, const i32* dots, i32* pairs, float& keep, float& unit) {
    if (row.visible <= start) {  // of a block whose other rows see the tile
      std::memset(pairs, 0, kTile / 2 * sizeof(i32));
      keep = 1.0f;
      unit = 0.0f;
      return;
    }
    const size_t visible = row.visible - start, whole = visible / kLanes < num_groups ? visible / kLanes : num_groups;
    float* p = s_.weights;
    auto highest = Isa::set(-kInfinity);
    const auto score = [&](size_t i) {
      const auto dot = Isa::mul(Isa::load(s_.k_scale + i), Isa::to_floats(Isa::load(dots + i)));
      const auto sum = Isa::add(dot, Isa::mul(Isa::load(s_.k_offset + i), Isa::set(row.q_sum)));
      return Isa::mul(sum, Isa::set(row.unit));
    };
    for (size_t group = 0; group < num_groups; ++group) {
      const size_t i = group * kLanes;
      auto found = score(i);
      if (group >= whole) found = Isa::first_of(visible > i ? visible - i : 0, found, Isa::set(-kInfinity));
      highest = Isa::max(highest, found);
      Isa::store(p + i, found);
    }
    const float tile_largest = Isa::highest(highest);
    const float largest = tile_largest > row.largest ? tile_largest : row.largest;
    keep = decay<Isa>(row.largest, largest);
    row.largest = largest;

    auto total = Isa::set(0.0f), offset = total, w_highest = total;
    const auto zero = total;
    for (size_t group = 0; group < num_groups; ++group) {
      const size_t i = group * kLanes;
      const auto weight = exp_neg<Isa>(Isa::sub(Isa::load(p + i), Isa::set(largest)));
      auto scaled = Isa::mul(weight, Isa::load(s_.v_scale + i)), moved = Isa::mul(weight, Isa::load(s_.v_offset + i));
      if (group >= whole) {
        const size_t count = visible > i ? visible - i : 0;
        scaled = Isa::first_of(count, scaled, zero);
        moved = Isa::first_of(count, moved, zero);
      }
      total = Isa::add(total, weight);
      offset = Isa::add(offset, moved);
      w_highest = Isa::max(w_highest, scaled);
      Isa::store(p + i, scaled);
    }
    row.total = row.total * keep + Isa::sum(total);
    row.offset = row.offset * keep + Isa::sum(offset);
    const float w_max = Isa::highest(w_highest);
    const bool some = w_max >= kTiny;
    const auto inverse = Isa::set(some ? 1.0f / w_max * kMaxWeight : 0.0f);
    unit = some ? w_max * (1.0f / kMaxWeight) : 0.0f;
    for (size_t i = 0; i < num_groups * kLanes; i += kLanes)
      Isa::template store_pairs<kBits>(pairs + i / 2, Isa::round(Isa::mul(Isa::load(p + i), inverse)));
  }

  void end_split(size_t split) {
    for (size_t i = 0; i < num_rows_; ++i) {
      Row& row = s_.rows[i];
      if (row.visible <= split * kSplit) continue;
      if (item_.parts) {
        float* part = item_.parts + (i * item_.num_parts + split) * (kPartHead + d_);
        part[0] = row.largest;
        part[1] = row.total;
        part[2] = row.offset;
        std::memcpy(part + kPartHead, row.acc, d_ * sizeof(float));
      } else {
        merge(row, split == 0);
      }
    }
  }

 public:
  // Adds the split at hand to those before it.
  void merge(Row& row, bool is_first) {
    if (is_first) {
      row.merged_largest = row.largest;
      row.merged_total = row.total;
      row.merged_offset = row.offset;
      float* const merged = row.merged;
      row.merged = row.acc;
      row.acc = merged;
      return;
    }
    const float largest = row.merged_largest > row.largest ? row.merged_largest : row.largest;
    const float keep = decay<Isa>(row.merged_largest, largest), take = decay<Isa>(row.largest, largest);
    row.merged_largest = largest;
    row.merged_total = row.merged_total * keep + row.total * take;
    row.merged_offset = row.merged_offset * keep + row.offset * take;
    for (size_t i = 0; i < d_; i += kLanes) {
      const auto before = Isa::mul(Isa::load(row.merged + i), Isa::set(keep));
      Isa::store(row.merged + i, Isa::add(before, Isa::mul(Isa::load(row.acc + i), Isa::set(take))));
    }
  }

  void write_row(const Row& row, size_t number) {
    const size_t groups = task_.num_heads / task_.num_kv_heads;
    const auto offset = Isa::set(row.merged_offset), total = Isa::set(row.merged_total);
    for (size_t i = 0; i < d_; i += kLanes)
      Isa::store(row.merged + i, Isa::div(Isa::add(Isa::load(row.merged + i), offset), total));
    const size_t token = item_.first_query + number / groups, head = item_.kv_head * groups + number % groups;
    write<Isa>(task_.out, task_.dtype, token * task_.out_stride + head * d_, row.merged, d_);
  }

 private:
  void write_rows() {
    for (size_t i = 0; i < num_rows_; ++i)
      if (s_.rows[i].visible) write_row(s_.rows[i], item_.row_begin + i);
  }

  const Attend& task_;
  const Item& item_;
  Scratch& s_;
  const size_t d_, num_rows_;
  const u8* const pages_;
  const size_t block_stride_, v_stride_;
};

template <class Isa, int kBits>
void attend_item(const Attend& task, const Item& item, Scratch& scratch) {
  Attention<Isa, kBits>(task, item, scratch).run();
}

template <class Isa>
void merge_row(const Attend& task, const Item& item, size_t number, Scratch& scratch) {
  Attention<Isa, 4> attention(task, item, scratch);
  const size_t d = task.layout.head_size, later = item.num_queries - 1 - number / (task.num_heads / task.num_kv_heads);
  const size_t visible = item.seq_len > later ? item.seq_len - later : 0;
  Row& row = scratch.rows[0];
  row.merged = scratch.acc;
  for (size_t split = 0; split * kSplit < visible; ++split) {
    float* part = item.parts + ((number - item.row_begin) * item.num_parts + split) * (kPartHead + d);
    row.largest = part[0];
    row.total = part[1];
    row.offset = part[2];
    row.acc = part + kPartHead;
    attention.merge(row, split == 0);
  }
  if (visible) attention.write_row(row, number);
}

}  // namespace
}  // namespace rl_accel::kv_int4
