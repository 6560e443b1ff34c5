// The live tier: a generalized suffix automaton of one problem, extended by all its running rollouts at once.
//
// A state stands for the substrings that end at the same places. It keeps how often and where they occurred last, and
// its most frequent continuation inline, so that a draft is read by following `to`. Appending a token costs O(1)
// amortized (a walk along suffix links, capped for counts at `kTouchCap`); states, edges and the hash table of crowded
// states grow in chunks or step by step, never by copying everything.
//
// Not thread-safe. Memory: 28 B a state (about 1.3 states a token), 16 B an edge beyond a state's first.
#pragma once

#include <cstdlib>
#include <utility>

#include "common.hpp"

namespace rl_accel::suffix {

// Where an occurrence ends: the sequence and the index of the token behind it.
struct End {
  static constexpr u32 kPosBits = 20;
  static constexpr u32 kMaxSeqs = 1u << (32 - kPosBits);
  static constexpr u32 kMaxLen = (1u << kPosBits) - 1;
  static u32 pack(u32 seq, u32 pos) { return seq << kPosBits | pos; }
  static u32 seq(u32 end) { return end >> kPosBits; }
  static u32 pos(u32 end) { return end & kMaxLen; }
};

class LiveAutomaton {
 public:
  static constexpr Token kNoToken = -2;
  static constexpr u32 kRoot = 0;
  static constexpr u32 kTouchCap = 32;

  struct State {
    u32 len = 0;           // of the longest substring
    u32 link = kNone;      // suffix link
    u32 end = 0;           // most recent occurrence, packed End
    Token tok = kNoToken;  // most frequent continuation ...
    u32 to = kNone;        // ... and its state
    u32 head = kNone;      // further edges
    u32 count : 29 = 0;    // occurrences (of chains up to kTouchCap long)
    u32 degree : 3 = 0;    // further edges; kHashed: all edges, also the inline one, are listed and hashed
  };

  LiveAutomaton() { states_.push_back(State{}); }
  LiveAutomaton(const LiveAutomaton&) = delete;
  LiveAutomaton& operator=(const LiveAutomaton&) = delete;
  ~LiveAutomaton() {
    std::free(table_.slots);
    std::free(old_.slots);
  }

  // Forgets all texts and gives their memory back.
  void clear() {
    ChunkedArray<State, 9> root;
    root.push_back(State{});
    states_ = std::move(root);
    edges_ = ChunkedArray<Edge, 8>();
    std::free(table_.slots);
    std::free(old_.slots);
    table_ = old_ = Table{};
  }

  const State& state(u32 s) const { return states_[s]; }
  u32 num_states() const { return states_.size(); }
  void prefetch(u32 s) const { fetch(&states_[s]); }

  // Fetches what append(s, c) will read of a state s on its way: `states` are the latest states of a walk along the
  // suffix links, the newest first, which is fetched already. Goes one link on; returns whether there is one.
  bool prefetch_append(u32 (&states)[4], Token c) const {
    if (states[3] != kNone)  // its edge was fetched
      if (const u32 to = find(states[3], c); to != kNone) prefetch(to);
    if (states[2] != kNone) prefetch_edge(states[2], c);
    if (states[1] != kNone) prefetch_slot(states[1], c);
    for (int i = 3; i > 0; --i) states[i] = states[i - 1];
    if (states[1] == kNone) return states[2] != kNone || states[3] != kNone;
    const State& state = states_[states[1]];
    if (state.tok != kNoToken) prefetch(state.to);  // reached or compared with
    states[0] = state.link;
    if (states[0] != kNone) prefetch(states[0]);
    return true;
  }

  // Appends token c behind the text that ends in state `last`; `end` is the packed End behind c. Returns the new end.
  u32 append(u32 last, Token c, u32 end) {
    const u32 next = extend(last, c);
    touch(last, c, end);
    return next;
  }

  // State behind s by token c, or kNone.
  u32 find(u32 s, Token c) const {
    const State& state = states_[s];
    if (state.tok == c) return state.to;
    if (state.degree == 0) return kNone;
    const u32 e = find_edge(s, c);
    return e == kNone ? kNone : edges_[e].to;
  }

  // Longest suffix of the text that ends in `last` which was continued somewhere.
  u32 longest_continued(u32 last) const {
    u32 s = last;
    while (s != kRoot && states_[s].tok == kNoToken) s = states_[s].link;
    return s;
  }

