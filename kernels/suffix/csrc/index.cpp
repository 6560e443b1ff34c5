#include "index.hpp"

#include <algorithm>
#include <optional>

namespace rl_accel::suffix {
namespace {

constexpr u32 kCrossSlice = 64;           // more tokens than a step takes are fed to the index over all problems
constexpr u32 kCrossContext = 32;         // tokens matched again when that index was renewed
constexpr std::size_t kQueuedBytes = 64;  // of a rollout that waits for it, beside its tokens
constexpr float kMinProbability = 1e-6f;
constexpr std::size_t kMinCross = 64 << 10;  // bytes; in less, a generation is over before it is of use

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
    return position == 0 || position > problem.prompt.size()
               ? std::span<const Token>{}
               : std::span<const Token>(problem.prompt).subspan(position - 1);
  const std::vector<Token>& tokens = problem.sequences[name].tokens;
  return position >= tokens.size() ? std::span<const Token>{} : std::span<const Token>(tokens).subspan(position);
}

std::span<const Token> SuffixIndex::text_at(const Cross& cross, u32 end) { return std::span(cross.text).subspan(end); }

SuffixIndex::SuffixIndex(IndexOptions options) : options_(std::move(options)) {
  // Above zero, so that no path probability that is compared has underflowed.
  if (!(options_.min_probability >= kMinProbability)) options_.min_probability = kMinProbability;
  if (max_cross() < kMinCross) options_.cross_tokens = 0;
  limbo_.sequences.emplace_back();
  new_cross();
}

SuffixIndex::Request& SuffixIndex::request(i64 handle) {
  const auto slot = static_cast<u64>(handle) & 0xffffffffu;
  if (handle < 0 || slot >= requests_.size() || requests_[slot]->problem == nullptr ||
      requests_[slot]->handle_generation != static_cast<u32>(handle >> 32))
    throw SuffixError("no live request has handle " + std::to_string(handle));
  return *requests_[slot];
}

SuffixIndex::Problem& SuffixIndex::new_problem(u64 key, std::span<const Token> prompt) {
  std::unique_ptr<Problem>& slot = problems_[key];
  slot = std::make_unique<Problem>();
  Problem& problem = *slot;
  problem.key = key;
  problem.sequences.emplace_back();  // stands for the prompt
  problem.no_prompt = !takes_prompt(prompt);
  if (!problem.no_prompt) {
    problem.prompt.assign(prompt.begin(), prompt.end());
    problem.prompt_state = append_prompt(problem.automaton, prompt);
  }
  attach_segments(problem);
  return problem;
}

void SuffixIndex::attach_segments(Problem& problem) {
  problem.closed.clear();
  problem.heads_bytes = 0;
  for (const Held& held : segments_) {
    if (problem.closed.size() == options_.max_closed) break;
    ClosedProblem found;
    if (!held.segment->find(problem.key, found)) continue;
    std::vector<Token> heads = heads_of(found);
    found.heads = heads;
    problem.heads_bytes += heads.capacity() * sizeof(Token);
    problem.closed.push_back({held.segment, found, std::move(heads)});
  }
}

i64 SuffixIndex::begin(u64 key, std::span<const Token> prompt) {
  const std::lock_guard lock(mutex_);
  require_tokens(prompt);
  Problem& problem = place_for(key, prompt);
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
  ++problem.num_live;
  r.sequence = 0;
  r.last = LiveAutomaton::kRoot;
  r.num_consumed = static_cast<u32>(prompt.size());
  r.num_fresh = 0;
  r.cursors.clear();
  for (u32 g = 0; g < 2; ++g) r.cross[g] = CrossCursor{};
  forget_draft(r);
  if (&problem != &limbo_) {
    enter(r, prompt);
    count(problem);
    settle();
  }
  return static_cast<i64>(r.handle_generation) << 32 | slot;
}

// Gives a new request its place among the texts of its problem.
void SuffixIndex::enter(Request& r, std::span<const Token> prompt) {
  Problem& problem = *r.problem;
  r.sequence = static_cast<u32>(problem.sequences.size());
  std::vector<Token>& text = problem.sequences.emplace_back().tokens;
  text.push_back(kStart);
  problem.text_bytes += text.capacity() * sizeof(Token);
  if (std::equal(prompt.begin(), prompt.end(), problem.prompt.begin(), problem.prompt.end())) {
    r.last = problem.prompt_state;
  } else if (takes_prompt(prompt)) {
    r.last = append_prompt(problem.automaton, prompt);
    if (problem.no_prompt) {  // it was given up, and is there again
      problem.prompt.assign(prompt.begin(), prompt.end());
      problem.prompt_state = r.last;
      problem.no_prompt = false;
    }  // else the problem was asked in other words: this prompt is a text of its own
  }
  for (const Attached& closed : problem.closed) r.cursors.push_back(search(closed.problem, text));
}

void SuffixIndex::end(i64 handle, bool keep) {
  const std::lock_guard lock(mutex_);
  Request& r = request(handle);
  Problem& problem = *r.problem;
  Sequence& sequence = problem.sequences[r.sequence];
  r.problem = nullptr;
  r.handle_generation = (r.handle_generation + 1) & 0x7fffffff;
  free_.push_back(static_cast<u32>(static_cast<u64>(handle) & 0xffffffffu));
  --problem.num_live;
  if (&problem == &limbo_) return;
  sequence.ended = true;
  // The engine cuts what was accepted behind a stop token only after the drafter has seen it.
  for (std::size_t i = sequence.tokens.size() - std::min<std::size_t>(sequence.tokens.size() - 1, r.num_fresh);
       i + 1 < sequence.tokens.size(); ++i)
    if (is_stop(sequence.tokens[i])) {
      sequence.tokens.resize(i + 1);
      break;
    }
  sequence.kept = keep && sequence.tokens.size() > 1;
  if (sequence.kept) queue_cross(std::span<const Token>(sequence.tokens).subspan(1));
  forget_if_idle(problem);
  settle();
}

// A problem without requests and without rollouts to pack is forgotten.
void SuffixIndex::forget_if_idle(Problem& problem) {
  if (problem.num_live > 0) return;
  if (std::none_of(problem.sequences.begin(), problem.sequences.end(), waits)) {
    erase(problem);
  } else if (!problem.idle) {
    problem.idle = true;
    idle_ += problem.counted;
  }
}

void SuffixIndex::erase(Problem& problem) {
  live_ -= problem.counted;
  if (problem.idle) idle_ -= problem.counted;
  problems_.erase(u64{problem.key});  // a copy: the key lies in what is erased
}

void SuffixIndex::learn(Request& r, std::span<const Token> tokens) {
  ++stats_.request_steps;
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
      SourceStats& s =
          stats_.by_source[static_cast<u32>(Scoring::source_of(r.lead_cell))][Scoring::length_of(r.lead_cell)];
      ++s.drafts;
      s.drafted += r.num_admitted;
      s.accepted += std::min(right, r.num_admitted);
    }
  }
  forget_draft(r);
}

