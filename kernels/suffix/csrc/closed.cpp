#include "closed.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace rl_accel::suffix {
namespace {

constexpr char kMagic[8] = {'R', 'L', 'S', 'U', 'F', 'F', 'I', 'X'};
constexpr u32 kVersion = 1;
constexpr u32 kLittleEndian = 0x01020304;

struct Header {
  char magic[8];
  u32 version;
  u32 byte_order;
  u64 size;       // of the file, bytes
  u64 checksum;   // of everything behind the header, and of the header with this field zero
  u64 tokenizer;  // whose token ids these are
  i64 epoch;
  i64 policy_version;
  u64 num_problems;
  u64 num_rollouts;
  u64 num_tokens;
};
static_assert(sizeof(Header) == 80);

// The table, ordered by problem; offsets count 4-byte words from the end of the table.
struct Entry {
  u64 problem;
  u64 text_offset;
  u64 order_offset;
  u32 text_size;
  u32 order_size;
};
static_assert(sizeof(Entry) == 32);

u64 checksum_of(const unsigned char* data, std::size_t size) {
  // Four independent lanes of multiply-xor over 8-byte words: memory speed, and any changed bit changes the result.
  u64 lanes[4] = {0x9e3779b97f4a7c15ull, 0xc2b2ae3d27d4eb4full, 0x165667b19e3779f9ull, 0x85ebca77c2b2ae63ull};
  std::size_t i = 0;
  for (; i + 32 <= size; i += 32) {
    u64 words[4];
    std::memcpy(words, data + i, 32);
    for (int k = 0; k < 4; ++k) lanes[k] = (lanes[k] ^ words[k]) * 0x9fb21c651e98df25ull + 1;
  }
  for (; i < size; ++i) lanes[i & 3] = (lanes[i & 3] ^ data[i]) * 0x9fb21c651e98df25ull + 1;
  return mix64(mix64(mix64(mix64(lanes[0]) ^ lanes[1]) ^ lanes[2]) ^ lanes[3]) ^ size;
}

u64 checksum_of_file(const unsigned char* data, std::size_t size) {
  Header header;
  std::memcpy(&header, data, sizeof header);
  header.checksum = 0;
  return mix64(checksum_of(reinterpret_cast<const unsigned char*>(&header), sizeof header)) ^
         checksum_of(data + sizeof header, size - sizeof header);
}

const Header& header_of(const unsigned char* data) { return *reinterpret_cast<const Header*>(data); }

const Entry* table_of(const unsigned char* data) { return reinterpret_cast<const Entry*>(data + sizeof(Header)); }

ClosedProblem problem_at(const unsigned char* data, const Entry& entry) {
  const auto* words =
      reinterpret_cast<const u32*>(data + sizeof(Header) + header_of(data).num_problems * sizeof(Entry));
  return {{reinterpret_cast<const Token*>(words + entry.text_offset), entry.text_size},
          {words + entry.order_offset, entry.order_size}};
}

// Orders places by reversed context; a text begins with kStart, so no walk leaves it.
struct ByReversedContext {
  const Token* text;
  bool operator()(u32 a, u32 b) const {
    const u32 first_a = a, first_b = b;
    for (u32 k = 0; k < kMaxContext; ++k, --a, --b) {
      if (text[a] != text[b]) return text[a] < text[b];
      if (text[a] == kStart) break;
    }
    return first_a < first_b;
  }
};

[[noreturn]] void fail(const std::string& path, const std::string& why) {
  throw SuffixError("history " + path + ": " + why);
}

void read_all(int file, unsigned char* out, std::size_t size) {
  std::size_t done = 0;
  while (done < size) {
    const ssize_t n = ::read(file, out + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw SuffixError(std::strerror(errno));
    if (n == 0) throw SuffixError("truncated while it was read");
    done += static_cast<std::size_t>(n);
  }
}

void check_header(const Header& header, std::size_t size) {
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) throw SuffixError("not a segment (wrong magic)");
  if (header.version != kVersion || header.byte_order != kLittleEndian)
    throw SuffixError("format version " + std::to_string(header.version) + ", this build reads " +
                      std::to_string(kVersion));
  if (header.size != size)
    throw SuffixError("truncated: " + std::to_string(size) + " of " + std::to_string(header.size) + " bytes");
}

}  // namespace

