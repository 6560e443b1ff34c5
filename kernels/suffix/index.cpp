#include "index.hpp"

#include <algorithm>
#include <optional>

namespace rl_accel::suffix {
namespace {

constexpr u32 kCrossSlice = 64;   // more tokens than a step takes are fed to the index over all problems
constexpr u32 kCrossContext = 32; // tokens matched again when that index was renewed
constexpr float kMinProbability = 1e-6f;

void require_tokens(std::span<const Token> tokens) {
  for (const Token token : tokens)
    if (token < 0) throw SuffixError("token ids must not be negative; got " + std::to_string(token));
}

std::span<const Token> tail(const std::vector<Token>& tokens, std::size_t n) {
  return {tokens.data() + (tokens.size() - std::min(tokens.size(), n)), std::min(tokens.size(), n)};
}

// Returns the state of the whole prompt.
u32 append_prompt(LiveAutomaton& automaton, std::span<const Token> prompt) {
  u32 state = LiveAutomaton::kRoot, position = 0;
  for (const Token token : prompt)
    state = automaton.append(state, token, End::pack(kPromptSequence, std::min(++position, End::kMaxLen)));
  return state;
}

}  // namespace

std::span<const Token> SuffixIndex::text_at(const Problem& problem, u32 end) {
  const u32 name = End::seq(end), position = End::pos(end);
  if (name == End::kMaxSeqs - 1 || position == End::kMaxLen) return {};  // clamped
  if (name == kPromptSequence)
    return position == 0 || position > problem.prompt.size() ? std::span<const Token>{}
                                                             : std::span<const Token>(problem.prompt).subspan(position - 1);
  const std::vector<Token>& tokens = problem.sequences[name].tokens;
  return position >= tokens.size() ? std::span<const Token>{} : std::span<const Token>(tokens).subspan(position);
}

std::span<const Token> SuffixIndex::text_at(const Cross& cross, u32 end) { return std::span(cross.text).subspan(end); }

SuffixIndex::SuffixIndex(IndexOptions options) : options_(std::move(options)) {
  // Above zero, so that no path probability that is compared has underflowed.
  if (!(options_.min_probability >= kMinProbability)) options_.min_probability = kMinProbability;
  new_cross();
}

SuffixIndex::Request& SuffixIndex::request(i64 handle) {
  const auto slot = static_cast<u64>(handle) & 0xffffffffu;
  if (handle < 0 || slot >= requests_.size() || requests_[slot]->problem == nullptr ||
      requests_[slot]->handle_generation != static_cast<u32>(handle >> 32))
    throw SuffixError("no live request has handle " + std::to_string(handle));
  return *requests_[slot];
}

SuffixIndex::Problem& SuffixIndex::problem_of(u64 key, std::span<const Token> prompt) {
  std::unique_ptr<Problem>& slot = problems_[key];
  if (slot) return *slot;
  slot = std::make_unique<Problem>();
  Problem& problem = *slot;
  problem.key = key;
  problem.prompt.assign(prompt.begin(), prompt.end());
  problem.sequences.emplace_back();  // stands for the prompt
  problem.prompt_state = append_prompt(problem.automaton, prompt);
  for (const auto& segment : segments_) {
    if (problem.closed.size() == options_.max_closed) break;
    ClosedProblem found;
    if (!segment->find(key, found)) continue;
    std::vector<Token> heads = heads_of(found);
    found.heads = heads;
    problem.closed.push_back({segment, found, std::move(heads)});
  }
  return problem;
}

i64 SuffixIndex::begin(u64 key, std::span<const Token> prompt) {
  const std::lock_guard lock(mutex_);
  require_tokens(prompt);
  Problem& problem = problem_of(key, prompt);
  u32 slot;
  if (free_.empty()) {
    slot = static_cast<u32>(requests_.size());
    requests_.push_back(std::make_unique<Request>());
  } else {
    slot = free_.back();
    free_.pop_back();
  }
  Request& r = *requests_[slot];
  r.problem = &problem;
  r.sequence = static_cast<u32>(problem.sequences.size());
  problem.sequences.emplace_back();
  problem.sequences.back().tokens.push_back(kStart);
  ++problem.num_live;
  r.num_consumed = static_cast<u32>(prompt.size());
  r.num_fresh = 0;
  if (std::equal(prompt.begin(), prompt.end(), problem.prompt.begin(), problem.prompt.end())) {
    r.last = problem.prompt_state;
  } else {  // the problem was asked in other words: this prompt is a text of its own
    r.last = append_prompt(problem.automaton, prompt);
  }
  r.cursors.clear();
  for (const Attached& closed : problem.closed)
    r.cursors.push_back(search(closed.problem, problem.sequences.back().tokens));
  for (u32 g = 0; g < 2; ++g) r.cross[g] = CrossCursor{};
  forget_draft(r);
  return static_cast<i64>(r.handle_generation) << 32 | slot;
}

void SuffixIndex::end(i64 handle, bool keep) {
  const std::lock_guard lock(mutex_);
  Request& r = request(handle);
  Problem& problem = *r.problem;
  Sequence& sequence = problem.sequences[r.sequence];
  sequence.ended = true;
  // The engine cuts what was accepted behind a stop token only after the drafter has seen it.
  for (std::size_t i = sequence.tokens.size() - std::min<std::size_t>(sequence.tokens.size() - 1, r.num_fresh); i + 1 < sequence.tokens.size(); ++i)
    if (is_stop(sequence.tokens[i])) {
      sequence.tokens.resize(i + 1);
      break;
    }
  sequence.kept = keep && sequence.tokens.size() > 1;
  if (sequence.kept && options_.cross_tokens > 0)
    cross_queue_.emplace_back(sequence.tokens.begin() + 1, sequence.tokens.end());
  r.problem = nullptr;
  r.handle_generation = (r.handle_generation + 1) & 0x7fffffff;
  free_.push_back(static_cast<u32>(static_cast<u64>(handle) & 0xffffffffu));
  --problem.num_live;
  const auto waits = [](const Sequence& s) { return s.kept && !s.archived; };
  if (problem.num_live == 0 && std::none_of(problem.sequences.begin(), problem.sequences.end(), waits))
    problems_.erase(problem.key);
}

void SuffixIndex::learn(Request& r, std::span<const Token> tokens) {
  ++stats_.passes;
  if (r.num_candidates > 0) {
    for (u32 i = 0; i < r.num_votes; ++i) scoring_.learn_cell(r.votes[i].cell, r.votes[i].token == tokens[0]);
    u32 right = 0;
    for (std::size_t k = 0; k < std::min<std::size_t>(r.num_candidates, tokens.size()); ++k) {
      const bool hit = r.path[k] == tokens[k];
      scoring_.learn_score(r.scores[k], hit);
      if (!hit) break;
      ++right;
    }
    if (r.num_admitted > 0) {
      SourceStats& s = stats_.by_source[static_cast<u32>(Scoring::source_of(r.lead_cell))][Scoring::length_of(r.lead_cell)];
      ++s.drafts;
      s.drafted += r.num_admitted;
      s.accepted += std::min(right, r.num_admitted);
    }
  }
  forget_draft(r);
}

void SuffixIndex::forget_draft(Request& r) { r.num_candidates = r.num_votes = r.num_admitted = 0; }

void SuffixIndex::take(Request& r, std::span<const Token> tokens) {
  Problem& problem = *r.problem;
  std::vector<Token>& text = problem.sequences[r.sequence].tokens;
  const u32 name = std::min(r.sequence, End::kMaxSeqs - 1);
  for (const Token& token : tokens) {
    if (text.size() == text.capacity()) text.reserve(text.size() + text.size() / 4 + 32);
    text.push_back(token);
    const u32 position = std::min(static_cast<u32>(text.size() - 1), End::kMaxLen);
    r.last = problem.automaton.append(r.last, token, End::pack(name, position));
    for (std::size_t i = 0; i < r.cursors.size(); ++i) {
      const ClosedProblem& closed = problem.closed[i].problem;
      if (advance(r.cursors[i], closed, token)) continue;
      if (&token == &tokens.back()) unsearched_.emplace_back(&r, static_cast<u32>(i));
      else r.cursors[i] = search(closed, tail(text, kMaxContext));
    }
  }
  r.num_consumed += static_cast<u32>(tokens.size());
  r.num_fresh = static_cast<u32>(tokens.size());
  if (options_.cross_tokens == 0) return;
  for (const u32 g : {1u, 0u}) {  // the old generation first: it may take over the cursor of the young one
    if (!cross_[g]) continue;
    const LiveAutomaton& automaton = cross_[g]->automaton;
    CrossCursor& cursor = r.cross[g];
    auto fresh = tokens;
    if (cursor.generation != cross_[g]->generation) {
      if (g == 1 && r.cross[0].generation == cross_[1]->generation) {
        cursor = r.cross[0];
      } else {
        cursor = CrossCursor{cross_[g]->generation, LiveAutomaton::kRoot, 0};
        fresh = tail(text, std::min<std::size_t>(kCrossContext, text.size() - 1));
      }
    }
    normalise(automaton, cursor.state, cursor.len);
    for (const Token token : fresh) automaton.advance(cursor.state, cursor.len, token);
  }
}

// Fetches what requests [first, last) of the batch will read to take their first new token. Each pass reads what the one
// before it has fetched, so the requests wait for memory together.
template <typename F>
void SuffixIndex::prefetch(std::size_t first, std::size_t last, F&& fresh_of) {
  struct Walk {
    const LiveAutomaton* automaton;
    Token token;
    u32 states[4];  // along the suffix links, the latest first
  };
  Walk walks[kTogether];
  for (std::size_t i = first; i < last; ++i) batch_[i]->prefetch();
  u32 n = 0;
  for (std::size_t i = first; i < last; ++i) {
    const Request& r = *batch_[i];
    const Problem& problem = *r.problem;
    fetch(&problem.sequences[r.sequence]);
    for (std::size_t at = 0; at < r.cursors.size() * sizeof(ClosedCursor); at += 64)
      fetch(reinterpret_cast<const char*>(r.cursors.data()) + at);
    if (fresh_of(i).empty()) continue;
    problem.automaton.prefetch(r.last);
    walks[n++] = {&problem.automaton, fresh_of(i)[0], {r.last, kNone, kNone, kNone}};
    for (u32 g = 0; g < 2; ++g)
      if (cross_[g]) cross_[g]->automaton.prefetch(r.cross[g].generation == cross_[g]->generation ? r.cross[g].state : 0);
  }
  for (std::size_t i = first; i < last; ++i) {
    const Request& r = *batch_[i];
    const Problem& problem = *r.problem;
    const std::vector<Token>& text = problem.sequences[r.sequence].tokens;
    fetch(text.data() + text.size());
    for (std::size_t c = 0; c < r.cursors.size(); ++c)
      for (u32 k = 0; k < r.cursors[c].num; ++k) fetch(&problem.closed[c].problem.text[r.cursors[c].next[k]]);
  }
  for (u32 left = n, step = 0; left > 0 && step < kWalk; ++step) {
    left = 0;
    for (u32 i = 0; i < n; ++i) left += walks[i].automaton->prefetch_append(walks[i].states, walks[i].token);
  }
}

// Makes the searches that `take` has left, in turns.
void SuffixIndex::finish_searches() {
  constexpr std::size_t kSearches = 16;
  std::optional<Search> searches[kSearches];
  for (std::size_t first = 0; first < unsearched_.size(); first += kSearches) {
    const std::size_t n = std::min(unsearched_.size() - first, kSearches);
    for (std::size_t i = 0; i < n; ++i) {
      const auto [r, c] = unsearched_[first + i];
      searches[i].emplace(r->problem->closed[c].problem, tail(r->problem->sequences[r->sequence].tokens, kMaxContext));
    }
    for (bool going = true; going;) {
      going = false;
      for (std::size_t i = 0; i < n; ++i)
        if (!searches[i]->done()) searches[i]->prefetch();
      for (std::size_t i = 0; i < n; ++i) {
        if (searches[i]->done()) continue;
        searches[i]->step();
        going = true;
      }
    }
    for (std::size_t i = 0; i < n; ++i) {
      const auto [r, c] = unsearched_[first + i];
      r->cursors[c] = searches[i]->result();
    }
  }
  unsearched_.clear();
}

// Some tens of requests are taken together, and all requests of one problem that follow each other: all of them append, then
// all of them draft, so that siblings see each other's newest tokens while the problem is still in the cache.
template <typename F>
Drafts SuffixIndex::run(std::span<const i64> handles, F&& fresh_of, std::span<const u32> caps,
                        std::span<const float> thresholds, std::span<const u32> totals, float fee) {
  // With room to fill, candidates below the price are wanted as well.
  const float below = totals.size() > 1 ? .25f : 1.f;
  batch_.clear();
  unsearched_.clear();
  for (const i64 handle : handles) batch_.push_back(&request(handle));
  const std::size_t n = batch_.size();
  u32 num_taken = 0;
  for (std::size_t i = 0; i < n; ++i) {
    require_tokens(fresh_of(i));  // before anything changes
    num_taken += static_cast<u32>(fresh_of(i).size());
  }
  for (std::size_t first = 0, last = 0; first < n; first = last) {
    last = std::min(n, first + kTogether);
    while (last < n && batch_[last]->problem == batch_[last - 1]->problem) ++last;
    for (std::size_t i = first; i < last; ++i) {
      if ((i - first) % kTogether == 0) prefetch(i, std::min(last, i + kTogether), fresh_of);
      const std::span<const Token> fresh = fresh_of(i);
      if (fresh.empty()) {
        forget_draft(*batch_[i]);
      } else {
        learn(*batch_[i], fresh);
        take(*batch_[i], fresh);
      }
    }
    finish_searches();
    draft(first, last, caps, thresholds, below);
  }
  admit(batch_, thresholds, totals, fee);
  feed_cross(num_taken + kCrossSlice);
  return emit(batch_);
}

Drafts SuffixIndex::propose(std::span<const i64> handles, std::span<const Token> tokens, std::span<const u32> offsets,
                            std::span<const u32> caps, std::span<const float> thresholds,
                            std::span<const u32> totals, float fee) {
  const std::lock_guard lock(mutex_);
  const std::size_t n = handles.size();
  if (offsets.size() != n + 1 || caps.size() != n || thresholds.size() != n)
    throw SuffixError("propose: offsets must have one more entry than handles, caps and thresholds as many");
  for (std::size_t i = 0; i < n; ++i)
    if (offsets[i] > offsets[i + 1] || offsets[i + 1] > tokens.size())
      throw SuffixError("propose: offsets must not fall and stay within the tokens");
  const auto fresh_of = [&](std::size_t i) { return tokens.subspan(offsets[i], offsets[i + 1] - offsets[i]); };
  return run(handles, fresh_of, caps, thresholds, totals, fee);
}

Drafts SuffixIndex::propose_rows(std::span<const i64> handles, const Token* matrix, std::size_t stride,
                                 std::span<const u32> rows, std::span<const u32> num_tokens,
                                 std::span<const u32> caps, std::span<const float> thresholds,
                                 std::span<const u32> totals, float fee) {
  const std::lock_guard lock(mutex_);
  const std::size_t n = handles.size();
  if (rows.size() != n || num_tokens.size() != n || caps.size() != n || thresholds.size() != n)
    throw SuffixError("propose_rows: handles, rows, num_tokens, caps and thresholds must have one length");
  const auto fresh_of = [&](std::size_t i) {
    const u32 consumed = batch_[i]->num_consumed;
    if (num_tokens[i] < consumed) throw SuffixError("propose_rows: a request lost tokens");
    const Token* row = matrix + static_cast<std::size_t>(rows[i]) * stride;
    return std::span<const Token>(row + consumed, num_tokens[i] - consumed);
  };
  return run(handles, fresh_of, caps, thresholds, totals, fee);
}

void SuffixIndex::new_cross() {
  if (options_.cross_tokens == 0) return;
  cross_[1] = std::move(cross_[0]);
  cross_[0] = std::make_unique<Cross>();
  cross_[0]->generation = ++cross_generation_;
}

void SuffixIndex::feed_cross(u32 budget) {
  while (budget > 0 && !cross_queue_.empty()) {
    const std::vector<Token>& tokens = cross_queue_.front();
    if (cross_queue_at_ == 0) {
      if (cross_[0]->text.size() + tokens.size() > options_.cross_tokens && !cross_[0]->text.empty()) new_cross();
      cross_[0]->text.push_back(kStart);
      cross_last_ = LiveAutomaton::kRoot;
    }
    while (budget > 0 && cross_queue_at_ < tokens.size()) {
      const auto end = static_cast<u32>(cross_[0]->text.size());
      cross_[0]->text.push_back(tokens[cross_queue_at_]);
      cross_last_ = cross_[0]->automaton.append(cross_last_, tokens[cross_queue_at_++], end);
      --budget;
    }
    if (cross_queue_at_ < tokens.size()) return;
    cross_queue_.pop_front();
    cross_queue_at_ = 0;
  }
}

}  // namespace rl_accel::suffix
