// Reading the draft of a request, and admission of what a batch has drafted.
#include <algorithm>
#include <functional>

#include "index.hpp"

namespace rl_accel::suffix {

// The draft of one request while it is read.
struct SuffixIndex::Reading {
  Request* request;
  u32 cap;
  float floor, path, expected;
  Reader live, cross[2];
  ClosedReader closed[kMaxClosed];
  u32 num_closed;
};

void SuffixIndex::start(Reading& reading, Request& r, u32 cap, float floor) const {
  const Problem& problem = *r.problem;
  reading.request = &r;
  reading.cap = cap;
  reading.floor = floor;
  reading.path = 1.f;
  reading.expected = 0.f;
  const u32 state = problem.automaton.longest_continued(r.last);
  reading.live = Reader(problem.automaton, state, problem.automaton.state(state).len);
  reading.num_closed = 0;
  for (std::size_t i = 0; i < r.cursors.size(); ++i) {
    if (r.cursors[i].num == 0) continue;
    reading.closed[reading.num_closed++] = ClosedReader(r.cursors[i], problem.closed[i].problem.text,
                                                        past_source(epoch_ - problem.closed[i].segment->epoch()));
  }
  for (u32 g = 0; g < 2; ++g)
    reading.cross[g] = cross_[g] && r.cross[g].generation == cross_[g]->generation && r.cross[g].len > 0
                           ? Reader(cross_[g]->automaton, r.cross[g].state, r.cross[g].len)
                           : Reader();
}

// Adds tokens to a draft until it has to look into an automaton again; returns whether it goes on.
bool SuffixIndex::read(Reading& reading) {
  Reader& live = reading.live;
  do {
    if (!read_token(reading)) return false;
  } while (live.reads_text() && reading.cross[0].reads_text() && reading.cross[1].reads_text());
  return true;
}

bool SuffixIndex::read_token(Reading& reading) {
  Request& r = *reading.request;
  Reader& live = reading.live;
  const u32 k = r.num_candidates;
  Ballot ballot;
  live.leave();
  if (live.alive()) {
    const u32 name = live.sequence();
    const Source source = name == kPromptSequence ? Source::kPrompt
                          : name == r.sequence    ? Source::kOwn
                                                  : Source::kSibling;
    const u32 cell = Scoring::cell(source, live.length(), live.best(), live.total());
    ballot.add(live.token(), cell, scoring_.odds(cell));
    if (const u32 shorter = live.shorter(); shorter != LiveAutomaton::kRoot) {  // a shorter context has a say, too
      const LiveAutomaton& automaton = r.problem->automaton;
      const LiveAutomaton::State& from = automaton.state(shorter);
      const u32 best = automaton.state(from.to).count;
      const u32 other = Scoring::cell(Source::kShorter, from.len, best, LiveAutomaton::continued(from, best));
      ballot.add(from.tok, other, scoring_.odds(other));
    }
  }
  for (u32 i = 0; i < reading.num_closed; ++i)
    if (reading.closed[i].alive()) reading.closed[i].vote(ballot, scoring_);
  for (Reader& cross : reading.cross) {
    cross.leave();
    if (!cross.alive()) continue;
    const u32 cell = Scoring::cell(Source::kCross, cross.length(), cross.best(), cross.total());
    ballot.add(cross.token(), cell, scoring_.odds(cell));
  }
  if (ballot.size == 0) return false;
  float win, rest;
  const Token token = ballot.winner(win, rest);
  const u32 score = Scoring::score(win, rest, k);
  reading.path *= scoring_.probability(score, win, rest);
  if (k == 0) {
    float strongest = -1;
    for (u32 i = 0; i < ballot.size; ++i) {
      r.votes[r.num_votes++] = {ballot.cell[i], ballot.token[i]};
      if (ballot.token[i] == token && ballot.odds[i] > strongest)
        strongest = ballot.odds[i], r.lead_cell = ballot.cell[i];
    }
    stats_.expected_first += reading.path;
  }
  r.path[k] = token;  // the first one below the floor is kept, so that its outcome is learned
  r.scores[k] = static_cast<u8>(score);
  r.paths[k] = reading.path;
  r.num_candidates = k + 1;
  if (reading.path < reading.floor) return false;
  reading.expected += reading.path;
  if (k + 1 == reading.cap || is_stop(token)) return false;
  if (live.alive()) live.follow(token);
  for (u32 i = 0; i < reading.num_closed; ++i)
    if (reading.closed[i].alive()) reading.closed[i].follow(token);
  for (Reader& cross : reading.cross)
    if (cross.alive()) cross.follow(token);
  return true;
}

// Reads the drafts of requests [first, last) of the batch in turns: what one waits for is fetched while others go on.
void SuffixIndex::draft(std::size_t first, std::size_t last, std::span<const u32> max_draft_tokens,
                        std::span<const float> min_path_probs, float below) {
  Reading readings[kTogether];
  Reading* going[kTogether];
  while (first < last) {
    u32 n = 0;
    for (; first < last && n < kTogether; ++first) {
      const u32 cap = std::min(max_draft_tokens[first], options_.max_draft);
      if (cap == 0) continue;
      const float floor = std::max(options_.min_probability, std::min(min_path_probs[first], 1.f) * below);
      start(readings[n], *batch_[first], cap, floor);
      going[n] = &readings[n];
      ++n;
    }
    while (n > 0) {
      for (u32 i = 0; i < n; ++i) {
        going[i]->live.approach();
        for (Reader& cross : going[i]->cross) cross.approach();
      }
      for (u32 i = 0; i < n; ++i) {
        going[i]->live.settle([&](u32 end) { return text_at(*going[i]->request->problem, end); });
        going[i]->live.settle_shorter();
        for (u32 g = 0; g < 2; ++g) going[i]->cross[g].settle([&](u32 end) { return text_at(*cross_[g], end); });
      }
      u32 left = 0;
      for (u32 i = 0; i < n; ++i)
        if (read(*going[i])) {
          going[left++] = going[i];
        } else {
          stats_.expected_all += going[i]->expected;
          stats_.candidates += going[i]->request->num_candidates;
        }
      n = left;
    }
  }
}

// Decides how many tokens of each draft are admitted. Path probabilities fall along a draft, so admitting the tokens
// with the best ratio of probability to cost takes a prefix of every draft.
void SuffixIndex::admit(std::span<Request*> requests, std::span<const float> min_path_probs,
                        std::span<const u32> capture_sizes, float break_even_gain) {
  std::size_t admitted = 0, possible = 0;
  float gain = 0;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    Request& r = *requests[i];
    u32 n = 0;
    for (; n < r.num_candidates && r.paths[n] >= std::max(min_path_probs[i], options_.min_probability); ++n)
      if (break_even_gain > 0) gain += r.paths[n] / std::max(min_path_probs[i], options_.min_probability) - 1.f;
    r.num_admitted = n;
    admitted += n;
    possible += r.num_candidates;
  }
  if (gain < break_even_gain) {
    for (Request* r : requests) r->num_admitted = 0;
    return;
  }
  if (capture_sizes.empty()) return;
  const std::size_t base = requests.size();
  const u32 limit = capture_sizes.back();
  // The smallest size that holds what was admitted: up to it, more tokens cost nothing.
  const auto size = std::lower_bound(capture_sizes.begin(), capture_sizes.end(), base + admitted);
  std::size_t wanted = size == capture_sizes.end() ? limit : *size;
  wanted = wanted > base ? wanted - base : 0;
  if (admitted == 0 || wanted == admitted) return;
  wanted = std::min(wanted, possible);
  ratios_.clear();
  for (std::size_t i = 0; i < requests.size(); ++i)
    for (u32 k = 0; k < requests[i]->num_candidates; ++k)
      if (const float path = requests[i]->paths[k]; path >= options_.min_probability && min_path_probs[i] <= 1.f)
        ratios_.push_back(path / min_path_probs[i]);
  if (wanted == 0 || ratios_.empty()) {
    for (Request* r : requests) r->num_admitted = 0;
    return;
  }
  float cutoff = 0;
  if (wanted < ratios_.size()) {
    std::nth_element(ratios_.begin(), ratios_.begin() + static_cast<std::ptrdiff_t>(wanted - 1), ratios_.end(),
                     std::greater<>());
    cutoff = ratios_[wanted - 1];
  }
  std::size_t left = wanted;
  for (const bool strictly : {true, false}) {  // ties at the cutoff fill what is left
    for (std::size_t i = 0; i < requests.size(); ++i) {
      Request& r = *requests[i];
      u32 n = strictly ? 0 : r.num_admitted;
      while (n < r.num_candidates && left > 0 && min_path_probs[i] <= 1.f && r.paths[n] >= options_.min_probability &&
             (strictly ? r.paths[n] / min_path_probs[i] > cutoff : r.paths[n] / min_path_probs[i] >= cutoff))
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
