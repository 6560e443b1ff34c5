// What an index holds and knows: bytes, integrity, matches, what was learned, counters.
#include "index.hpp"

#include <algorithm>
#include <numeric>

namespace rl_accel::suffix {

std::size_t SuffixIndex::live_bytes() const {
  const std::lock_guard lock(mutex_);
  std::size_t bytes = 0;
  for (const auto& [key, problem] : problems_) {
    bytes += sizeof(Problem) + 64 + problem->automaton.memory_bytes() + problem->prompt.capacity() * sizeof(Token);
    for (const Attached& closed : problem->closed) bytes += closed.heads.capacity() * sizeof(Token);
    for (const Sequence& s : problem->sequences) bytes += sizeof(Sequence) + s.tokens.capacity() * sizeof(Token);
  }
  for (const auto& r : requests_)
    bytes += sizeof(Request) + r->cursors.capacity() * sizeof(ClosedCursor);
  return bytes;
}

std::size_t SuffixIndex::closed_bytes() const {
  const std::lock_guard lock(mutex_);
  return std::accumulate(segments_.begin(), segments_.end(), std::size_t{0},
                         [](std::size_t sum, const auto& s) { return sum + s->memory_bytes(); });
}

std::size_t SuffixIndex::cross_bytes() const {
  const std::lock_guard lock(mutex_);
  std::size_t bytes = 0;
  for (const auto& cross : cross_)
    if (cross) bytes += cross->automaton.memory_bytes() + cross->text.capacity() * sizeof(Token);
  for (const auto& tokens : cross_queue_) bytes += tokens.capacity() * sizeof(Token);
  return bytes;
}

u64 SuffixIndex::live_tokens() const {
  const std::lock_guard lock(mutex_);
  u64 tokens = 0;
  for (const auto& [key, problem] : problems_) {
    tokens += problem->prompt.size();
    for (const Sequence& s : problem->sequences) tokens += s.tokens.empty() ? 0 : s.tokens.size() - 1;
  }
  return tokens;
}

void SuffixIndex::check_integrity() const {
  const std::lock_guard lock(mutex_);
  for (const auto& [key, problem] : problems_) problem->automaton.check_integrity();
  for (const auto& segment : segments_) segment->check_integrity();
  for (const auto& cross : cross_)
    if (cross) cross->automaton.check_integrity();
  std::unordered_map<const Problem*, u32> live;
  for (const auto& r : requests_)
    if (r->problem != nullptr) ++live[r->problem];
  for (const auto& [key, problem] : problems_)
    if (live[problem.get()] != problem->num_live) throw SuffixError("index: a problem miscounts its live requests");
}

Inspection SuffixIndex::inspect(i64 handle) const {
  const std::lock_guard lock(mutex_);
  const Request& r = request(handle);
  const LiveAutomaton& live = r.problem->automaton;
  const u32 state = live.longest_continued(r.last);
  Inspection out{live.state(state).len, live.state(state).count, {}, {}, {}};
  for (std::size_t i = 0; i < r.cursors.size(); ++i) {
    out.epochs.push_back(r.problem->closed[i].segment->epoch());
    out.closed_len.push_back(r.cursors[i].len);
    out.closed_total.push_back(r.cursors[i].total);
  }
  return out;
}

std::vector<float> SuffixIndex::scoring_state() const {
  const std::lock_guard lock(mutex_);
  std::vector<float> state(Scoring::kStateSize);
  scoring_.save(state.data());
  return state;
}

void SuffixIndex::load_scoring_state(std::span<const float> state) {
  const std::lock_guard lock(mutex_);
  if (state.size() != Scoring::kStateSize) throw SuffixError("scoring: state of another size");
  scoring_.load(state.data());
}

float SuffixIndex::reliability(Source source) const {
  const std::lock_guard lock(mutex_);
  return scoring_.reliability(source);
}

IndexStats SuffixIndex::take_stats() {
  const std::lock_guard lock(mutex_);
  IndexStats out = stats_;
  stats_ = IndexStats{};
  return out;
}

}  // namespace rl_accel::suffix