void SuffixIndex::forget_draft(Request& r) { r.num_candidates = r.num_votes = r.num_admitted = 0; }

void SuffixIndex::take(Request& r, std::span<const Token> tokens) {
  r.num_consumed += static_cast<u32>(tokens.size());
  r.num_fresh = static_cast<u32>(tokens.size());
  if (r.problem == &limbo_) return;
  Problem& problem = *r.problem;
  std::vector<Token>& text = problem.sequences[r.sequence].tokens;
  const u32 name = std::min(r.sequence, End::kMaxSeqs - 1);
  for (const Token& token : tokens) {
    if (text.size() == text.capacity()) {
      problem.text_bytes -= text.capacity() * sizeof(Token);
      text.reserve(text.size() + text.size() / 4 + 32);
      problem.text_bytes += text.capacity() * sizeof(Token);
    }
    text.push_back(token);
    const u32 position = std::min(static_cast<u32>(text.size() - 1), End::kMaxLen);
    r.last = problem.automaton.append(r.last, token, End::pack(name, position));
    for (std::size_t i = 0; i < r.cursors.size(); ++i) {
      const ClosedProblem& closed = problem.closed[i].problem;
      if (advance(r.cursors[i], closed, token)) continue;
      if (&token == &tokens.back())
        unsearched_.emplace_back(&r, static_cast<u32>(i));
      else
        r.cursors[i] = search(closed, tail(text, kMaxContext));
    }
  }
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
    normalize(automaton, cursor.state, cursor.len);
    for (const Token token : fresh) automaton.advance(cursor.state, cursor.len, token);
  }
}

