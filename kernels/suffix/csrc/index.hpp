// The suffix index: which tokens are likely to follow, for all live requests of an engine at once.
//
// Two tiers: per problem one LiveAutomaton of the running epoch (live.hpp) and one reversed-context array per closed
// epoch (closed.hpp). A request keeps its end state in the automaton and the occurrences that it follows in each closed
// epoch, so nothing is matched twice. A draft is read position by position: every source predicts a token, the odds of
// equal predictions add up (scoring.hpp), the best token goes on, sources that predicted otherwise fall back or drop
// out.
//
// Thread rules: every public method takes one mutex; none needs Python's lock. Cost per request and step: a few cache
// misses to append and to match, then one load per draft token and source. Figures: scripts/bench_suffix.py.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "closed.hpp"
#include "live.hpp"
#include "readers.hpp"
#include "scoring.hpp"

namespace rl_accel::suffix {

inline constexpr u32 kMaxDraft = 128;  // vLLM verifies no more
inline constexpr u32 kMaxClosed = 8;
inline constexpr u32 kPromptSequence = 0;  // name of the prompt among a problem's sequences

struct IndexOptions {
  u64 tokenizer = 0;               // fingerprint of the tokenizer whose ids are indexed
  u32 max_draft = 32;              // tokens of the longest draft
  u32 max_closed = kMaxClosed;     // closed epochs that a request looks into, newest first
  float min_probability = .001f;   // a draft ends where its path is less likely than this
  std::vector<Token> stop_tokens;  // nothing is drafted behind these
  u32 cross_tokens = 1u << 18;     // size of each of the two generations of the index over all problems; 0: none
  u64 max_bytes = u64{1} << 62;    // of everything that the index holds, see budget.cpp
};

// What a batch of drafts looks like; row i is [offsets[i], offsets[i + 1]).
struct Drafts {
  std::vector<Token> tokens;
  std::vector<u32> offsets;
  std::vector<float> paths;  // probability that the draft is right up to and with this token
};

struct SegmentInfo {
  i64 epoch;
  i64 policy_version;
  u64 num_problems, num_rollouts, num_tokens, num_bytes;
  u64 checksum = 0;
  bool foreign = false;  // made by another engine
  bool shared = false;   // nobody else has to be given it
};

// Drafted and accepted tokens by source and match length of a draft's first token.
struct SourceStats {
  u64 drafts = 0, drafted = 0, accepted = 0;
};

struct IndexStats {
  std::array<std::array<SourceStats, kNumLengths>, kNumSources> by_source{};
  u64 request_steps = 0;      // request-steps that were told of new tokens
  u64 candidates = 0;         // tokens that could have been drafted
  double expected_first = 0;  // sum of the probabilities of first candidates
  double expected_all = 0;    // sum of the probabilities of all candidate paths
  // What the memory had no place for; see budget.cpp.
  u64 problems_renewed = 0, requests_let_go = 0, segments_dropped = 0, rollouts_lost = 0;
};

struct Inspection {
  u32 live_len, live_count;
  std::vector<i64> epochs;
  std::vector<u32> closed_len, closed_total;
};

class SuffixIndex {
 public:
  explicit SuffixIndex(IndexOptions options);

  i64 begin(u64 problem, std::span<const Token> prompt);
  // Ends a request; with `keep` its tokens enter the history when the epoch is closed.
  void end(i64 handle, bool keep);

  // Takes the new tokens of each request, then drafts up to max_draft_tokens[i] tokens whose path probability is at
  // least min_path_probs[i]. `capture_sizes`, ascending: sizes that (requests + drafts) should fill, the last one is
  // the limit; empty: no limit. The gain of a draft token is probability / threshold - 1; where the gains of all sum to
  // less than `break_even_gain`, what verifying drafts costs at all, none is drafted. A request may be named once.
  Drafts propose(std::span<const i64> handles, std::span<const Token> tokens, std::span<const u32> offsets,
                 std::span<const u32> max_draft_tokens, std::span<const float> min_path_probs,
                 std::span<const u32> capture_sizes, float break_even_gain = 0);
  // The same, reading each request's tokens (prompt first) from row rows[i] of a matrix with `stride` columns.
  Drafts propose_rows(std::span<const i64> handles, const Token* matrix, std::size_t stride, std::span<const u32> rows,
                      std::span<const u32> num_tokens, std::span<const u32> max_draft_tokens,
                      std::span<const float> min_path_probs, std::span<const u32> capture_sizes,
                      float break_even_gain = 0);