  // Moves (state, len), a suffix of some text, behind token c; falls back to shorter suffixes as needed.
  void advance(u32& s, u32& len, Token c) const {
    for (;;) {
      const u32 q = find(s, c);
      if (q != kNone) {
        s = q;
        ++len;
        return;
      }
      if (s == kRoot) {
        len = 0;
        return;
      }
      s = states_[s].link;
      len = states_[s].len;
    }
  }

  // How many of the state's occurrences were continued, `best` of them by its inline edge: exact without further edges,
  // else its count less the end that asks; reads nothing but the state.
  static u32 continued(const State& s, u32 best) {
    if (s.degree == 0) return best;
    const u32 count = s.count;
    const u32 least = best + s.degree;
    return count > least ? count - 1 : least;
  }

  std::size_t memory_bytes() const {
    return states_.memory_bytes() + edges_.memory_bytes() + (table_.capacity + old_.capacity) * sizeof(u32);
  }

  // Throws SuffixError if a link or an edge does not lead where it must.
  void check_integrity() const {
    for (u32 s = 0; s < states_.size(); ++s) {
      const State& state = states_[s];
      if ((s == kRoot) != (state.link == kNone)) throw SuffixError("live: root and suffix links disagree");
      if (s != kRoot && states_[state.link].len >= state.len) throw SuffixError("live: suffix link to a longer state");
      for_each_edge(s, [&](Token c, u32 to) {
        if (states_[to].len < state.len + 1) throw SuffixError("live: edge to a shorter state");
        if (find(s, c) != to) throw SuffixError("live: edge is listed and not found");
      });
      if (state.tok != kNoToken && find(s, state.tok) != state.to) throw SuffixError("live: inline edge differs");
    }
  }

  template <typename F>
  void for_each_edge(u32 s, F&& f) const {
    const State& state = states_[s];
    if (state.degree <= kListMax && state.tok != kNoToken) f(state.tok, state.to);
    for (u32 e = state.head; e != kNone; e = edges_[e].next) f(edges_[e].tok, edges_[e].to);
  }

 private:
  static constexpr u32 kListMax = 4;
  static constexpr u32 kHashed = kListMax + 1;

  struct Edge {
    Token tok;
    u32 to;
    u32 next;
    u32 from;
  };
  // Open addressing over edge ids + 1; 0 is empty, so that calloc gives a table without touching it.
  struct Table {
    u32* slots = nullptr;
    u32 capacity = 0;
    u32 used = 0;
  };

  u32 extend(u32 last, Token c) {
    u32 q = find(last, c);
    if (q != kNone) return states_[q].len == states_[last].len + 1 ? q : split(last, q, c);
    State fresh;
    fresh.len = states_[last].len + 1;
    const u32 current = states_.push_back(fresh);
    u32 p = last;
    while (p != kNone && (q = find(p, c)) == kNone) {
      add_edge(p, c, current);
      p = states_[p].link;
    }
    if (p == kNone) {
      states_[current].link = kRoot;
    } else if (states_[q].len == states_[p].len + 1) {
      states_[current].link = q;
    } else {
      states_[current].link = split(p, q, c);
    }
    return current;
  }

  // The substrings of q up to the length of p's plus one get a state of their own.
  u32 split(u32 p, u32 q, Token c) {
    State copy = states_[q];
    copy.len = states_[p].len + 1;
    copy.tok = kNoToken;
    copy.to = kNone;
    copy.head = kNone;
    copy.degree = 0;
    const u32 clone = states_.push_back(copy);
    // The inline edge first: it is the most frequent one.
    const Token best = states_[q].tok;
    if (best != kNoToken) add_edge(clone, best, states_[q].to);
    for_each_edge(q, [&](Token tok, u32 to) {
      if (tok != best) add_edge(clone, tok, to);
    });
    states_[q].link = clone;
    while (p != kNone && redirect(p, c, q, clone)) p = states_[p].link;
    return clone;
  }

  // Makes p's edge by c lead to `to` if it leads to `from`.
  bool redirect(u32 p, Token c, u32 from, u32 to) {
    State& state = states_[p];
    if (state.tok == c) {
      if (state.to != from) return false;
      state.to = to;
      if (state.degree <= kListMax) return true;
    }
    const u32 e = find_edge(p, c);
    if (e == kNone || edges_[e].to != from) return false;
    edges_[e].to = to;
    return true;
  }

  // Counts one more occurrence behind every suffix of the text before c, and keeps the most frequent edge inline.
  void touch(u32 p, Token c, u32 end) {
    u32 previous = kNone;
    for (u32 n = 0; p != kNone && n < kTouchCap; ++n) {
      State& state = states_[p];
      const u32 target = state.tok == c ? state.to : edges_[find_edge(p, c)].to;
      if (target != previous) {
        State& reached = states_[target];
        reached.end = end;
        ++reached.count;
        previous = target;
      }
      if (state.tok != c && states_[target].count >= states_[state.to].count) promote(p, c, target);
      p = state.link;
    }
  }