// Fetches what requests [first, last) of the batch will read to take their first new token. Each pass reads what the
// one before it has fetched, so the requests wait for memory together.
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
      if (cross_[g])
        cross_[g]->automaton.prefetch(r.cross[g].generation == cross_[g]->generation ? r.cross[g].state : 0);
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

// Makes place for the new tokens of a batch. A request is let go where its own do not fit.
template <typename F>
void SuffixIndex::make_place(F&& fresh_of) {
  const auto need_of = [&](std::size_t i) {
    return batch_[i]->problem == &limbo_ ? 0 : kBytesPerToken * fresh_of(i).size();
  };
  std::size_t need = 0;
  for (std::size_t i = 0; i < batch_.size(); ++i) need += need_of(i);
  if (live_ + need <= max_live()) return;
  give_up(std::min(need, max_live() / 4));
  std::size_t left = max_live() - std::min(live_, max_live());
  for (std::size_t i = 0; i < batch_.size(); ++i) {
    if (need_of(i) > left)
      let_go(*batch_[i]);
    else
      left -= need_of(i);
  }
}

// Some tens of requests are taken together, and all requests of one problem that follow each other: all of them append,
// then all of them draft, so that siblings see each other's newest tokens while the problem is still in the cache.
template <typename F>
Drafts SuffixIndex::run(std::span<const i64> handles, F&& fresh_of, std::span<const u32> max_draft_tokens,
                        std::span<const float> min_path_probs, std::span<const u32> capture_sizes,
                        float break_even_gain) {
  // With room to fill, candidates below the cutoff are wanted as well.
  const float below = capture_sizes.size() > 1 ? .25f : 1.f;
  batch_.clear();
  unsearched_.clear();
  for (const i64 handle : handles) batch_.push_back(&request(handle));
  const std::size_t n = batch_.size();
  u32 num_taken = 0;
  for (std::size_t i = 0; i < n; ++i) {
    require_tokens(fresh_of(i));  // before anything changes
    num_taken += static_cast<u32>(fresh_of(i).size());
  }
  if (live_ + kBytesPerToken * num_taken > max_live()) make_place(fresh_of);
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
    draft(first, last, max_draft_tokens, min_path_probs, below);
  }
  admit(batch_, min_path_probs, capture_sizes, break_even_gain);
  feed_cross(num_taken + kCrossSlice);
  const Problem* counted = &limbo_;
  for (const Request* r : batch_)
    if (r->problem != counted && r->problem != &limbo_) count(*r->problem), counted = r->problem;
  settle();
  return emit(batch_);
}

