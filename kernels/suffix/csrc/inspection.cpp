// What an index holds and knows: bytes, integrity, matches, what was learned, counters.
#include "index.hpp"

#include <algorithm>
#include <numeric>

namespace rl_accel::suffix {

std::size_t SuffixIndex::live_bytes() const {
  const std::lock_guard lock(mutex_);
  std::size_t bytes = live_;
  for (const auto& r : requests_) bytes += sizeof(Request) + r->cursors.capacity() * sizeof(ClosedCursor);
  return bytes;
}

std::size_t SuffixIndex::closed_bytes() const {
  const std::lock_guard lock(mutex_);
  return closed_;
}

std::size_t SuffixIndex::cross_bytes() const {
  const std::lock_guard lock(mutex_);
  return cross_size();
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
  for (const Held& held : segments_) held.segment->check_integrity();
  for (const auto& cross : cross_)
    if (cross) cross->automaton.check_integrity();
  check_requests();
  check_sums();
}

void SuffixIndex::check_requests() const {
  std::unordered_map<const Problem*, u32> live;
  for (const auto& r : requests_) {
    if (r->problem == nullptr) continue;
    ++live[r->problem];
    if (r->sequence >= r->problem->sequences.size() || r->last >= r->problem->automaton.num_states())
      throw SuffixError("index: a request stands where its problem has nothing");
    if (r->cursors.size() != r->problem->closed.size())
      throw SuffixError("index: a request follows other segments than its problem");
  }
  for (const auto& [key, problem] : problems_) {
    const bool pending = std::any_of(problem->sequences.begin(), problem->sequences.end(), waits);
    if (live[problem.get()] != problem->num_live) throw SuffixError("index: a problem miscounts its live requests");
    if (problem->key != key || problem->idle != (problem->num_live == 0) || (problem->idle && !pending))
      throw SuffixError("index: a problem that nobody needs");
    for (const Attached& closed : problem->closed)
      if (std::none_of(segments_.begin(), segments_.end(),
                       [&](const Held& held) { return held.segment == closed.segment; }))
        throw SuffixError("index: a problem looks into a segment that was dropped");
  }
  if (live[&limbo_] != limbo_.num_live) throw SuffixError("index: limbo miscounts its requests");
}

void SuffixIndex::check_sums() const {
  std::size_t all = 0, idle = 0, closed = 0, queued = 0;
  for (const auto& [key, problem] : problems_) {
    std::size_t texts = 0, heads = 0;
    for (const Sequence& s : problem->sequences) texts += s.tokens.capacity() * sizeof(Token);
    for (const Attached& a : problem->closed) heads += a.heads.capacity() * sizeof(Token);
    if (texts != problem->text_bytes || heads != problem->heads_bytes || problem->counted != bytes_of(*problem))
      throw SuffixError("index: a problem miscounts its bytes");
    all += problem->counted;
    if (problem->idle) idle += problem->counted;
  }
  for (const Held& held : segments_) closed += held.segment->memory_bytes();
  for (const auto& tokens : cross_queue_) queued += tokens.size() * sizeof(Token);
  if (all != live_ || idle != idle_ || closed != closed_ || queued > cross_queue_bytes_)
    throw SuffixError("index: the bytes of all problems or segments are miscounted");
  if (live_ + closed_ + cross_size() > options_.max_bytes) throw SuffixError("index: more memory than max_bytes");
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
