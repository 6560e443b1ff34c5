// Drives the suffix index without Python, for runs under sanitizers. Everything random comes from the seed.
//
//   suffix_driver random SEED SECONDS FOLDER    random calls, checked against what drafts must be like
//   suffix_driver extreme FOLDER                a text beyond 2^20 tokens, more than 4096 requests in one problem
//   suffix_driver files SEED SECONDS FOLDER     changed segment files with the right checksum
//   suffix_driver threads SEED SECONDS FOLDER   four threads on one index
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "index.hpp"

using namespace rl_accel::suffix;

namespace {

using Random = std::mt19937_64;
using Clock = std::chrono::steady_clock;

u32 below(Random& random, u32 n) { return static_cast<u32>(random() % n); }

template <typename T>
const T& any(Random& random, const std::vector<T>& of) {
  return of[below(random, static_cast<u32>(of.size()))];
}

void require(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

template <typename F>
bool refused(F&& call) {
  try {
    call();
  } catch (const SuffixError&) {
    return true;
  }
  return false;
}

Clock::time_point after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

Drafts feed(SuffixIndex& index, i64 handle, std::span<const Token> tokens, u32 cap, float threshold = 0) {
  const std::vector<u32> offsets{0, static_cast<u32>(tokens.size())}, max_draft_tokens{cap};
  return index.propose(std::vector<i64>{handle}, tokens, offsets, max_draft_tokens, std::vector<float>{threshold}, {});
}

struct Live {
  i64 handle;
  std::vector<Token> text;  // prompt first
  std::size_t told = 0;
  std::vector<Token> draft;
};

class RandomRun {
 public:
  RandomRun(u64 seed, std::string folder)
      : random_(seed),
        folder_(std::move(folder)),
        alphabet_(any(random_, std::vector<u32>{1, 2, 3, 5, 40, 5000})),
        problems_(any(random_, std::vector<u32>{1, 2, 7, 60})),
        index_(options()) {}

  void run(u32 steps) {
    for (u32 step = 0; step < steps; ++step) {
      const u32 action = below(random_, 100);
      if (action < 12 || live_.empty())
        begin();
      else if (action < 19)
        end();
      else if (action < 22)
        close();
      else if (action < 23)
        index_.drop_before(epoch_ - below(random_, 4));
      else if (action < 24)
        segments();
      else if (action < 25)
        misuse();
      else
        propose();
      if (step % 64 == 0) index_.check_integrity();
      most_ = std::max(most_, live_.size());
      require(index_.live_bytes() + index_.closed_bytes() + index_.cross_bytes() <=
                  index_.options().max_bytes + 2048 * most_,
              "memory is bounded");
    }
    while (!live_.empty()) end();
    index_.close_epoch(epoch_, 0);
    index_.check_integrity();
    require(index_.live_tokens() == 0, "nothing is live any more");
    require(index_.live_bytes() < 1 << 24, "live memory is given back");
  }

 private:
  IndexOptions options() {
    IndexOptions out;
    out.tokenizer = 5;
    out.max_draft = 1 + below(random_, kMaxDraft);
    out.max_closed = 1 + below(random_, kMaxClosed);
    out.min_probability = any(random_, std::vector<float>{0.f, 1e-6f, 1e-3f, .2f});
    out.cross_tokens = any(random_, std::vector<u32>{0, 1, 8, 64, 1 << 12});
    if (below(random_, 2)) out.max_bytes = any(random_, std::vector<u64>{0, 30 << 10, 300 << 10, 3 << 20, 30 << 20});
    if (below(random_, 2)) out.stop_tokens = {0};
    return out;
  }

  Token token() {
    const u32 rare = below(random_, alphabet_);
    return static_cast<Token>(below(random_, 3) ? std::min(rare, alphabet_ / 4) : rare);
  }

  std::vector<Token> tokens(u32 n) {
    std::vector<Token> out(n);
    const bool constant = below(random_, 4) == 0;
    const Token first = token();
    for (Token& t : out) t = constant ? first : token();
    return out;
  }

  void begin() {
    const u64 problem = below(random_, problems_);
    std::vector<Token> prompt(problem % 3, 1);
    if (below(random_, 5) == 0) prompt = tokens(below(random_, 20));
    live_.push_back({index_.begin(problem, prompt), prompt, prompt.size(), {}});
  }

  void end() {
    const u32 i = below(random_, static_cast<u32>(live_.size()));
    const i64 handle = live_[i].handle;
    index_.end(handle, below(random_, 3) > 0);
    require(refused([&] { index_.end(handle, true); }), "an ended handle is refused");
    live_.erase(live_.begin() + i);
  }

  void close() { index_.close_epoch(below(random_, 3) ? epoch_++ : epoch_, below(random_, 9)); }

  void segments() {
    const auto infos = index_.segments();
    require(refused([&] { index_.write_segment(infos.size(), folder_ + "/none"); }), "no such segment");
    if (infos.empty()) return;
    const u32 i = below(random_, static_cast<u32>(infos.size()));
    const std::string path = folder_ + "/segment";
    index_.write_segment(i, path);
    if (below(random_, 2)) index_.drop_before(infos[i].epoch);
    const SegmentInfo info = index_.open_segment(path, below(random_, 2), below(random_, 2));
    require(info.num_tokens == infos[i].num_tokens && info.num_bytes == infos[i].num_bytes,
            "a file is what was written");
    SuffixIndex other(IndexOptions{});
    require(refused([&] { other.open_segment(path); }), "another tokenizer is refused");
    ::unlink(path.c_str());
    share();
    std::vector<float> state = index_.scoring_state();
    index_.load_scoring_state(state);
    state[below(random_, static_cast<u32>(state.size()))] = -1;
    require(refused([&] { index_.load_scoring_state(state); }), "impossible counts are refused");
    index_.take_stats();
  }

  // Another index of as little memory takes what this one has made.
  void share() {
    IndexOptions options = index_.options();
    SuffixIndex other(options);
    u32 given = 0;
    while (const auto segment = index_.take_unshared()) {
      std::vector<unsigned char> bytes(segment->bytes().begin(), segment->bytes().end());
      const SegmentInfo info = other.add_segment(bytes);
      require(info.foreign && info.checksum == segment->checksum(), "a segment arrives whole");
      other.add_segment(bytes);
      bytes[below(random_, static_cast<u32>(bytes.size()))] ^= 4;
      require(refused([&] { other.add_segment(bytes); }), "a damaged one does not");
      ++given;
    }
    require(other.segments().size() <= given, "nothing is taken twice");
    other.check_integrity();
    for (const SegmentInfo& info : index_.segments()) require(info.shared, "and is given once");
    if (below(random_, 2)) index_.share_with_nobody();
  }

  void misuse() {
    const Live& r = any(random_, live_);
    const std::vector<Token> bad{1, 1, -1 - static_cast<Token>(below(random_, 9))};
    const auto before = index_.live_tokens();
    require(refused([&] { feed(index_, r.handle, bad, 3); }), "negative tokens are refused");
    require(refused([&] { index_.begin(1, bad); }), "negative prompts are refused");
    require(refused([&] { feed(index_, r.handle + (1ll << 33), {}, 3); }), "unknown handles are refused");
    require(index_.live_tokens() == before, "what was refused leaves nothing behind");
  }

  void propose() {
    std::vector<u32> chosen;
    for (u32 i = 0; i < live_.size(); ++i)
      if (below(random_, 4)) chosen.push_back(i);
    std::shuffle(chosen.begin(), chosen.end(), random_);
    const std::size_t n = chosen.size();
    std::vector<i64> handles;
    std::vector<Token> fresh;
    std::vector<u32> offsets{0}, max_draft_tokens, capture_sizes, rows, sizes;
    std::vector<float> min_path_probs;
    std::size_t columns = 0;
    for (const u32 i : chosen) {
      Live& r = live_[i];
      handles.push_back(r.handle);
      if (below(random_, 10)) {  // some of the draft was right
        const u32 right = below(random_, static_cast<u32>(r.draft.size()) + 1);
        r.text.insert(r.text.end(), r.draft.begin(), r.draft.begin() + right);
        const auto more = tokens(below(random_, 50) ? 1 : 1 + below(random_, 300));
        r.text.insert(r.text.end(), more.begin(), more.end());
      }
      fresh.insert(fresh.end(), r.text.begin() + static_cast<std::ptrdiff_t>(r.told), r.text.end());
      offsets.push_back(static_cast<u32>(fresh.size()));
      max_draft_tokens.push_back(below(random_, 200));
      min_path_probs.push_back(any(random_, std::vector<float>{0.f, .01f, .3f, .9f, 1.f, 1.5f}));
      columns = std::max(columns, r.text.size());
      r.told = r.text.size();
    }
    if (below(random_, 2))
      for (u32 k = 0, size = below(random_, 9); k < 1 + below(random_, 5); ++k, size += 1 + below(random_, 60))
        capture_sizes.push_back(size);
    Drafts drafts;
    if (below(random_, 2)) {
      drafts = index_.propose(handles, fresh, offsets, max_draft_tokens, min_path_probs, capture_sizes);
    } else {  // the same from a matrix with stale values behind each text
      std::vector<Token> matrix((n + 1) * columns, -7);
      for (std::size_t i = 0; i < n; ++i) {
        rows.push_back(static_cast<u32>(n - i));
        sizes.push_back(static_cast<u32>(live_[chosen[i]].text.size()));
        std::copy(live_[chosen[i]].text.begin(), live_[chosen[i]].text.end(),
                  matrix.begin() + static_cast<std::ptrdiff_t>((n - i) * columns));
      }
      drafts = index_.propose_rows(handles, matrix.data(), columns, rows, sizes, max_draft_tokens, min_path_probs,
                                   capture_sizes);
    }
    require(drafts.offsets.size() == n + 1 && drafts.offsets[n] == drafts.tokens.size(), "offsets fit");
    require(drafts.paths.size() == drafts.tokens.size(), "a probability for each token");
    for (std::size_t i = 0; i < n; ++i) {
      Live& r = live_[chosen[i]];
      const u32 first = drafts.offsets[i], last = drafts.offsets[i + 1];
      require(first <= last && last - first <= std::min(max_draft_tokens[i], index_.options().max_draft),
              "max_draft_tokens hold");
      for (u32 k = first; k < last; ++k) {
        require(drafts.tokens[k] >= 0 && drafts.tokens[k] < static_cast<Token>(alphabet_) + 1,
                "only tokens that were seen");
        require(drafts.paths[k] > 0 && drafts.paths[k] <= (k > first ? drafts.paths[k - 1] : 1.f), "paths fall");
        if (capture_sizes.empty()) require(drafts.paths[k] >= min_path_probs[i], "min_path_probs hold");
      }
      if (min_path_probs[i] > 1) require(first == last, "nothing is drafted above a threshold of one");
      r.draft.assign(drafts.tokens.begin() + first, drafts.tokens.begin() + last);
    }
    if (!capture_sizes.empty() && !drafts.tokens.empty())
      require(n + drafts.tokens.size() <= capture_sizes.back(), "the limit holds");
  }

  Random random_;
  std::string folder_;
  u32 alphabet_, problems_;
  SuffixIndex index_;
  std::vector<Live> live_;
  std::size_t most_ = 0;
  i64 epoch_ = 0;
};

void extreme() {
  IndexOptions options;
  options.cross_tokens = 1 << 10;
  options.stop_tokens = {9};
  SuffixIndex index(options);
  const i64 crowd = index.begin(1, {});
  for (u32 i = 0; i < End::kMaxSeqs + 50; ++i) {  // sequences beyond the last one with a number of its own
    const i64 handle = index.begin(1, {});
    const std::vector<Token> text{static_cast<Token>(i % 5), static_cast<Token>(i), static_cast<Token>(i + 1)};
    feed(index, handle, text, i % 7);
    if (i % 3) index.end(handle, i % 2);
  }
  const std::vector<Token> last{4120};  // seen in the last sequences only
  require(feed(index, crowd, last, 4).tokens.at(0) == 4121, "the newest sibling is drafted from");
  index.check_integrity();
  index.close_epoch(0, 0);
  index.check_integrity();

  const i64 handle = index.begin(2, {});
  std::vector<Token> text(End::kMaxLen - 200, 3);  // beyond the last place with a number of its own
  feed(index, handle, text, 0);
  for (u32 i = 0; i < 300; ++i) {
    const std::vector<Token> next{static_cast<Token>(i < 100 ? 3 : 4 + i % 3)};
    const Drafts drafts = feed(index, handle, next, 8);
    if (i < 100 || i > 120)
      require(drafts.tokens.at(0) == (i < 100 ? 3 : 4 + static_cast<Token>(i + 1) % 3), "periods go on");
  }
  index.check_integrity();
  index.end(handle, true);
  require(index.close_epoch(1, 0).num_tokens == text.size() + 300, "all of it is packed");
  const i64 again = index.begin(2, {});
  require(feed(index, again, std::vector<Token>(70, 3), 4).tokens.at(0) == 3, "and drafted from");
}

u64 checksum(const unsigned char* data, std::size_t size) {
  u64 lanes[4] = {0x9e3779b97f4a7c15ull, 0xc2b2ae3d27d4eb4full, 0x165667b19e3779f9ull, 0x85ebca77c2b2ae63ull};
  const std::size_t whole = size / 32 * 32;
  for (std::size_t i = 0; i < size; i += i < whole ? 8 : 1) {
    u64 word = 0;
    std::memcpy(&word, data + i, i < whole ? 8 : 1);
    u64& lane = lanes[i < whole ? i / 8 % 4 : i & 3];
    lane = (lane ^ word) * 0x9fb21c651e98df25ull + 1;
  }
  return mix64(mix64(mix64(mix64(lanes[0]) ^ lanes[1]) ^ lanes[2]) ^ lanes[3]) ^ size;
}

void seal(std::vector<unsigned char>& data) {
  constexpr std::size_t kHeader = 80, kSizeAt = 16, kChecksumAt = 24;
  const u64 size = data.size(), none = 0;
  std::memcpy(&data[kSizeAt], &size, 8);
  std::memcpy(&data[kChecksumAt], &none, 8);
  const u64 sum = mix64(checksum(data.data(), kHeader)) ^ checksum(data.data() + kHeader, data.size() - kHeader);
  std::memcpy(&data[kChecksumAt], &sum, 8);
}

// Changes a few words of valid files, seals them, opens them; what is taken must be sound and usable.
void files(u64 seed, double seconds, const std::string& folder) {
  Random random(seed);
  const std::string path = folder + "/file";
  u64 taken = 0, tried = 0;
  const auto deadline = after(seconds);
  while (Clock::now() < deadline) {
    SuffixIndex source(IndexOptions{});
    for (u32 i = 0, n = 1 + below(random, 20); i < n; ++i) {
      const i64 handle = source.begin(below(random, 4), {});
      std::vector<Token> text(1 + below(random, 30));
      for (Token& t : text) t = static_cast<Token>(below(random, 3));
      feed(source, handle, text, 0);
      source.end(handle, true);
    }
    source.close_epoch(3, 0);
    source.write_segment(0, path);
    std::ifstream in(path, std::ios::binary);
    const std::vector<char> bytes(std::istreambuf_iterator<char>(in), {});
    for (u32 round = 0; round < 40; ++round) {
      std::vector<unsigned char> data(bytes.begin(), bytes.end());
      if (below(random, 6) == 0) data.resize(80 + below(random, static_cast<u32>(data.size())));
      for (u32 k = 0, n = below(random, 4); k < n; ++k) {
        static const std::vector<u32> kSpecial{0, 1, 2, 3, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff};
        const u32 word = below(random, 2) ? any(random, kSpecial) : below(random, 400);
        const std::size_t at = 48 + random() % (data.size() - 48 - 3);
        std::memcpy(&data[below(random, 4) ? at / 4 * 4 : at], &word, 4);
      }
      seal(data);
      std::ofstream(path, std::ios::binary)
          .write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
      SuffixIndex index(IndexOptions{});
      ++tried;
      if (refused([&] { index.open_segment(path); })) continue;
      ++taken;
      index.check_integrity();
      for (u64 problem = 0; problem < 4; ++problem) {
        const i64 handle = index.begin(problem, {});
        std::vector<Token> next;
        for (u32 i = 0; i < 30; ++i) {
          if (next.empty() || below(random, 5) == 0) next.assign(1, static_cast<Token>(below(random, 3)));
          next = feed(index, handle, next, 8).tokens;
        }
        index.end(handle, true);
      }
      index.close_epoch(4, 0);
      index.check_integrity();
    }
  }
  std::cout << "files: " << taken << " of " << tried << " taken\n";
  require(taken > 0 && taken < tried, "some files are taken and some are not");
}

void threads(u64 seed, double seconds, const std::string& folder) {
  IndexOptions options;
  options.cross_tokens = 256;
  options.max_bytes = 4 << 20;
  SuffixIndex index(options);
  const auto deadline = after(seconds);
  std::atomic<u64> passes{0}, closes{0};
  std::atomic<bool> failed{false};
  const auto guarded = [&](auto body) {
    return [&, body] {
      try {
        while (Clock::now() < deadline && !failed) body();
      } catch (const std::exception& error) {
        failed = true;
        std::cerr << error.what() << "\n";
      }
    };
  };
  const auto proposer = [&](u64 number) {
    return guarded([&, random = std::make_shared<Random>(seed + number), number] {
      std::vector<i64> handles;
      for (u32 i = 0; i < 6; ++i) handles.push_back(index.begin(i % 3, {}));
      // A thread's requests draft its own tokens or a sibling's; the drafts must be those of this call.
      for (u32 pass = 0; pass < 40; ++pass) {
        std::vector<Token> tokens;
        std::vector<u32> offsets{0}, max_draft_tokens(handles.size(), 8);
        for (std::size_t i = 0; i < handles.size(); ++i) {
          tokens.push_back(static_cast<Token>(below(*random, 4)));
          offsets.push_back(static_cast<u32>(tokens.size()));
        }
        max_draft_tokens[0] = static_cast<u32>(number);
        const Drafts drafts =
            index.propose(handles, tokens, offsets, max_draft_tokens, std::vector<float>(handles.size(), 0.f), {});
        require(drafts.offsets.size() == handles.size() + 1 && drafts.offsets[1] <= number,
                "a thread gets its own drafts");
        ++passes;
      }
      for (const i64 handle : handles) index.end(handle, below(*random, 2));
    });
  };
  const auto keeper = guarded([&, epoch = std::make_shared<i64>(0)] {
    index.close_epoch(++*epoch, 0);
    index.drop_before(*epoch - 3);
    if (*epoch % 4 == 0) index.check_integrity();
    ++closes;
  });
  const auto reader = guarded([&] {
    const auto infos = index.segments();
    if (!infos.empty()) refused([&] { index.write_segment(infos.size() - 1, folder + "/shared"); });
    if (!infos.empty()) refused([&] { index.open_segment(folder + "/shared"); });
    if (const auto segment = index.take_unshared()) index.add_segment(segment->bytes());
    index.load_scoring_state(index.scoring_state());
    index.take_stats();
    index.reliability(Source::kSibling);
    require(index.live_bytes() + index.closed_bytes() + index.cross_bytes() > 0, "memory is counted");
  });
  std::vector<std::thread> all;
  all.emplace_back(proposer(1));
  all.emplace_back(proposer(5));
  all.emplace_back(keeper);
  all.emplace_back(reader);
  for (std::thread& thread : all) thread.join();
  require(!failed && passes > 100 && closes > 10, "every thread got its turn");
  index.check_integrity();
  std::cout << "threads: " << passes << " passes, " << closes << " closes\n";
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  try {
    if (args.at(0) == "extreme") {
      extreme();
      return 0;
    }
    const u64 seed = std::stoull(args.at(1));
    const double seconds = std::stod(args.at(2));
    if (args.at(0) == "files") files(seed, seconds, args.at(3));
    if (args.at(0) == "threads") threads(seed, seconds, args.at(3));
    if (args.at(0) == "random") {
      u64 runs = 0;
      for (const auto deadline = after(seconds); Clock::now() < deadline; ++runs) {
        try {
          RandomRun(seed + runs, args.at(3)).run(300);
        } catch (const std::exception&) {
          std::cerr << "seed " << seed + runs << "\n";
          throw;
        }
      }
      std::cout << "random: " << runs << " runs\n";
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
