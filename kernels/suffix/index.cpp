#include "index.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>

namespace rl_accel::suffix {
namespace {

constexpr u32 kCrossSlice = 64;   // more tokens than a step takes are fed to the index over all problems
constexpr u32 kCrossContext = 32; // tokens matched again when that index was renewed
constexpr u32 kPromptSequence = 0;
constexpr float kMinProbability = 1e-6f;

// Predictions for one draft position.
struct Ballot {
  Token token[kMaxVotes];
  u32 cell[kMaxVotes];
  float odds[kMaxVotes];
  u32 size = 0;

  void add(Token t, u32 c, float o) {
    if (size == kMaxVotes) return;
    token[size] = t;
    cell[size] = c;
    odds[size++] = o;
  }

  // The token with the largest sum of odds; `rest` gets the odds of all others.
  Token winner(float& win, float& rest) const {
    float all = 0;
    bool same = true;
    for (u32 i = 0; i < size; ++i) {
      all += odds[i];
      same &= token[i] == token[0];
    }
    if (same) {
      win = all;
      rest = 0;
      return token[0];
    }
    win = 0;
    Token best = 0;
    for (u32 i = 0; i < size; ++i) {
      float sum = 0;
      for (u32 j = 0; j < size; ++j) sum += token[j] == token[i] ? odds[j] : 0.f;
      if (sum > win) win = sum, best = token[i];
    }
    rest = std::max(all - win, 0.f);
    return best;
  }
};

// Reads on behind the occurrences that a request follows in one closed epoch. One load per occurrence and position.
class ClosedReader {
 public:
  ClosedReader() = default;
  ClosedReader(const ClosedCursor& cursor, std::span<const Token> text, Source source)
      : text_(text.data()), size_(text.size()), source_(source), num_(cursor.num), len_(cursor.len) {
    for (u32 i = 0; i < num_; ++i) {
      next_[i] = cursor.next[i];
      tokens_[i] = text_[next_[i]];
    }
  }

  bool alive() const { return num_ > 0; }

  // The token that most occurrences go on with, the later of equals.
  void vote(Ballot& ballot, const Scoring& scoring) const {
    Token token = tokens_[0];
    u32 best = 1;
    for (u32 i = 1; i < num_; ++i) best += tokens_[i] == token;
    if (best < num_) {
      best = 0;
      for (u32 i = 0; i < num_; ++i) {
        const auto equal = static_cast<u32>(std::count(tokens_, tokens_ + num_, tokens_[i]));
        if (equal >= best) best = equal, token = tokens_[i];
      }
    }
    const u32 cell = Scoring::cell(source_, len_, best, num_);
    ballot.add(token, cell, scoring.odds(cell));
  }

  // Keeps the occurrences that go on with `token`.
  void follow(Token token) {
    u32 kept = 0;
    for (u32 i = 0; i < num_; ++i) {
      const u32 next = next_[i] + 1;
      if (tokens_[i] != token || next >= size_ || text_[next] == kStart) continue;
      next_[kept] = next;
      tokens_[kept++] = text_[next];
    }
    num_ = kept;
    ++len_;
  }

 private:
  const Token* text_ = nullptr;
  std::size_t size_ = 0;
  Source source_ = Source::kPast1;
  u32 num_ = 0, len_ = 0;
  u32 next_[ClosedCursor::kFollow];
  Token tokens_[ClosedCursor::kFollow];
};

// A cursor that was not moved while its automaton grew may stand in a state that was split since.
void normalise(const LiveAutomaton& automaton, u32& state, u32 len) {
  while (state != LiveAutomaton::kRoot && len <= automaton.state(automaton.state(state).link).len)
    state = automaton.state(state).link;
}

// Reads on in an automaton behind a suffix of a text: state by state while there is a choice, then, where only one
// occurrence is left, straight from the text that it occurred in.
class Reader {
 public:
  Reader(const LiveAutomaton& automaton, u32 state, u32 len) : automaton_(&automaton), state_(state), len_(len) {}