std::vector<Token> heads_of(const ClosedProblem& problem) {
  std::vector<Token> heads;
  heads.reserve(problem.order.size() / kHeadStep + 1);
  for (std::size_t i = 0; i < problem.order.size(); i += kHeadStep) heads.push_back(problem.text[problem.order[i]]);
  return heads;
}

Search::Search(const ClosedProblem& problem, std::span<const Token> context)
    : text_(problem.text.data()),
      order_(problem.order.data()),
      heads_(problem.heads),
      context_(context.last(std::min<std::size_t>(context.size(), kMaxContext))),
      high_(static_cast<u32>(problem.order.size())) {
  begin_level();
}

// Looks for the places in [low, high) whose context goes on with the next token.
void Search::begin_level() {
  done_ = len_ == context_.size() || low_ == high_;
  if (done_) return;
  token_ = context_[context_.size() - 1 - len_];
  first_ = low_;
  last_ = high_;
  found_ = kNone;
  equal_ = false;
  if (len_ == 0 && !heads_.empty()) {
    const auto head = std::lower_bound(heads_.begin(), heads_.end(), token_);
    const auto k = static_cast<u32>(head - heads_.begin());
    if (k > 0) first_ = (k - 1) * kHeadStep + 1;
    if (head != heads_.end()) last_ = k * kHeadStep, equal_ = *head == token_;
  }
  look();
}

// Halves [first, last), or goes on where there is nothing left of it.
void Search::look() {
  if (first_ == last_ && found_ == kNone) {  // the lower bound
    if (!equal_) {
      done_ = true;
      return;
    }
    found_ = first_++;
    last_ = high_;
    if (len_ == 0 && !heads_.empty()) {
      const auto head = std::upper_bound(heads_.begin() + found_ / kHeadStep, heads_.end(), token_);
      const auto k = static_cast<u32>(head - heads_.begin());
      if (k > 0) first_ = std::max(first_, (k - 1) * kHeadStep + 1);
      if (head != heads_.end()) last_ = k * kHeadStep;
    }
  }
  if (first_ < last_) {
    at_ = first_ + (last_ - first_) / 2;
    fetch(&order_[at_]);
    return;
  }
  low_ = found_;
  high_ = first_;
  ++len_;
  if (token_ == kStart)
    done_ = true;
  else if (high_ - low_ == 1)
    compare_on();
  else
    begin_level();
}

void Search::step() {
  const Token token = text_[order_[at_] - len_];
  const bool before = found_ == kNone ? token < token_ : token <= token_;
  equal_ = before ? equal_ : token == token_;
  first_ = before ? at_ + 1 : first_;
  last_ = before ? last_ : at_;
  look();
}

// One place is left: how far do the texts agree?
void Search::compare_on() {
  const Token* place = text_ + order_[low_];
  while (len_ < context_.size()) {
    const Token token = context_[context_.size() - 1 - len_];
    if (*(place - len_) != token) break;
    ++len_;
    if (token == kStart) break;
  }
  done_ = true;
}

ClosedCursor Search::result() const {
  ClosedCursor cursor;
  if (len_ == 0) return cursor;
  cursor.len = len_;
  cursor.total = high_ - low_;
  cursor.num = std::min(cursor.total, ClosedCursor::kFollow);
  for (u32 i = 0; i < cursor.num; ++i) {
    const u64 offset = (static_cast<u64>(2 * i + 1) * cursor.total) / (2 * cursor.num);  // evenly spread
    cursor.next[i] = order_[low_ + static_cast<u32>(offset)] + 1;
    fetch(&text_[cursor.next[i]]);
  }
  return cursor;
}

ClosedCursor search(const ClosedProblem& problem, std::span<const Token> context) {
  Search search(problem, context);
  while (!search.done()) search.step();
  return search.result();
}

