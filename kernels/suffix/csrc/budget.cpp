// The memory bound: problems, segments and the index over all problems stay within IndexOptions::max_bytes together.
//
//   part of max_bytes     holds                            where it does not suffice
//   1/2, and what         problems with requests, or with  ended rollouts are packed, which takes an eighth and goes on
//   segments leave        ended rollouts that wait         being drafted from; then the largest problems forget what
//                                                          their running requests have said so far ("renewed"); then
//                                                          the requests of the largest problems are let go: no longer
//                                                          followed, not drafted for, not kept
//   1/32 and 2 x 1/16     rollouts on their way into the   the oldest rollouts go; a generation of it ends early
//                         index over all problems, and it
//   1/16                  a slice that is being packed     rollouts that do not fit are lost
//   the rest              segments                         the oldest epoch goes, a segment at a time, others' first
//
// It holds whenever a call returns. Within a call a step's tokens are added before they are counted; `kBytesPerToken`
// is set aside for each. Not counted: 2 KB for each request that ran at once. Every problem keeps its own sum, renewed
// where it changes, so a step costs one comparison; a quarter is given up at once, so that searching for it is rare.
#include <algorithm>

#include "index.hpp"

namespace rl_accel::suffix {
namespace {

constexpr std::size_t kBytesPerProblem = 20 << 10;  // its first chunks
constexpr std::size_t kBytesPerRequest = 256;       // of a problem that is there
constexpr u64 kMaxSlice = 64 << 20;  // about 0.5 s of packing, and what one message to another engine holds
constexpr u64 kMaxIdle = 128 << 20;  // ended rollouts are packed in time, before memory is short

}  // namespace

std::size_t SuffixIndex::max_live() const {
  const std::size_t others = closed_ + max_slice() + (options_.cross_tokens > 0 ? 5 * max_cross() : 0);
  return std::max(options_.max_bytes / 2, options_.max_bytes - std::min<std::size_t>(others, options_.max_bytes));
}

std::size_t SuffixIndex::max_slice() const { return std::min(options_.max_bytes / 16, kMaxSlice); }

std::size_t SuffixIndex::cross_size() const {
  std::size_t bytes = cross_queue_bytes_;
  for (const auto& cross : cross_)
    if (cross) bytes += cross->memory_bytes();
  return bytes;
}

std::size_t SuffixIndex::closed_room() const {
  const std::size_t others = live_ + cross_size() + max_slice();
  return options_.max_bytes - std::min<std::size_t>(others, options_.max_bytes);
}

std::size_t SuffixIndex::bytes_of(const Problem& problem) const {
  return sizeof(Problem) + 64 + problem.automaton.memory_bytes() + problem.prompt.capacity() * sizeof(Token) +
         problem.sequences.capacity() * sizeof(Sequence) + problem.closed.capacity() * sizeof(Attached) +
         problem.heads_bytes + problem.text_bytes;
}

void SuffixIndex::count(Problem& problem) {
  const std::size_t bytes = bytes_of(problem);
  live_ += bytes - problem.counted;
  if (problem.idle) idle_ += bytes - problem.counted;
  problem.counted = bytes;
}

// A prompt that would take most of the memory is not looked into.
bool SuffixIndex::takes_prompt(std::span<const Token> prompt) const {
  return kBytesPerToken * prompt.size() <= max_live() / 4;
}

// Returns the problem of a new request, made if need be, or limbo where memory has no place for it.
SuffixIndex::Problem& SuffixIndex::place_for(u64 key, std::span<const Token> prompt) {
  for (const bool again : {false, true}) {
    const auto found = problems_.find(key);
    Problem* known = found == problems_.end() ? nullptr : found->second.get();
    const bool asked = known && std::equal(prompt.begin(), prompt.end(), known->prompt.begin(), known->prompt.end());
    const std::size_t need = (known ? kBytesPerRequest : kBytesPerProblem) +
                             (asked || !takes_prompt(prompt) ? 0 : kBytesPerToken * prompt.size());
    if (live_ + need <= max_live()) {
      if (known == nullptr) return new_problem(key, prompt);
      if (known->idle) idle_ -= known->counted, known->idle = false;
      return *known;
    }
    if (!again) give_up(need);
  }
  ++stats_.requests_let_go;
  return limbo_;
}

// Restores the bound; called where memory was added.
void SuffixIndex::settle() {
  if (idle_ > std::min(options_.max_bytes / 4, kMaxIdle)) pack_ended(epoch_, policy_version_);
  if (live_ > max_live()) give_up(0);
  while (!segments_.empty() && closed_ > closed_room()) {
    drop(oldest());
    ++stats_.segments_dropped;
  }
}

// Shrinks the live tier until `need` more bytes leave a quarter of its share free.
void SuffixIndex::give_up(std::size_t need) {
  pack_ended(epoch_, policy_version_);
  const std::size_t target = max_live() / 4 * 3;
  const auto fits = [&](std::size_t less) { return live_ - less + need <= target; };
  if (fits(0)) return;
  for (Problem* problem : largest_first()) {
    begin_renewal(*problem);
    if (fits(0)) break;
  }
  finish_renewals();
  if (fits(0)) return;
  std::size_t leaving = 0;
  for (Problem* problem : largest_first()) {
    problem->leaving = true;
    if (fits(leaving += problem->counted)) break;
  }
  for (const auto& r : requests_)
    if (r->problem != nullptr && r->problem->leaving) let_go(*r);
}

std::vector<SuffixIndex::Problem*> SuffixIndex::largest_first() const {
  std::vector<Problem*> out;
  for (const auto& [key, problem] : problems_) out.push_back(problem.get());
  std::sort(out.begin(), out.end(), [](const Problem* a, const Problem* b) {
    return a->counted != b->counted ? a->counted > b->counted : a->key < b->key;
  });
  return out;
}

// Forgets the automaton, the prompt and ended rollouts; what those requests say next is learned from anew, and what was
// packed is looked into. Until `finish_renewals` its requests have their old numbers.
void SuffixIndex::begin_renewal(Problem& problem) {
  std::vector<Sequence> running(1);  // the first one stands for the prompt
  problem.renamed.assign(problem.sequences.size(), 0);
  problem.text_bytes = 0;
  for (std::size_t i = 1; i < problem.sequences.size(); ++i) {
    if (problem.sequences[i].ended) continue;
    problem.renamed[i] = static_cast<u32>(running.size());
    problem.text_bytes += problem.sequences[i].tokens.capacity() * sizeof(Token);
    running.push_back(std::move(problem.sequences[i]));
  }
  problem.sequences = std::move(running);
  problem.automaton.clear();
  problem.no_prompt |= !problem.prompt.empty();
  problem.prompt = {};
  problem.prompt_state = LiveAutomaton::kRoot;
  attach_segments(problem);
  count(problem);
  ++stats_.problems_renewed;
}

void SuffixIndex::finish_renewals() {
  for (const auto& r : requests_) {
    if (r->problem == nullptr || r->problem->renamed.empty()) continue;
    Problem& problem = *r->problem;
    r->sequence = problem.renamed[r->sequence];
    r->last = LiveAutomaton::kRoot;
    r->cursors.clear();
    const std::vector<Token>& text = problem.sequences[r->sequence].tokens;
    for (const Attached& closed : problem.closed) r->cursors.push_back(search(closed.problem, text));
  }
  for (const auto& [key, problem] : problems_) problem->renamed = {};
}

// The request goes on without being followed.
void SuffixIndex::let_go(Request& r) {
  Problem& problem = *r.problem;
  if (&problem == &limbo_) return;
  Sequence& sequence = problem.sequences[r.sequence];
  problem.text_bytes -= sequence.tokens.capacity() * sizeof(Token);
  sequence = Sequence{};
  sequence.ended = true;
  r.problem = &limbo_;
  r.sequence = 0;
  r.last = LiveAutomaton::kRoot;
  r.cursors.clear();
  for (CrossCursor& cross : r.cross) cross = CrossCursor{};
  ++limbo_.num_live;
  ++stats_.requests_let_go;
  --problem.num_live;
  count(problem);
  forget_if_idle(problem);
}

std::list<SuffixIndex::Held>::iterator SuffixIndex::oldest() {
  const auto last = std::prev(segments_.end());
  for (auto at = last;; --at) {
    if (at->segment->epoch() != last->segment->epoch()) break;
    if (at->foreign) return at;
    if (at == segments_.begin()) break;
  }
  return last;
}

// Forgets a segment, also for the requests that look into it.
void SuffixIndex::drop(std::list<Held>::iterator held) {
  const Segment* segment = held->segment.get();
  const auto place = [&](const Problem& problem) {
    return std::find_if(problem.closed.begin(), problem.closed.end(),
                        [&](const Attached& a) { return a.segment.get() == segment; }) -
           problem.closed.begin();
  };
  for (const auto& r : requests_)
    if (r->problem != nullptr)
      if (const auto i = place(*r->problem); i < std::ssize(r->cursors)) r->cursors.erase(r->cursors.begin() + i);
  for (const auto& [key, problem] : problems_) {
    const auto i = place(*problem);
    if (i == std::ssize(problem->closed)) continue;
    problem->heads_bytes -= problem->closed[static_cast<std::size_t>(i)].heads.capacity() * sizeof(Token);
    problem->closed.erase(problem->closed.begin() + i);
    count(*problem);
  }
  closed_ -= segment->memory_bytes();
  segments_.erase(held);
}

}  // namespace rl_accel::suffix