  bool alive() const { return next_ != nullptr ? next_ < end_ : state_ != LiveAutomaton::kRoot; }
  bool reads_states() const { return next_ == nullptr; }
  Token token() const { return next_ != nullptr ? *next_ : token_; }
  u32 length() const { return len_; }
  u32 best() const { return best_; }
  u32 total() const { return total_; }
  u32 sequence() const { return sequence_; }
  // The next shorter context, or the root where there is none or the automaton was left.
  u32 shorter() const {
    if (next_ != nullptr && !fresh_) return LiveAutomaton::kRoot;
    u32 s = automaton_->state(state_).link;
    while (s != LiveAutomaton::kRoot && automaton_->state(s).tok == LiveAutomaton::kNoToken) s = automaton_->state(s).link;
    return s;
  }

  // Finds the prediction of the current state; `text_at(end)` gives the text from an occurrence on, or an empty span.
  template <typename F>
  void settle(F&& text_at) {
    while (state_ != LiveAutomaton::kRoot && automaton_->state(state_).tok == LiveAutomaton::kNoToken) {
      state_ = automaton_->state(state_).link;
      len_ = automaton_->state(state_).len;
    }
    if (state_ == LiveAutomaton::kRoot) return;
    const LiveAutomaton::State& from = automaton_->state(state_);
    const LiveAutomaton::State& to = automaton_->state(from.to);
    token_ = from.tok;
    best_ = to.count;
    total_ = LiveAutomaton::continued(from, best_);
    sequence_ = End::seq(to.end);
    if (total_ == 1) {
      const std::span<const Token> text = text_at(to.end);
      if (!text.empty() && text[0] == token_) next_ = text.data(), end_ = text.data() + text.size(), fresh_ = true;
    }
  }

  // Moves behind `token`; a reader of a text that goes on otherwise ends.
  void follow(Token token) {
    if (next_ != nullptr) {
      next_ = *next_ == token ? next_ + 1 : end_;
      fresh_ = false;
      ++len_;
    } else {
      automaton_->advance(state_, len_, token);
    }
  }

