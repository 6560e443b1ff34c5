// Life of the history: epochs are closed, dropped, written and mapped.
#include "index.hpp"

#include <algorithm>

namespace rl_accel::suffix {

SegmentInfo SuffixIndex::close_epoch(i64 epoch, i64 policy_version) {
  const std::lock_guard lock(mutex_);
  std::vector<ProblemTexts> texts;
  for (auto& [key, problem] : problems_) {
    ProblemTexts found{key, {}};
    for (Sequence& sequence : problem->sequences) {
      if (!sequence.kept || !sequence.ended || sequence.archived) continue;
      found.rollouts.push_back(std::span<const Token>(sequence.tokens).subspan(1));
      sequence.archived = true;
    }
    if (!found.rollouts.empty()) texts.push_back(std::move(found));
  }
  auto segment = Segment::build(epoch, policy_version, options_.tokenizer, std::move(texts));
  for (auto it = problems_.begin(); it != problems_.end();)
    it = it->second->num_live == 0 ? problems_.erase(it) : std::next(it);
  const SegmentInfo info{segment->epoch(),        segment->policy_version(), segment->num_problems(),
                         segment->num_rollouts(), segment->num_tokens(),     segment->memory_bytes()};
  if (segment->num_tokens() > 0) {  // an empty close ages nothing
    newest_epoch_ = std::max(newest_epoch_, epoch);
    auto at = segments_.begin();
    while (at != segments_.end() && (*at)->epoch() > epoch) ++at;
    segments_.insert(at, std::move(segment));
  }
  return info;
}

void SuffixIndex::drop_before(i64 epoch) {
  const std::lock_guard lock(mutex_);
  min_epoch_ = std::max(min_epoch_, epoch);
  while (!segments_.empty() && segments_.back()->epoch() < min_epoch_) segments_.pop_back();
}

std::vector<SegmentInfo> SuffixIndex::segments() const {
  const std::lock_guard lock(mutex_);
  std::vector<SegmentInfo> out;
  for (const auto& s : segments_)
    out.push_back({s->epoch(), s->policy_version(), s->num_problems(), s->num_rollouts(), s->num_tokens(),
                   s->memory_bytes()});
  return out;
}

void SuffixIndex::write_segment(std::size_t i, const std::string& path) const {
  std::shared_ptr<const Segment> segment;
  {
    const std::lock_guard lock(mutex_);
    if (i >= segments_.size()) throw SuffixError("no segment " + std::to_string(i));
    segment = *std::next(segments_.begin(), static_cast<std::ptrdiff_t>(i));
  }
  segment->write(path);
}

SegmentInfo SuffixIndex::open_segment(const std::string& path) {
  auto segment = Segment::open(path, options_.tokenizer);
  const SegmentInfo info{segment->epoch(),        segment->policy_version(), segment->num_problems(),
                         segment->num_rollouts(), segment->num_tokens(),     segment->memory_bytes()};
  const std::lock_guard lock(mutex_);
  newest_epoch_ = std::max(newest_epoch_, info.epoch);
  auto at = segments_.begin();
  while (at != segments_.end() && (*at)->epoch() > info.epoch) ++at;
  segments_.insert(at, std::move(segment));
  return info;
}

}  // namespace rl_accel::suffix
