// Life of the history: epochs are packed, dropped, written and read.
#include "index.hpp"

#include <algorithm>
#include <new>

namespace rl_accel::suffix {

SegmentInfo SuffixIndex::describe(const Segment& s, bool foreign, bool shared) {
  return {s.epoch(),      s.policy_version(), s.num_problems(), s.num_rollouts(),
          s.num_tokens(), s.memory_bytes(),   s.checksum(),     foreign,
          shared};
}

SegmentInfo SuffixIndex::pack() {
  const std::lock_guard lock(mutex_);
  const SegmentInfo info = pack_ended(epoch_, policy_version_);
  settle();
  return info;
}

SegmentInfo SuffixIndex::close_epoch(i64 epoch, i64 policy_version) {
  const std::lock_guard lock(mutex_);
  policy_version_ = policy_version;
  const SegmentInfo info = pack_ended(epoch, policy_version);
  epoch_ = std::max(epoch_, epoch + 1);
  settle();
  return info;
}

void SuffixIndex::begin_epoch(i64 epoch) {
  const std::lock_guard lock(mutex_);
  epoch_ = epoch;
}

// A slice of the rollouts at a time, so that texts and their packed form lie in memory together for few of them only.
SegmentInfo SuffixIndex::pack_ended(i64 epoch, i64 policy_version) {
  SegmentInfo all{epoch, policy_version, 0, 0, 0, 0};
  std::vector<ProblemTexts> texts;
  std::size_t bytes = 0;
  for (auto it = problems_.begin(); it != problems_.end(); ++it) {
    Problem& problem = *it->second;
    bool listed = false;
    for (Sequence& sequence : problem.sequences) {
      if (!waits(sequence)) continue;
      const std::span<const Token> text = std::span<const Token>(sequence.tokens).subspan(1);
      const std::size_t size = Segment::size_of(1, 1, text.size());
      if (bytes > 0 && bytes + size > max_slice()) {
        pack_texts(all, texts);  // erases no problem that has a rollout left
        bytes = 0;
        listed = false;
      }
      if (!listed) texts.push_back({problem.key, {}});
      texts.back().rollouts.push_back(text);
      sequence.archived = listed = true;
      bytes += size;
    }
  }
  pack_texts(all, texts);
  return all;
}

// Packs one slice, adds its description to `all`, and forgets the problems that nobody needs any more.
void SuffixIndex::pack_texts(SegmentInfo& all, std::vector<ProblemTexts>& texts) {
  if (texts.empty()) return;
  u64 rollouts = 0, tokens = 0;
  std::vector<u64> keys;
  for (const ProblemTexts& problem : texts) {
    keys.push_back(problem.problem);
    rollouts += problem.rollouts.size();
    for (const auto& rollout : problem.rollouts) tokens += rollout.size();
  }
  const std::size_t size = Segment::size_of(texts.size(), rollouts, tokens);
  const std::size_t others = live_ + cross_size();
  while (!segments_.empty() && others + closed_ + size > options_.max_bytes) {
    drop(oldest());
    ++stats_.segments_dropped;
  }
  try {
    if (others + size > options_.max_bytes) throw std::bad_alloc();
    const auto segment = Segment::build(all.epoch, all.policy_version, options_.tokenizer, std::move(texts));
    all.num_problems += segment->num_problems();
    all.num_rollouts += rollouts;
    all.num_tokens += tokens;
    all.num_bytes += segment->memory_bytes();
    add(segment, false, false);
  } catch (const std::bad_alloc&) {
    stats_.rollouts_lost += rollouts;
  }
  texts.clear();
  for (const u64 key : keys) forget_if_idle(*problems_.at(key));
}

SegmentInfo SuffixIndex::add(std::shared_ptr<const Segment> segment, bool foreign, bool shared) {
  const SegmentInfo info = describe(*segment, foreign, shared);
  const auto same = [&](const Held& held) {
    return held.segment->checksum() == info.checksum && held.segment->memory_bytes() == info.num_bytes;
  };
  if (std::any_of(segments_.begin(), segments_.end(), same)) return info;
  auto at = segments_.begin();
  while (at != segments_.end() && at->segment->epoch() > info.epoch) ++at;
  segments_.insert(at, Held{std::move(segment), foreign, shared});
  closed_ += info.num_bytes;
  return info;
}

void SuffixIndex::drop_before(i64 epoch) {
  const std::lock_guard lock(mutex_);
  while (!segments_.empty() && segments_.back().segment->epoch() < epoch) drop(std::prev(segments_.end()));
}

std::vector<SegmentInfo> SuffixIndex::segments() const {
  const std::lock_guard lock(mutex_);
  std::vector<SegmentInfo> out;
  for (const Held& held : segments_) out.push_back(describe(*held.segment, held.foreign, held.shared));
  return out;
}

void SuffixIndex::write_segment(std::size_t i, const std::string& path) const {
  std::shared_ptr<const Segment> segment;
  {
    const std::lock_guard lock(mutex_);
    if (i >= segments_.size()) throw SuffixError("no segment " + std::to_string(i));
    segment = std::next(segments_.begin(), static_cast<std::ptrdiff_t>(i))->segment;
  }
  segment->write(path);
}

SegmentInfo SuffixIndex::open_segment(const std::string& path, bool foreign, bool shared) {
  auto segment = Segment::open(path, options_.tokenizer);
  const std::lock_guard lock(mutex_);
  epoch_ = std::max(epoch_, segment->epoch() + 1);
  const SegmentInfo info = add(std::move(segment), foreign, shared);
  settle();
  return info;
}

SegmentInfo SuffixIndex::add_segment(std::span<const unsigned char> bytes) {
  auto segment = Segment::copy(bytes, options_.tokenizer, "of another engine");
  const std::lock_guard lock(mutex_);
  const SegmentInfo info = add(std::move(segment), true, true);
  settle();
  return info;
}

std::shared_ptr<const Segment> SuffixIndex::take_unshared() {
  const std::lock_guard lock(mutex_);
  for (auto held = segments_.rbegin(); held != segments_.rend(); ++held) {
    if (held->shared) continue;
    held->shared = true;
    return held->segment;
  }
  return nullptr;
}

void SuffixIndex::share_with_nobody() {
  const std::lock_guard lock(mutex_);
  for (Held& held : segments_) held.shared = true;
}

}  // namespace rl_accel::suffix