bool advance(ClosedCursor& cursor, const ClosedProblem& problem, Token token) {
  const bool sampled = cursor.total > ClosedCursor::kFollow;
  u32 kept = 0;
  for (u32 i = 0; i < cursor.num; ++i) {
    const u32 next = cursor.next[i];
    if (problem.text[next] != token) continue;
    // A rollout ends at the next kStart or at the end of the text.
    if (next + 1 < problem.text.size() && problem.text[next + 1] != kStart) cursor.next[kept++] = next + 1;
  }
  cursor.num = kept;
  ++cursor.len;
  if (!sampled) cursor.total = kept;
  return kept > 0 && !(sampled && kept < ClosedCursor::kFollow / 2);
}

Segment::Segment(std::size_t size)
    : size_(size), words_(new u64[(size + 7) / 8]), data_(reinterpret_cast<unsigned char*>(words_.get())) {}

std::shared_ptr<const Segment> Segment::build(i64 epoch, i64 policy_version, u64 tokenizer,
                                              std::vector<ProblemTexts> problems) {
  std::sort(problems.begin(), problems.end(),
            [](const ProblemTexts& a, const ProblemTexts& b) { return a.problem < b.problem; });
  std::vector<Entry> table;
  u64 words = 0, rollouts = 0, tokens = 0;
  for (const ProblemTexts& problem : problems) {
    u64 text = 0, order = 0;
    for (const auto& rollout : problem.rollouts) {
      text += rollout.size() + 1;
      order += rollout.size();
      tokens += rollout.size();
    }
    if (text > 0x7fffffffull) throw SuffixError("a problem has more than 2^31 tokens in one epoch");
    rollouts += problem.rollouts.size();
    table.push_back({problem.problem, words, words + text, static_cast<u32>(text), static_cast<u32>(order)});
    words += text + order;
  }
  std::shared_ptr<Segment> segment(new Segment(sizeof(Header) + table.size() * sizeof(Entry) + words * sizeof(u32)));
  unsigned char* data = segment->data_;
  Header header{{},    kVersion,       kLittleEndian, segment->size_, 0,     tokenizer,
                epoch, policy_version, table.size(),  rollouts,       tokens};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  std::memcpy(data, &header, sizeof header);
  if (!table.empty()) std::memcpy(data + sizeof header, table.data(), table.size() * sizeof(Entry));
  auto* body = reinterpret_cast<u32*>(data + sizeof header + table.size() * sizeof(Entry));
  for (std::size_t i = 0; i < problems.size(); ++i) {
    auto* text = reinterpret_cast<Token*>(body + table[i].text_offset);
    u32* order = body + table[i].order_offset;
    u32 at = 0, listed = 0;
    for (const auto& rollout : problems[i].rollouts) {
      text[at++] = kStart;
      for (const Token token : rollout) {
        order[listed++] = at - 1;
        text[at++] = token;
      }
    }
    std::sort(order, order + listed, ByReversedContext{text});
  }
  header.checksum = checksum_of_file(data, segment->size_);
  std::memcpy(data, &header, sizeof header);
  return segment;
}

std::shared_ptr<const Segment> Segment::open(const std::string& path, u64 tokenizer) {
  const int file =
      ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe without a writer would wait for one
  if (file < 0) fail(path, std::strerror(errno));
  std::shared_ptr<Segment> segment;
  try {
    struct stat info{};
    if (::fstat(file, &info) != 0) throw SuffixError(std::strerror(errno));
    if (!S_ISREG(info.st_mode)) throw SuffixError("not a file");
    Header header{};
    const auto size = static_cast<std::size_t>(info.st_size);
    if (size < sizeof header) throw SuffixError("too short to be a segment (" + std::to_string(size) + " bytes)");
    read_all(file, reinterpret_cast<unsigned char*>(&header), sizeof header);
    check_header(header, size);  // before memory is taken for what may be any file
    segment.reset(new Segment(size));
    std::memcpy(segment->data_, &header, sizeof header);
    read_all(file, segment->data_ + sizeof header, size - sizeof header);
    segment->validate(tokenizer);
  } catch (const SuffixError& error) {
    ::close(file);
    fail(path, error.what());
  } catch (...) {
    ::close(file);
    throw;
  }
  ::close(file);
  return segment;
}

