// Splits layers into items for threads: 128 rows of one expert, for all of its tokens. Phases follow each other: V^ x,
// gate and up, V^ h, W2 h, and the sums of the experts of each token in the order of its slots. There is no barrier
// between phases: an item waits for the earlier items of its own expert. Threads take items in order and items wait for
// earlier ones only, so the first that is not done never waits.
#include <algorithm>
#include <array>
#include <atomic>
#include <thread>
#include <vector>

#include "../../common/csrc/parallel.hpp"
#include "dispatch.hpp"
#include "memory.hpp"

namespace rl_accel::moe_int3 {
namespace {

constexpr size_t kItemRows = 2 * kBlock;
constexpr size_t kThreadWeights = 1 << 16;  // weights times tokens; less is done before another thread has begun

size_t rank_of(const Factors& factors, size_t expert) {
  return factors.starts ? static_cast<size_t>(factors.starts[expert + 1] - factors.starts[expert]) : 0;
}

// Some tokens of one expert, which follow each other in what a projection writes.
struct Part {
  size_t expert, first, count;
};

// Items that are done of each part, whose phases follow each other.
class Progress {
 public:
  explicit Progress(size_t num_parts) : done_(num_parts) {}
  void wait(size_t part, size_t items) const {
    while (done_[part].load(std::memory_order_acquire) < items) std::this_thread::yield();
  }
  void add(size_t part) { done_[part].fetch_add(1, std::memory_order_release); }

 private:
  std::vector<std::atomic<size_t>> done_;
};

// One matrix of each of several experts, times their tokens.
class Projection {
 public:
  Projection(const Routines& routines, const Matrix& matrix, const Factors& factors, const std::vector<Part>& parts,
             const float* const* x, float* t, size_t t_stride, const Scratch* scratch)
      : routines_(routines),
        matrix_(matrix),
        factors_(factors),
        parts_(parts),
        x_(x),
        t_(t),
        t_stride_(t_stride),
        scratch_(scratch) {}

  size_t rank(size_t expert) const { return rank_of(factors_, expert); }

  // V^ x of a part has few rows, so that they are cut finely: into how many items.
  size_t compress_cuts() const {
    size_t highest = 0;
    for (const Part& part : parts_) highest = std::max(highest, rank(part.expert));
    return divide_up(highest, kMaxRows);
  }
  void compress(const Part& part, size_t cut, unsigned worker) const {
    const size_t first = cut * kMaxRows, ranks = rank(part.expert), length = matrix_.layout.in_features;
    if (first >= ranks) return;
    const size_t row = static_cast<size_t>(factors_.starts[part.expert]) + first;
    Product product{};
    product.codes = factors_.v_codes + row * row_bytes(length, kFactorBits);
    product.scales = factors_.v_scales + row * divide_up(length, kBlock);
    product.layout = {kFactorBits, kBlock, length};
    product.num_rows = std::min(kMaxRows, ranks - first);
    product.x = x_ + part.first;
    product.num_tokens = part.count;
    product.out = t_ + part.first * t_stride_ + first;
    product.out_stride = t_stride_;
    routines_.multiply(product, scratch_[worker]);
  }

  // Rows [begin, end) of a part, to out + token * out_stride.
  void multiply(const Part& part, size_t begin, size_t end, float* out, size_t out_stride, unsigned worker) const {
    const Layout& layout = matrix_.layout;
    const size_t row = part.expert * matrix_.out_features + begin, block = begin / kBlock;
    Product product{};
    product.codes = matrix_.codes + row * layout.bytes();
    product.scales = matrix_.scales + row * layout.groups();
    product.offsets = matrix_.offsets + row * layout.groups();
    product.layout = layout;
    product.num_rows = end - begin;
    product.x = x_ + part.first;
    product.num_tokens = part.count;
    product.out = out + part.first * out_stride;
    product.out_stride = out_stride;
    if ((product.rank = rank(part.expert))) {
      const auto start = static_cast<size_t>(factors_.starts[part.expert]);
      product.u_bytes = row_bytes(matrix_.out_features, kFactorBits);
      product.u_blocks = divide_up(matrix_.out_features, kBlock);
      product.u_codes = factors_.u_codes + start * product.u_bytes + block * kLanes * kFactorBits;
      product.u_scales = factors_.u_scales + start * product.u_blocks + block;
      product.t = t_ + part.first * t_stride_;
      product.t_stride = t_stride_;
      product.u_skip = begin % kBlock;
    }
    routines_.multiply(product, scratch_[worker]);
  }