Drafts SuffixIndex::propose(std::span<const i64> handles, std::span<const Token> tokens, std::span<const u32> offsets,
                            std::span<const u32> max_draft_tokens, std::span<const float> min_path_probs,
                            std::span<const u32> capture_sizes, float break_even_gain) {
  const std::lock_guard lock(mutex_);
  const std::size_t n = handles.size();
  if (offsets.size() != n + 1 || max_draft_tokens.size() != n || min_path_probs.size() != n)
    throw SuffixError(
        "propose: offsets must have one more entry than handles, max_draft_tokens and min_path_probs as many");
  for (std::size_t i = 0; i < n; ++i)
    if (offsets[i] > offsets[i + 1] || offsets[i + 1] > tokens.size())
      throw SuffixError("propose: offsets must not fall and stay within the tokens");
  const auto fresh_of = [&](std::size_t i) { return tokens.subspan(offsets[i], offsets[i + 1] - offsets[i]); };
  return run(handles, fresh_of, max_draft_tokens, min_path_probs, capture_sizes, break_even_gain);
}

Drafts SuffixIndex::propose_rows(std::span<const i64> handles, const Token* matrix, std::size_t stride,
                                 std::span<const u32> rows, std::span<const u32> num_tokens,
                                 std::span<const u32> max_draft_tokens, std::span<const float> min_path_probs,
                                 std::span<const u32> capture_sizes, float break_even_gain) {
  const std::lock_guard lock(mutex_);
  const std::size_t n = handles.size();
  if (rows.size() != n || num_tokens.size() != n || max_draft_tokens.size() != n || min_path_probs.size() != n)
    throw SuffixError(
        "propose_rows: handles, rows, num_tokens, max_draft_tokens and min_path_probs must have one length");
  const auto fresh_of = [&](std::size_t i) {
    const u32 consumed = batch_[i]->num_consumed;
    if (num_tokens[i] < consumed) throw SuffixError("propose_rows: a request lost tokens");
    const Token* row = matrix + static_cast<std::size_t>(rows[i]) * stride;
    return std::span<const Token>(row + consumed, num_tokens[i] - consumed);
  };
  return run(handles, fresh_of, max_draft_tokens, min_path_probs, capture_sizes, break_even_gain);
}

void SuffixIndex::new_cross() {
  if (options_.cross_tokens == 0) return;
  cross_[1] = std::move(cross_[0]);
  cross_[0] = std::make_unique<Cross>();
  cross_[0]->generation = ++cross_generation_;
}

// A rollout on its way into the index over all problems; the oldest ones go where there are too many.
void SuffixIndex::queue_cross(std::span<const Token> tokens) {
  const std::size_t bytes = tokens.size_bytes() + kQueuedBytes;
  if (options_.cross_tokens == 0 || bytes > max_cross()) return;
  while (cross_queue_bytes_ + bytes > max_cross()) pop_cross();
  cross_queue_.emplace_back(tokens.begin(), tokens.end());
  cross_queue_bytes_ += bytes;
}

void SuffixIndex::pop_cross() {
  cross_queue_bytes_ -= cross_queue_.front().size() * sizeof(Token) + kQueuedBytes;
  cross_queue_.pop_front();
  cross_queue_at_ = 0;
}

void SuffixIndex::feed_cross(u32 budget) {
  while (budget > 0 && !cross_queue_.empty()) {
    const std::vector<Token>& tokens = cross_queue_.front();
    const bool begins = cross_queue_at_ == 0, some = !cross_[0]->text.empty();
    const bool full = cross_[0]->memory_bytes() > max_cross() ||
                      (begins && some && cross_[0]->text.size() + tokens.size() > options_.cross_tokens);
    if (full) new_cross();
    if (full || begins) {
      cross_[0]->text.push_back(kStart);
      cross_last_ = LiveAutomaton::kRoot;
    }
    Cross& cross = *cross_[0];
    while (budget > 0 && cross_queue_at_ < tokens.size() && cross.memory_bytes() <= max_cross()) {
      const auto end = static_cast<u32>(cross.text.size());
      cross.text.push_back(tokens[cross_queue_at_]);
      cross_last_ = cross.automaton.append(cross_last_, tokens[cross_queue_at_++], end);
      --budget;
    }
    if (cross_queue_at_ == tokens.size()) pop_cross();
  }
}

}  // namespace rl_accel::suffix