  void promote(u32 p, Token c, u32 target) {
    State& state = states_[p];
    if (state.degree <= kListMax) {
      Edge& edge = edges_[find_edge(p, c)];
      edge.tok = state.tok;
      edge.to = state.to;
    }
    state.tok = c;
    state.to = target;
  }

  void add_edge(u32 p, Token c, u32 to) {
    State& state = states_[p];
    if (state.tok == kNoToken) {
      state.tok = c;
      state.to = to;
      return;
    }
    if (state.degree == kListMax) {  // from here on every edge is listed and hashed
      list_edge(p, state.tok, state.to);
      list_edge(p, c, to);
      for (u32 e = state.head; e != kNone; e = edges_[e].next) hash_edge(e);
      return;
    }
    list_edge(p, c, to);
    if (state.degree > kListMax) hash_edge(state.head);
  }

  void list_edge(u32 p, Token c, u32 to) {
    State& state = states_[p];
    state.head = edges_.push_back(Edge{c, to, state.head, p});
    state.degree = state.degree < kHashed ? state.degree + 1 : kHashed;
  }

  u32 find_edge(u32 p, Token c) const {
    const State& state = states_[p];
    if (state.degree <= kListMax) {
      for (u32 e = state.head; e != kNone; e = edges_[e].next)
        if (edges_[e].tok == c) return e;
      return kNone;
    }
    const u32 found = find_in(table_, p, c);
    return found != kNone || old_.slots == nullptr ? found : find_in(old_, p, c);
  }

  void prefetch_slot(u32 s, Token c) const {
    const State& state = states_[s];
    if (state.degree == 0 || state.tok == c) return;
    if (state.degree <= kListMax)
      fetch(&edges_[state.head]);
    else
      fetch(&table_.slots[static_cast<u32>(hash_of(s, c)) & (table_.capacity - 1)]);
  }

  void prefetch_edge(u32 s, Token c) const {
    const State& state = states_[s];
    if (state.degree <= kListMax || state.tok == c) return;
    const u32 slot = table_.slots[static_cast<u32>(hash_of(s, c)) & (table_.capacity - 1)];
    if (slot != 0) fetch(&edges_[slot - 1]);
  }

  static u64 hash_of(u32 p, Token c) { return mix64(static_cast<u64>(p) << 32 | static_cast<u32>(c)); }

  u32 find_in(const Table& table, u32 p, Token c) const {
    const u32 mask = table.capacity - 1;
    for (u32 i = static_cast<u32>(hash_of(p, c)) & mask;; i = (i + 1) & mask) {
      const u32 slot = table.slots[i];
      if (slot == 0) return kNone;
      const Edge& edge = edges_[slot - 1];
      if (edge.from == p && edge.tok == c) return slot - 1;
    }
  }

  void hash_edge(u32 e) {
    if ((table_.used + 1) * 10 > table_.capacity * 6) grow();
    insert(table_, e);
    for (int n = 0; n < 8 && old_.slots != nullptr; ++n) migrate_one();
  }

  void insert(Table& table, u32 e) {
    const u32 mask = table.capacity - 1;
    u32 i = static_cast<u32>(hash_of(edges_[e].from, edges_[e].tok)) & mask;
    while (table.slots[i] != 0) i = (i + 1) & mask;
    table.slots[i] = e + 1;
    ++table.used;
  }

  // Twice the room; the old entries move over eight at a time, so no append waits for all of them.
  void grow() {
    while (old_.slots != nullptr) migrate_one();
    old_ = table_;
    migrated_ = 0;
    const u32 capacity = old_.capacity == 0 ? 64 : old_.capacity * 2;
    table_ = Table{static_cast<u32*>(std::calloc(capacity, sizeof(u32))), capacity, 0};
    if (table_.slots == nullptr) throw std::bad_alloc();
  }

  void migrate_one() {
    while (migrated_ < old_.capacity && old_.slots[migrated_] == 0) ++migrated_;
    if (migrated_ < old_.capacity) insert(table_, old_.slots[migrated_++] - 1);
    if (migrated_ >= old_.capacity) {
      std::free(old_.slots);
      old_ = Table{};
    }
  }

  static_assert(sizeof(State) == 28);

  ChunkedArray<State, 9> states_;
  ChunkedArray<Edge, 8> edges_;
  Table table_, old_;
  u32 migrated_ = 0;
};

}  // namespace rl_accel::suffix