 private:
  const Routines& routines_;
  const Matrix& matrix_;
  const Factors& factors_;
  const std::vector<Part>& parts_;
  const float* const* x_;
  float* t_;
  size_t t_stride_;
  const Scratch* scratch_;
};

size_t max_groups(const Matrix& matrix) { return divide_up(matrix.layout.in_features, 32); }

std::vector<Scratch> scratches(unsigned threads, size_t groups, size_t num_tokens, size_t rank) {
  const size_t each = divide_up(Scratch::num_floats(groups, num_tokens, rank), 16) * 16;
  float* memory = kept<0>(threads * each);
  std::vector<Scratch> out;
  for (unsigned i = 0; i < threads; ++i) out.emplace_back(memory + i * each, groups, num_tokens);
  return out;
}

unsigned useful(unsigned threads, size_t work) {
  return static_cast<unsigned>(std::clamp<size_t>(divide_up(work, kThreadWeights), 1, std::max(threads, 1u)));
}

}  // namespace

void linear(const float* x, size_t num_tokens, const Matrix& matrix, const Factors& factors, size_t expert, float* out,
            unsigned threads) {
  if (!num_tokens) return;
  const size_t rank = rank_of(factors, expert), rows = matrix.out_features;
  threads = useful(threads, rows * matrix.layout.in_features * num_tokens);
  const auto scratch = scratches(threads, max_groups(matrix), num_tokens, rank);
  std::vector<const float*> tokens(num_tokens);
  for (size_t i = 0; i < num_tokens; ++i) tokens[i] = x + i * matrix.layout.in_features;
  const std::vector<Part> parts{{expert, 0, num_tokens}};
  const Projection projection(chosen_routines(), matrix, factors, parts, tokens.data(), kept<1>(num_tokens * rank),
                              rank, scratch.data());
  const size_t cuts = projection.compress_cuts();
  Progress progress(1);
  parallel(cuts + divide_up(rows, kItemRows), threads, [&](size_t item, unsigned worker) {
    if (item < cuts) {
      projection.compress(parts[0], item, worker);
      return progress.add(0);
    }
    progress.wait(0, cuts);
    const size_t begin = (item - cuts) * kItemRows;
    projection.multiply(parts[0], begin, std::min(rows, begin + kItemRows), out + begin, rows, worker);
  });
}

bool experts(const Experts& task, unsigned threads) {
  const Routines& routines = chosen_routines();
  const size_t hidden = task.w13.layout.in_features, inner = task.w13.out_features / 2, out = task.w2.out_features;
  const size_t num_slots = task.num_tokens * task.slots;

  // Places of the pairs of a token and an expert, sorted by expert.
  std::vector<size_t> starts(task.num_experts + 1), place(num_slots), part_of(task.num_experts);
  for (size_t i = 0; i < num_slots; ++i)
    if (task.ids[i] >= 0 && static_cast<size_t>(task.ids[i]) >= task.num_experts) return false;
  for (size_t i = 0; i < num_slots; ++i)
    if (task.ids[i] >= 0) ++starts[static_cast<size_t>(task.ids[i]) + 1];
  std::vector<Part> parts;
  size_t most_tokens = 0, highest = 0;
  for (size_t expert = 0; expert < task.num_experts; ++expert) {
    const size_t count = starts[expert + 1];
    part_of[expert] = parts.size();
    if (count) parts.push_back({expert, starts[expert], count});
    most_tokens = std::max(most_tokens, count);
    highest = std::max({highest, rank_of(task.w13_factors, expert), rank_of(task.w2_factors, expert)});
    starts[expert + 1] += starts[expert];
  }
  const size_t num_pairs = starts.back();
  std::vector<const float*> tokens(2 * num_pairs);
  for (size_t i = 0; i < num_slots; ++i)
    if (task.ids[i] >= 0) {
      place[i] = starts[static_cast<size_t>(task.ids[i])]++;
      tokens[place[i]] = task.x + i / task.slots * hidden;
    }

  threads = useful(threads, num_pairs * inner * (2 * hidden + out));
  const auto scratch = scratches(threads, std::max(max_groups(task.w13), max_groups(task.w2)), most_tokens, highest);
  float* gate = kept<1>(num_pairs * (2 * inner + out + highest));
  float *up = gate + num_pairs * inner, *y = up + num_pairs * inner, *t = y + num_pairs * out;
  for (size_t i = 0; i < num_pairs; ++i) tokens[num_pairs + i] = gate + i * inner;

  const Projection w13(routines, task.w13, task.w13_factors, parts, tokens.data(), t, highest, scratch.data());
  const Projection w2(routines, task.w2, task.w2_factors, parts, tokens.data() + num_pairs, t, highest, scratch.data());
  const auto activated_rows = [&](const Part& part, size_t begin, size_t end, unsigned worker) {
    w13.multiply(part, begin, end, gate + begin, inner, worker);
    w13.multiply(part, inner + begin, inner + end, up + begin, inner, worker);
    for (size_t i = part.first; i < part.first + part.count; ++i)
      routines.activate(gate + i * inner + begin, up + i * inner + begin, end - begin);
  };

  // Items of a part in each phase, and in those before.
  const std::array cuts{w13.compress_cuts(), divide_up(inner, kBlock), w2.compress_cuts(), divide_up(out, kItemRows)};
  std::array<size_t, cuts.size() + 1> before{};
  for (size_t phase = 0; phase < cuts.size(); ++phase) before[phase + 1] = before[phase] + cuts[phase];
  const size_t num_items = parts.size() * before.back();
  Progress progress(parts.size());
  const auto multiply = [&](size_t item, unsigned worker) {
    size_t phase = 0;
    while (item >= parts.size() * before[phase + 1]) ++phase;
    const size_t index = item - parts.size() * before[phase], number = index / cuts[phase], cut = index % cuts[phase];
    const Part& part = parts[number];
    progress.wait(number, before[phase]);
    if (phase == 0) w13.compress(part, cut, worker);
    if (phase == 1) activated_rows(part, cut * kBlock, std::min(inner, (cut + 1) * kBlock), worker);
    if (phase == 2) w2.compress(part, cut, worker);
    if (phase == 3) {
      const size_t begin = cut * kItemRows;
      w2.multiply(part, begin, std::min(out, begin + kItemRows), y + begin, out, worker);
    }
    progress.add(number);
  };
  const auto sum = [&](size_t token) {
    float* to = task.out + token * out;
    std::fill_n(to, out, 0.0f);
    for (size_t i = token * task.slots; i < (token + 1) * task.slots; ++i)
      if (task.ids[i] >= 0) {
        progress.wait(part_of[static_cast<size_t>(task.ids[i])], before.back());
        routines.add_scaled(to, y + place[i] * out, task.weights[i], out);
      }
  };
  parallel(num_items + task.num_tokens, threads, [&](size_t item, unsigned worker) {
    if (item < num_items)
      multiply(item, worker);
    else
      sum(item - num_items);
  });
  return true;
}

}  // namespace rl_accel::moe_int3
