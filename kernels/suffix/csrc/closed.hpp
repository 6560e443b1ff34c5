// The closed tier: the rollouts of one finished epoch, immutable, in one block of bytes that is the file as well.
//
// Per problem the text of its rollouts, each opened by kStart, and the places of that text ordered by the context that
// ends there, read backwards ("reversed-context suffix array"). Narrowing an interval by one context token after the
// other gives the longest match and the number of occurrences at every shorter length. 8 bytes a token.
//
// Immutable after construction, so any number of threads may read it. A file is read, not mapped: a mapped file that
// another node removes or cuts, as file systems of several nodes allow, would end the process.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common.hpp"

namespace rl_accel::suffix {

inline constexpr Token kStart = -1;     // opens every rollout in a text
inline constexpr u32 kMaxContext = 64;  // longest context that the order looks at

struct ClosedProblem {
  std::span<const Token> text;
  std::span<const u32>
      order;  // places i with a continuation text[i + 1], by reversed context text[i], text[i - 1], ...
  std::span<const Token> heads = {};  // text[order[i]] of every kHeadStep-th i, or none: so that few places are read
};

inline constexpr u32 kHeadStep = 16;
std::vector<Token> heads_of(const ClosedProblem& problem);

// The occurrences that a request follows in one closed problem.
struct ClosedCursor {
  static constexpr u32 kFollow = 8;
  std::array<u32, kFollow> next{};  // places of the next token
  u32 num = 0;
  u32 len = 0;    // tokens matched, kStart included
  u32 total = 0;  // occurrences when it was last searched
};

// Finds the longest suffix of `context` (at most kMaxContext tokens) in `problem`; `context` must stay. Each step reads
// one place: `prefetch` before it, for many searches in turn, lets them wait for memory together.
class Search {
 public:
  Search(const ClosedProblem& problem, std::span<const Token> context);
  bool done() const { return done_; }
  void prefetch() const { fetch(&text_[order_[at_] - len_]); }
  void step();
  ClosedCursor result() const;

 private:
  void begin_level();
  void look();
  void compare_on();

  const Token* text_;
  const u32* order_;
  std::span<const Token> heads_;
  std::span<const Token> context_;
  u32 low_ = 0, high_, len_ = 0;       // places [low, high) have the last `len` tokens of the context
  u32 first_ = 0, last_ = 0, at_ = 0;  // a bound is looked for in [first, last), next at `at`
  u32 found_ = kNone;                  // first place with the next token
  Token token_ = 0;
  bool equal_ = false, done_ = false;
};

ClosedCursor search(const ClosedProblem& problem, std::span<const Token> context);

// Moves the cursor behind `token`; returns false where it has to be searched again.
bool advance(ClosedCursor& cursor, const ClosedProblem& problem, Token token);

// The rollouts of one problem, as they go into a segment.
struct ProblemTexts {
  u64 problem;
  std::vector<std::span<const Token>> rollouts;
};

class Segment {
 public:
  // Sorts and packs; costs 0.1 to 0.2 us a token.
  static std::shared_ptr<const Segment> build(i64 epoch, i64 policy_version, u64 tokenizer,
                                              std::vector<ProblemTexts> problems);
  // Reads a file. Throws SuffixError if it is damaged, of another format, or of another tokenizer.
  static std::shared_ptr<const Segment> open(const std::string& path, u64 tokenizer);
  // Copies what `bytes` of another segment returned; `origin` is named in errors. Throws SuffixError as `open`.
  static std::shared_ptr<const Segment> copy(std::span<const unsigned char> bytes, u64 tokenizer,
                                             const std::string& origin);
  // Writes to a temporary file beside `path`, syncs and renames it. Throws SuffixError.
  void write(const std::string& path) const;
  std::span<const unsigned char> bytes() const { return {data_, size_}; }
  // Bytes of a segment with these problems.
  static std::size_t size_of(std::size_t num_problems, u64 num_rollouts, u64 num_tokens);

  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  i64 epoch() const;
  i64 policy_version() const;
  u64 num_tokens() const;
  u64 num_rollouts() const;
  u64 num_problems() const;
  u64 checksum() const;  // of all of it: what tells segments apart
  std::size_t memory_bytes() const { return size_; }
  bool find(u64 problem, ClosedProblem& out) const;
  // Throws SuffixError if a text, an order or the table is not as it must be.
  void check_integrity() const;

 private:
  explicit Segment(std::size_t size);
  void validate(u64 tokenizer) const;

  std::size_t size_;
  std::unique_ptr<u64[]> words_;  // for the alignment
  unsigned char* data_;
};

}  // namespace rl_accel::suffix
