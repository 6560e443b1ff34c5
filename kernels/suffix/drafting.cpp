// Reading the draft of a request, and admission of what a batch has drafted.
#include <algorithm>
#include <functional>
#include <optional>

#include "index.hpp"

namespace rl_accel::suffix {

void SuffixIndex::draft(Request& r, u32 cap, float floor) {
  cap = std::min(cap, options_.max_draft);
  if (cap == 0) return;
  const Problem& problem = *r.problem;
  u32 state = problem.automaton.longest_continued(r.last);
  Reader live(problem.automaton, state, problem.automaton.state(state).len);
  ClosedReader closed[kMaxClosed];
  u32 num_closed = 0;
  for (std::size_t i = 0; i < r.cursors.size(); ++i) {
    const i64 epoch = problem.closed[i].segment->epoch();
    if (r.cursors[i].num == 0 || epoch < min_epoch_) continue;
    closed[num_closed++] =
        ClosedReader(r.cursors[i], problem.closed[i].problem.text, past_source(newest_epoch_ + 1 - epoch));
  }
  std::optional<Reader> cross[2];
  for (u32 g = 0; g < 2; ++g)
    if (cross_[g] && r.cross[g].generation == cross_[g]->generation && r.cross[g].len > 0)
      cross[g].emplace(cross_[g]->automaton, r.cross[g].state, r.cross[g].len);

  float path = 1.f, expected = 0.f;
  for (u32 k = 0; k < cap; ++k) {
    Ballot ballot;
    if (live.alive()) {
      if (live.reads_states()) live.settle([&](u32 end) { return text_at(problem, end); });
      if (live.alive()) {
        const u32 name = live.sequence();
        const Source source = name == kPromptSequence ? Source::kPrompt
                              : name == r.sequence    ? Source::kOwn
                                                      : Source::kSibling;
        const u32 cell = Scoring::cell(source, live.length(), live.best(), live.total());
        ballot.add(live.token(), cell, scoring_.odds(cell));
        if (const u32 shorter = live.shorter(); shorter != LiveAutomaton::kRoot) {  // a shorter context has a say, too
          const LiveAutomaton& automaton = problem.automaton;
          const LiveAutomaton::State& from = automaton.state(shorter);
          const u32 best = automaton.state(from.to).count;
          const u32 other = Scoring::cell(Source::kShorter, from.len, best, LiveAutomaton::continued(from, best));
          ballot.add(from.tok, other, scoring_.odds(other));
        }
      }
    }
    for (u32 i = 0; i < num_closed; ++i)
      if (closed[i].alive()) closed[i].vote(ballot, scoring_);
    for (u32 g = 0; g < 2; ++g) {
      if (!cross[g] || !cross[g]->alive()) continue;
      if (cross[g]->reads_states()) cross[g]->settle([&](u32 end) { return text_at(*cross_[g], end); });
      if (!cross[g]->alive()) continue;
      const u32 cell = Scoring::cell(Source::kCross, cross[g]->length(), cross[g]->best(), cross[g]->total());
      ballot.add(cross[g]->token(), cell, scoring_.odds(cell));
    }
    if (ballot.size == 0) break;
    float win, rest;
    const Token token = ballot.winner(win, rest);
    const u32 score = Scoring::score(win, rest, k);
    path *= scoring_.probability(score, win, rest);
    if (k == 0) {
      float strongest = -1;
      for (u32 i = 0; i < ballot.size; ++i) {
        r.votes[r.num_votes++] = {ballot.cell[i], ballot.token[i]};
        if (ballot.token[i] == token && ballot.odds[i] > strongest) strongest = ballot.odds[i], r.lead_cell = ballot.cell[i];
      }
      stats_.expected_first += path;
    }
    r.path[k] = token;  // the first one below the floor is kept, so that its outcome is learned
    r.scores[k] = static_cast<u8>(score);
    r.paths[k] = path;
    r.num_candidates = k + 1;
    if (path < floor) break;
    expected += path;
    if (k + 1 == cap || is_stop(token)) break;
    if (live.alive()) live.follow(token);
    for (u32 i = 0; i < num_closed; ++i)
      if (closed[i].alive()) closed[i].follow(token);
    for (u32 g = 0; g < 2; ++g)
      if (cross[g] && cross[g]->alive()) cross[g]->follow(token);
  }
  stats_.expected_all += expected;
  stats_.candidates += r.num_candidates;
}

// Decides how many tokens of each draft are admitted. Path probabilities fall along a draft, so admitting the tokens with
// the best ratio of probability to price takes a prefix of every draft.
void SuffixIndex::admit(std::span<Request*> requests, std::span<const float> thresholds, std::span<const u32> totals) {
  std::size_t admitted = 0, possible = 0;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    Request& r = *requests[i];
    u32 n = 0;
    while (n < r.num_candidates && r.paths[n] >= std::max(thresholds[i], options_.min_probability)) ++n;
    r.num_admitted = n;
    admitted += n;
    possible += r.num_candidates;
  }
  if (totals.empty()) return;
  const std::size_t base = requests.size();
  const u32 limit = totals.back();
  // The smallest size that holds what was admitted: up to it, more tokens cost nothing.
  const auto size = std::lower_bound(totals.begin(), totals.end(), base + admitted);
  std::size_t wanted = size == totals.end() ? limit : *size;
  wanted = wanted > base ? wanted - base : 0;
  if (admitted == 0 || wanted == admitted) return;
  wanted = std::min(wanted, possible);
  ratios_.clear();
  for (std::size_t i = 0; i < requests.size(); ++i)
    for (u32 k = 0; k < requests[i]->num_candidates; ++k)
      if (const float path = requests[i]->paths[k]; path >= options_.min_probability && thresholds[i] <= 1.f)
        ratios_.push_back(path / thresholds[i]);
  if (wanted == 0 || ratios_.empty()) {
    for (Request* r : requests) r->num_admitted = 0;
    return;
  }
  float price = 0;
  if (wanted < ratios_.size()) {
    std::nth_element(ratios_.begin(), ratios_.begin() + static_cast<std::ptrdiff_t>(wanted - 1), ratios_.end(),
                     std::greater<>());
    price = ratios_[wanted - 1];
  }
  std::size_t left = wanted;
  for (const bool strictly : {true, false}) {  // ties at the price fill what is left
    for (std::size_t i = 0; i < requests.size(); ++i) {
      Request& r = *requests[i];
      u32 n = strictly ? 0 : r.num_admitted;
      while (n < r.num_candidates && left > 0 && thresholds[i] <= 1.f && r.paths[n] >= options_.min_probability &&
             (strictly ? r.paths[n] / thresholds[i] > price : r.paths[n] / thresholds[i] >= price))
        ++n, --left;
      r.num_admitted = n;
    }
  }
}

Drafts SuffixIndex::emit(std::span<Request*> requests) const {
  Drafts out;
  out.offsets.reserve(requests.size() + 1);
  out.offsets.push_back(0);
  for (const Request* r : requests) out.offsets.push_back(out.offsets.back() + r->num_admitted);
  out.tokens.reserve(out.offsets.back());
  out.paths.reserve(out.offsets.back());
  for (const Request* r : requests) {
    out.tokens.insert(out.tokens.end(), r->path, r->path + r->num_admitted);
    out.paths.insert(out.paths.end(), r->paths, r->paths + r->num_admitted);
  }
  return out;
}

}  // namespace rl_accel::suffix