  // Packs the kept rollouts that ended into immutable segments of the running epoch; describes them as one.
  SegmentInfo pack();
  // The same under this epoch's number; the next one is running then.
  SegmentInfo close_epoch(i64 epoch, i64 policy_version);
  // Says which epoch is running; the ages of past ones count from it.
  void begin_epoch(i64 epoch);
  void drop_before(i64 epoch);
  std::vector<SegmentInfo> segments() const;
  void write_segment(std::size_t i, const std::string& path) const;
  // Both take a segment unless it is held already; where memory is short older ones go, or this one.
  SegmentInfo open_segment(const std::string& path, bool foreign = false, bool shared = true);
  SegmentInfo add_segment(std::span<const unsigned char> bytes);
  // Returns a segment that other engines have not been given yet, or none; it counts as given then.
  std::shared_ptr<const Segment> take_unshared();
  // Counts all segments as given: there is nobody to give them to.
  void share_with_nobody();

  std::size_t live_bytes() const;
  std::size_t closed_bytes() const;
  std::size_t cross_bytes() const;
  u64 live_tokens() const;
  void check_integrity() const;
  Inspection inspect(i64 handle) const;
  IndexStats take_stats();
  std::vector<float> scoring_state() const;
  // Throws SuffixError if it is not what scoring_state returned.
  void load_scoring_state(std::span<const float> state);
  float reliability(Source source) const;
  const IndexOptions& options() const { return options_; }

 private:
  struct Attached {
    std::shared_ptr<const Segment> segment;
    ClosedProblem problem;
    std::vector<Token> heads;  // of the problem
  };
  struct Sequence {
    std::vector<Token> tokens;  // kStart first
    bool kept = false, ended = false, archived = false;
  };
  struct Problem {
    u64 key = 0;
    LiveAutomaton automaton;
    std::vector<Token> prompt;
    u32 prompt_state = LiveAutomaton::kRoot;
    std::vector<Sequence> sequences;
    std::vector<Attached> closed;
    u32 num_live = 0;
    bool no_prompt = false;                       // it had one that was given up
    bool idle = false;                            // without requests; waits to be packed
    bool leaving = false;                         // its requests are being let go
    std::size_t text_bytes = 0, heads_bytes = 0;  // of all sequences, of `closed`
    std::size_t counted = 0;                      // its part of `live_`
    std::vector<u32> renamed;                     // while it is renewed: the new numbers of its sequences
  };
  struct Held {
    std::shared_ptr<const Segment> segment;
    bool foreign, shared;
  };
  struct Cross {
    LiveAutomaton automaton;
    std::vector<Token> text;  // every rollout behind a kStart; ends in the automaton are places in it
    u64 generation = 0;
    std::size_t memory_bytes() const { return automaton.memory_bytes() + text.capacity() * sizeof(Token); }
  };
  struct CrossCursor {
    u64 generation = 0;
    u32 state = LiveAutomaton::kRoot, len = 0;
  };
  struct Vote {
    u32 cell;
    Token token;
  };
  struct Request {
    Problem* problem = nullptr;
    u32 sequence = 0;
    u32 last = 0;          // state of its whole text
    u32 num_consumed = 0;  // tokens, prompt included
    u32 num_fresh = 0;     // of them, those that came last
    u32 handle_generation = 0;
    std::vector<ClosedCursor> cursors;  // one per attached segment
    CrossCursor cross[2];
    // The draft that waits for its verdict.
    u32 num_candidates = 0, num_votes = 0, num_admitted = 0;
    u32 lead_cell = 0;  // of the strongest vote for the first token
    Vote votes[kMaxVotes];
    Token path[kMaxDraft];
    float paths[kMaxDraft];
    u8 scores[kMaxDraft];

    // What learning from a short answer and writing a short draft need.
    void prefetch() const {
      const char* bytes = reinterpret_cast<const char*>(this);
      for (std::size_t at = 0; at < offsetof(Request, path) + 128; at += 64) fetch(bytes + at);
      for (const void* at :
           {static_cast<const void*>(paths), static_cast<const void*>(paths + 16), static_cast<const void*>(scores)})
        fetch(at);
    }
  };

  struct Reading;
  static constexpr u32 kTogether = 32;  // requests that take turns, so that they wait for memory together

  static constexpr u32 kWalk = 8;  // suffix links that are fetched ahead

