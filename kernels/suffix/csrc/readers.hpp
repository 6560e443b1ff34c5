// Reading on behind what a request has matched: each reader predicts one token a position, a ballot adds them up.
#pragma once

#include <algorithm>
#include <span>

#include "closed.hpp"
#include "live.hpp"
#include "scoring.hpp"

namespace rl_accel::suffix {

inline constexpr u32 kMaxVotes = 16;

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
  ClosedReader() {}  // nothing: arrays of them are made for every batch
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
  const Token* text_;
  std::size_t size_;
  Source source_;
  u32 num_, len_;
  u32 next_[ClosedCursor::kFollow];
  Token tokens_[ClosedCursor::kFollow];
};

// A cursor that was not moved while its automaton grew may stand in a state that was split since.
inline void normalize(const LiveAutomaton& automaton, u32& state, u32 len) {
  while (state != LiveAutomaton::kRoot && len <= automaton.state(automaton.state(state).link).len)
    state = automaton.state(state).link;
}

// Reads on in an automaton behind a suffix of a text: state by state while there is a choice, then, where only one
// occurrence is left, straight from the text that it occurred in. A position takes three calls, each of which fetches
// what the next one reads, so that many readers which take turns do not wait for memory one after the other.
class Reader {
 public:
  Reader() = default;
  Reader(const LiveAutomaton& automaton, u32 state, u32 len) : automaton_(&automaton), state_(state), len_(len) {}

  bool alive() const { return next_ != nullptr ? next_ < end_ && *next_ != kStart : state_ != LiveAutomaton::kRoot; }
  bool reads_text() const { return next_ != nullptr || state_ == LiveAutomaton::kRoot; }  // or nothing more
  Token token() const { return next_ != nullptr ? *next_ : token_; }
  u32 length() const { return len_; }
  u32 best() const { return best_; }
  u32 total() const { return total_; }
  u32 sequence() const { return sequence_; }
  // The next shorter context that was continued; the root if there is none, or where a text is read.
  u32 shorter() const { return shorter_; }

  // Goes to the longest context that was continued.
  void approach() {
    if (next_ != nullptr || state_ == LiveAutomaton::kRoot) return;
    const LiveAutomaton::State* state = &automaton_->state(state_);
    while (state_ != LiveAutomaton::kRoot && state->tok == LiveAutomaton::kNoToken) {
      state_ = state->link;
      state = &automaton_->state(state_);
      len_ = state->len;
    }
    if (state_ == LiveAutomaton::kRoot) return;
    automaton_->prefetch(state->to);
    automaton_->prefetch(state->link);
  }

  // Finds its prediction; `text_at(end)` gives the text from an occurrence on, or an empty span.
  template <typename F>
  void settle(F&& text_at) {
    if (next_ != nullptr || state_ == LiveAutomaton::kRoot) return;
    const LiveAutomaton::State& from = automaton_->state(state_);
    const LiveAutomaton::State& to = automaton_->state(from.to);
    token_ = from.tok;
    best_ = to.count;
    total_ = LiveAutomaton::continued(from, best_);
    sequence_ = End::seq(to.end);
    if (total_ == 1) {
      const std::span<const Token> text = text_at(to.end);
      if (!text.empty()) left_ = text.data(), end_ = text.data() + text.size();
      fetch(left_);
    }
  }

  // After settle: looks for a shorter context, too.
  void settle_shorter() {
    if (next_ != nullptr || state_ == LiveAutomaton::kRoot) return;
    shorter_ = automaton_->longest_continued(automaton_->state(state_).link);
    if (shorter_ != LiveAutomaton::kRoot) automaton_->prefetch(automaton_->state(shorter_).to);
  }

  // Leaves the automaton for the text of the only occurrence.
  void leave() {
    if (left_ != nullptr && *left_ == token_) next_ = left_;
    left_ = nullptr;
  }

  // Moves behind `token`; a reader of a text that goes on otherwise ends.
  void follow(Token token) {
    if (next_ != nullptr) {
      next_ = *next_ == token ? next_ + 1 : end_;
      shorter_ = LiveAutomaton::kRoot;
      ++len_;
    } else {
      automaton_->advance(state_, len_, token);
      automaton_->prefetch(state_);
    }
  }

 private:
  const LiveAutomaton* automaton_ = nullptr;
  u32 state_ = LiveAutomaton::kRoot, len_ = 0;
  const Token* next_ = nullptr;
  const Token* end_ = nullptr;
  const Token* left_ = nullptr;  // where the text of the only occurrence goes on, until it is entered
  Token token_ = 0;
  u32 best_ = 0, total_ = 0, sequence_ = 0, shorter_ = LiveAutomaton::kRoot;
};

}  // namespace rl_accel::suffix