 private:
  const LiveAutomaton* automaton_;
  u32 state_, len_;
  const Token* next_ = nullptr;
  const Token* end_ = nullptr;
  bool fresh_ = false;  // at the place where the automaton was left
  Token token_ = 0;
  u32 best_ = 0, total_ = 0, sequence_ = 0;
};

void require_tokens(std::span<const Token> tokens) {
  for (const Token token : tokens)
    if (token < 0) throw SuffixError("token ids must not be negative; got " + std::to_string(token));
}

std::span<const Token> tail(const std::vector<Token>& tokens, std::size_t n) {
  return {tokens.data() + (tokens.size() - std::min(tokens.size(), n)), std::min(tokens.size(), n)};
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

std::span<const Token> SuffixIndex::text_at(const Cross& cross, u32 end) {
  // A rollout ends at the next kStart.
  const Token* first = cross.text.data() + end;
  const Token* last = first + std::min<std::size_t>(kMaxDraft, cross.text.size() - end);
  return {first, std::find(first, last, kStart)};
}

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
  u32 position = 0;
  for (const Token token : prompt)
    problem.prompt_state = problem.automaton.append(problem.prompt_state, token,
                                                    End::pack(kPromptSequence, std::min(++position, End::kMaxLen)));
  for (const auto& segment : segments_) {
    if (problem.closed.size() == options_.max_closed) break;
    ClosedProblem found;
    if (segment->find(key, found)) problem.closed.push_back({segment, found});
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
    r.last = LiveAutomaton::kRoot;
    u32 position = 0;
    for (const Token token : prompt)
      r.last = problem.automaton.append(r.last, token, End::pack(kPromptSequence, std::min(++position, End::kMaxLen)));
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
  for (const Token token : tokens) {
    if (text.size() == text.capacity()) text.reserve(text.size() + text.size() / 4 + 32);
    text.push_back(token);
    const u32 position = std::min(static_cast<u32>(text.size() - 1), End::kMaxLen);
    r.last = problem.automaton.append(r.last, token, End::pack(name, position));
    const auto context = tail(text, kMaxContext);
    for (std::size_t i = 0; i < r.cursors.size(); ++i) advance(r.cursors[i], problem.closed[i].problem, token, context);
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
void SuffixIndex::admit(std::span<Request*> requests, std::span<const float> thresholds, std::span<const u32> totals,
                        float fee) {
  std::size_t admitted = 0, possible = 0;
  float gain = 0;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    Request& r = *requests[i];
    u32 n = 0;
    for (; n < r.num_candidates && r.paths[n] >= std::max(thresholds[i], options_.min_probability); ++n)
      if (fee > 0) gain += r.paths[n] / std::max(thresholds[i], options_.min_probability) - 1.f;
    r.num_admitted = n;
    admitted += n;
    possible += r.num_candidates;
  }
  if (gain < fee) {
    for (Request* r : requests) r->num_admitted = 0;
    return;
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

// What the next requests will read first. The nearer half is in the cache already, so it is followed one step further.
void SuffixIndex::prefetch_requests(std::size_t first, std::size_t last) const {
  const std::size_t nearer = first + (last - first) / 2;
  for (std::size_t i = first; i < nearer; ++i) {
    const Request& r = *batch_[i];
    r.problem->automaton.prefetch(r.last);
    __builtin_prefetch(&r.problem->sequences[r.sequence]);
    __builtin_prefetch(r.cursors.data());
  }
  for (std::size_t i = nearer; i < last; ++i) {
    const char* bytes = reinterpret_cast<const char*>(batch_[i]);
    for (const std::size_t line : {0, 64, 128, 192, 256}) __builtin_prefetch(bytes + line);
  }
}

// What the drafts of these requests will begin with: continuations in the automaton and in the closed epochs.
void SuffixIndex::prefetch_continuations(std::size_t first, std::size_t last) const {
  for (std::size_t i = first; i < last; ++i) {
    const Request& r = *batch_[i];
    const LiveAutomaton& live = r.problem->automaton;
    const u32 state = live.longest_continued(r.last);
    if (state != LiveAutomaton::kRoot) live.prefetch(live.state(state).to);
    for (std::size_t c = 0; c < r.cursors.size(); ++c)
      for (u32 k = 0; k < r.cursors[c].num; ++k)
        __builtin_prefetch(&r.problem->closed[c].problem.text[r.cursors[c].next[k]]);
  }
}

// Requests of one problem that follow each other are taken together: all of them append, then all of them draft, so that
// siblings see each other's newest tokens while the problem is still in the cache.
template <typename F>
Drafts SuffixIndex::run(std::span<const i64> handles, F&& fresh_of, std::span<const u32> caps,
                        std::span<const float> thresholds, std::span<const u32> totals, float fee) {
  // With room to fill, candidates below the price are wanted as well.
  const float below = totals.size() > 1 ? .25f : 1.f;
  batch_.clear();
  for (const i64 handle : handles) batch_.push_back(&request(handle));
  const std::size_t n = batch_.size();
  u32 num_taken = 0;
  for (std::size_t i = 0; i < n; ++i) {
    require_tokens(fresh_of(i));  // before anything changes
    num_taken += static_cast<u32>(fresh_of(i).size());
  }
  for (std::size_t first = 0, last = 0; first < n; first = last) {
    while (last < n && batch_[last]->problem == batch_[first]->problem) ++last;
    prefetch_requests(last, std::min(n, last + 2 * (last - first)));
    for (std::size_t i = first; i < last; ++i) {
      const std::span<const Token> fresh = fresh_of(i);
      if (fresh.empty()) {
        forget_draft(*batch_[i]);
      } else {
        learn(*batch_[i], fresh);
        take(*batch_[i], fresh);
      }
    }
    prefetch_continuations(first, last);
    for (std::size_t i = first; i < last; ++i)
      draft(*batch_[i], caps[i], std::max(options_.min_probability, std::min(thresholds[i], 1.f) * below));
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

std::size_t SuffixIndex::live_bytes() const {
  const std::lock_guard lock(mutex_);
  std::size_t bytes = 0;
  for (const auto& [key, problem] : problems_) {
    bytes += sizeof(Problem) + 64 + problem->automaton.memory_bytes() + problem->prompt.capacity() * sizeof(Token);
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