  void check_requests() const;
  void check_sums() const;
  static std::span<const Token> text_at(const Problem& problem, u32 end);
  static std::span<const Token> text_at(const Cross& cross, u32 end);
  Request& request(i64 handle);
  const Request& request(i64 handle) const { return const_cast<SuffixIndex*>(this)->request(handle); }
  Problem& new_problem(u64 key, std::span<const Token> prompt);
  void attach_segments(Problem& problem);
  void enter(Request& request, std::span<const Token> prompt);
  void forget_if_idle(Problem& problem);
  void erase(Problem& problem);
  static bool waits(const Sequence& s) { return s.kept && s.ended && !s.archived; }
  void learn(Request& request, std::span<const Token> tokens);
  void take(Request& request, std::span<const Token> tokens);
  void start(Reading& reading, Request& request, u32 cap, float floor) const;
  bool read(Reading& reading);
  bool read_token(Reading& reading);
  void draft(std::size_t first, std::size_t last, std::span<const u32> max_draft_tokens,
             std::span<const float> min_path_probs, float below);
  void admit(std::span<Request*> requests, std::span<const float> min_path_probs, std::span<const u32> capture_sizes,
             float break_even_gain);
  Drafts emit(std::span<Request*> requests) const;
  static void forget_draft(Request& request);
  void finish_searches();
  template <typename F>
  void prefetch(std::size_t first, std::size_t last, F&& fresh_of);
  template <typename F>
  Drafts run(std::span<const i64> handles, F&& fresh_of, std::span<const u32> max_draft_tokens,
             std::span<const float> min_path_probs, std::span<const u32> capture_sizes, float break_even_gain);
  void new_cross();
  void feed_cross(u32 budget);
  void queue_cross(std::span<const Token> tokens);
  void pop_cross();

  SegmentInfo pack_ended(i64 epoch, i64 policy_version);
  void pack_texts(SegmentInfo& all, std::vector<ProblemTexts>& texts);
  SegmentInfo add(std::shared_ptr<const Segment> segment, bool foreign, bool shared);
  static SegmentInfo describe(const Segment& segment, bool foreign, bool shared);

  // The memory bound; budget.cpp.
  static constexpr std::size_t kBytesPerToken = 160;  // more than a new token of the live tier takes
  std::size_t max_live() const;
  std::size_t max_cross() const { return options_.max_bytes / 32; }  // of a generation, and of the queue
  std::size_t max_slice() const;
  std::size_t cross_size() const;
  std::size_t closed_room() const;
  std::size_t bytes_of(const Problem& problem) const;
  bool takes_prompt(std::span<const Token> prompt) const;
  Problem& place_for(u64 key, std::span<const Token> prompt);
  void count(Problem& problem);
  template <typename F>
  void make_place(F&& fresh_of);
  void settle();
  void give_up(std::size_t need);
  std::vector<Problem*> largest_first() const;
  void begin_renewal(Problem& problem);
  void finish_renewals();
  void let_go(Request& request);
  std::list<Held>::iterator oldest();
  void drop(std::list<Held>::iterator held);

  bool is_stop(Token token) const {
    return std::find(options_.stop_tokens.begin(), options_.stop_tokens.end(), token) != options_.stop_tokens.end();
  }

  IndexOptions options_;
  Scoring scoring_;
  mutable std::mutex mutex_;
  std::unordered_map<u64, std::unique_ptr<Problem>> problems_;
  std::vector<std::unique_ptr<Request>> requests_;
  std::vector<u32> free_;
  std::list<Held> segments_;         // newest epoch first
  i64 epoch_ = 0;                    // the running one
  i64 policy_version_ = 0;           // at the last close
  Problem limbo_;                    // of requests that are no longer followed
  std::size_t live_ = 0;             // bytes of all problems
  std::size_t idle_ = 0;             // of them, those that packing frees
  std::size_t closed_ = 0;           // bytes of all segments
  std::unique_ptr<Cross> cross_[2];  // young, old
  u64 cross_generation_ = 0;
  std::list<std::vector<Token>> cross_queue_;  // ended rollouts on their way into the young generation
  std::size_t cross_queue_at_ = 0, cross_queue_bytes_ = 0;
  u32 cross_last_ = LiveAutomaton::kRoot;
  IndexStats stats_;
  std::vector<Request*> batch_;
  std::vector<std::pair<Request*, u32>> unsearched_;  // cursors that have lost what they followed
  std::vector<float> ratios_;
};

}  // namespace rl_accel::suffix