std::shared_ptr<const Segment> Segment::copy(std::span<const unsigned char> bytes, u64 tokenizer,
                                             const std::string& origin) {
  try {
    if (bytes.size() < sizeof(Header))
      throw SuffixError("too short to be a segment (" + std::to_string(bytes.size()) + " bytes)");
    Header header;
    std::memcpy(&header, bytes.data(), sizeof header);
    check_header(header, bytes.size());
    std::shared_ptr<Segment> segment(new Segment(bytes.size()));
    std::memcpy(segment->data_, bytes.data(), bytes.size());
    segment->validate(tokenizer);
    return segment;
  } catch (const SuffixError& error) {
    fail(origin, error.what());
  }
}

void Segment::validate(u64 tokenizer) const {
  const Header& header = header_of(data_);
  check_header(header, size_);  // again: the file may have changed since
  if (checksum_of_file(data_, size_) != header.checksum) throw SuffixError("damaged (checksum differs)");
  if (header.tokenizer != tokenizer) throw SuffixError("written with another tokenizer");
  check_integrity();
}

void Segment::write(const std::string& path) const {
  const std::string temporary = path + ".tmp" + std::to_string(::getpid());
  const int file = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file < 0) fail(temporary, std::strerror(errno));
  std::size_t done = 0;
  while (done < size_) {
    const ssize_t n = ::write(file, data_ + done, size_ - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const std::string why = std::strerror(errno);
      ::close(file);
      ::unlink(temporary.c_str());
      fail(temporary, why);
    }
    done += static_cast<std::size_t>(n);
  }
  const bool synced = ::fsync(file) == 0;
  if ((::close(file) != 0) || !synced || ::rename(temporary.c_str(), path.c_str()) != 0) {
    const std::string why = std::strerror(errno);
    ::unlink(temporary.c_str());
    fail(path, why);
  }
}

i64 Segment::epoch() const { return header_of(data_).epoch; }
i64 Segment::policy_version() const { return header_of(data_).policy_version; }
u64 Segment::num_tokens() const { return header_of(data_).num_tokens; }
u64 Segment::num_rollouts() const { return header_of(data_).num_rollouts; }
u64 Segment::num_problems() const { return header_of(data_).num_problems; }
u64 Segment::checksum() const { return header_of(data_).checksum; }

std::size_t Segment::size_of(std::size_t num_problems, u64 num_rollouts, u64 num_tokens) {
  return sizeof(Header) + num_problems * sizeof(Entry) + (num_rollouts + 2 * num_tokens) * sizeof(u32);
}

bool Segment::find(u64 problem, ClosedProblem& out) const {
  const Entry* table = table_of(data_);
  const Entry* end = table + header_of(data_).num_problems;
  const Entry* entry = std::lower_bound(table, end, problem, [](const Entry& e, u64 key) { return e.problem < key; });
  if (entry == end || entry->problem != problem) return false;
  out = problem_at(data_, *entry);
  return true;
}

void Segment::check_integrity() const {
  const Header& header = header_of(data_);
  if (header.num_problems > (size_ - sizeof(Header)) / sizeof(Entry)) throw SuffixError("table beyond the end");
  const u64 words = (size_ - sizeof(Header) - header.num_problems * sizeof(Entry)) / sizeof(u32);
  const Entry* table = table_of(data_);
  for (u64 i = 0; i < header.num_problems; ++i) {
    const Entry& entry = table[i];
    if (i > 0 && table[i - 1].problem >= entry.problem) throw SuffixError("table is not in order");
    if (entry.text_offset > words || entry.text_size > words - entry.text_offset || entry.order_offset > words ||
        entry.order_size > words - entry.order_offset)
      throw SuffixError("problem beyond the end");
    const ClosedProblem problem = problem_at(data_, entry);
    if (problem.text.empty()) {
      if (!problem.order.empty()) throw SuffixError("order without a text");
      continue;
    }
    if (problem.text[0] != kStart) throw SuffixError("text does not begin with a start");
    for (const Token token : problem.text)
      if (token < kStart) throw SuffixError("negative token");
    for (const u32 place : problem.order)
      if (place + 1 >= problem.text.size() || place + 1 == 0 || problem.text[place + 1] == kStart)
        throw SuffixError("place without a continuation");
    const ByReversedContext before{problem.text.data()};
    for (std::size_t k = 1; k < problem.order.size(); ++k)
      if (!before(problem.order[k - 1], problem.order[k])) throw SuffixError("order is not in order");
  }
}

}  // namespace rl_accel::suffix
