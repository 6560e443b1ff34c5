// Drives the KV cache without Python, for runs under sanitizers. Everything random comes from the seed; buffers have
// exactly the size that a call may touch. Results are right if the instruction sets agree: the tests from Python
// compare one with the specification.
//
//   kv_int4_driver random SEED SECONDS     random calls: instruction sets and thread counts agree
//   kv_int4_driver threads SEED SECONDS    calls that start threads, from several threads at once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <iostream>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kv_int4.hpp"

using namespace rl_accel::kv_int4;

namespace {

using Random = std::mt19937_64;
using Clock = std::chrono::steady_clock;
using Bytes = std::vector<std::uint8_t>;

std::size_t below(Random& random, std::size_t n) { return random() % n; }

template <class T>
T any_of(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[below(random, choices.size())];
}

void require(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

Clock::time_point after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::vector<std::string> supported() {
  std::vector<std::string> out;
  for (const char* name : {"scalar", "avx2", "avx512"})
    if (set_instructions(name)) out.push_back(name);
  return out;
}

// Pages at a multiple of 64 bytes, in memory that ends with them.
class Pages {
 public:
  explicit Pages(const Bytes& bytes)
      : num_bytes_(bytes.size()),
        data_(static_cast<std::uint8_t*>(::operator new[](num_bytes_, std::align_val_t{64}))) {
    std::memcpy(data_.get(), bytes.data(), num_bytes_);
  }
  std::uint8_t* data() const { return data_.get(); }
  Bytes bytes() const { return {data(), data() + num_bytes_}; }

 private:
  struct Free {
    void operator()(std::uint8_t* data) const { ::operator delete[](data, std::align_val_t{64}); }
  };
  std::size_t num_bytes_;
  std::unique_ptr<std::uint8_t[], Free> data_;
};

// A step of an engine: what is stored, then what is asked. Values are bfloat16 or float32.
class Step {
 public:
  Step(Random& random, bool any_bits, std::size_t max_len)
      : layout_{16 * (1 + below(random, 8)), 16 * (1 + below(random, 10)), any_of(random, {4, 8})},
        num_kv_heads_(1 + below(random, 3)),
        groups_(any_of<std::size_t>(random, {1, 2, 3, 4, 7, 8, 40})),
        half_(below(random, 2)),
        order_(any_of<std::size_t>(random, {1, 8, 16})) {
    const std::size_t num_requests = 1 + below(random, 3);
    std::size_t num_blocks = 0, num_tokens = 0, most = 0;
    start_.push_back(0);
    for (std::size_t i = 0; i < num_requests; ++i) {
      const std::size_t len = 1 + below(random, max_len);
      lens_.push_back(static_cast<std::int32_t>(len));
      start_.push_back(start_.back() + static_cast<std::int32_t>(below(random, std::min<std::size_t>(len, 4) + 1)));
      most = std::max(most, (len + layout_.block_size - 1) / layout_.block_size);
      num_tokens += len;
    }
    table_.resize(num_requests * most);
    for (std::int32_t& block : table_) block = static_cast<std::int32_t>(num_blocks++);
    for (std::size_t i = 0; i < num_requests; ++i)
      for (std::size_t n = 0; n < static_cast<std::size_t>(lens_[i]); ++n)
        slots_.push_back(static_cast<std::int64_t>((i * most + n / layout_.block_size) * layout_.block_size +
                                                   n % layout_.block_size));
    std::shuffle(slots_.begin(), slots_.end(), random);
    if (below(random,
              2)) {  // a token more that is not stored: those of a request are, since a page may not hold any bits
      slots_.push_back(-1);
      ++num_tokens;
    }
    pages_.resize(num_blocks * num_kv_heads_ * layout_.page_bytes());
    for (std::uint8_t& byte : pages_) byte = static_cast<std::uint8_t>(random());
    const std::size_t d = layout_.head_size;
    k_ = values(random, num_tokens * num_kv_heads_ * d, any_bits);
    v_ = values(random, num_tokens * num_kv_heads_ * d, any_bits);
    query_ = values(random, static_cast<std::size_t>(start_.back()) * num_kv_heads_ * groups_ * d, any_bits);
    if (below(random, 2)) {
      shift_.resize(num_kv_heads_ * d);
      for (float& x : shift_) x = std::normal_distribution<float>()(random);
    }
  }

  // Bytes of the pages and of the output, NaN all alike.
  std::pair<Bytes, Bytes> run(unsigned threads) const {
    const Pages pages(pages_);
    const std::size_t d = layout_.head_size, kv_stride = num_kv_heads_ * d, stride = kv_stride * groups_;
    const Dtype dtype = half_ ? Dtype::kBfloat16 : Dtype::kFloat32;
    store({pages.data(),
           layout_,
           num_kv_heads_,
           slots_.data(),
           slots_.size(),
           {k_.data(), kv_stride},
           {v_.data(), kv_stride},
           dtype,
           shift_.empty() ? nullptr : shift_.data(),
           order_},
          threads);
    Bytes out(query_.size());
    attend({out.data(),
            stride,
            {query_.data(), stride},
            dtype,
            num_kv_heads_ * groups_,
            num_kv_heads_,
            pages.data(),
            layout_,
            table_.data(),
            table_.size() / lens_.size(),
            start_.data(),
            lens_.data(),
            lens_.size(),
            0.125f,
            order_},
           threads);
    const std::size_t width = half_ ? 2 : 4;
    for (std::size_t i = 0; i < out.size(); i += width) {
      std::uint32_t bits = 0;
      std::memcpy(reinterpret_cast<std::uint8_t*>(&bits) + 4 - width, &out[i], width);
      if ((bits & 0x7FFFFFFF) > 0x7F800000) std::memset(&out[i], 0xFF, width);
    }
    return {pages.bytes(), out};
  }

 private:
  Bytes values(Random& random, std::size_t numel, bool any_bits) const {
    const std::size_t width = half_ ? 2 : 4;
    Bytes out(numel * width);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < numel; ++i) {
      const float x = normal(random);
      auto bits = static_cast<std::uint32_t>(random());
      if (!any_bits || below(random, 64)) std::memcpy(&bits, &x, sizeof x);
      std::memcpy(&out[i * width], reinterpret_cast<const std::uint8_t*>(&bits) + 4 - width, width);
    }
    return out;
  }

  Layout layout_;
  std::size_t num_kv_heads_, groups_;
  bool half_;
  std::size_t order_;
  std::vector<std::int32_t> start_, lens_, table_;
  std::vector<std::int64_t> slots_;
  std::vector<float> shift_;
  Bytes pages_, k_, v_, query_;
};

void random_calls(Random& random, const std::vector<std::string>& sets) {
  const Step step(random, below(random, 2) == 1, any_of<std::size_t>(random, {20, 300, 700}));
  set_instructions("scalar");
  const auto expected = step.run(1);
  for (const std::string& set : sets) {
    set_instructions(set.c_str());
    const auto found = step.run(1 + static_cast<unsigned>(below(random, 4)));
    require(found.first == expected.first, "pages agree");
    require(found.second == expected.second, "outputs agree");
  }
}

// A call that is split gives what one that is not does, from two threads at once.
void threads(std::uint64_t seed, double seconds) {
  Random random(seed);
  std::atomic<unsigned> calls{0}, wrong{0};
  set_instructions("auto");
  for (const auto deadline = after(seconds); Clock::now() < deadline;) {
    const Step step(random, false, 2000);
    const auto expected = step.run(1);
    const auto caller = [&](unsigned workers) {
      wrong += step.run(workers) != expected;
      ++calls;
    };
    std::thread other(caller, 3);
    caller(2);
    other.join();
  }
  require(wrong == 0, "results do not depend on threads");
  std::cout << "threads: " << calls << " calls\n";
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  try {
    const std::uint64_t seed = std::stoull(args.at(1));
    const double seconds = std::stod(args.at(2));
    if (args.at(0) == "threads") threads(seed, seconds);
    if (args.at(0) == "random") {
      const auto sets = supported();
      std::uint64_t runs = 0;
      for (const auto deadline = after(seconds); Clock::now() < deadline; ++runs) {
        Random random(seed + runs);
        try {
          random_calls(random, sets);
        } catch (const std::exception&) {
          std::cerr << "seed " << seed + runs << "\n";
          throw;
        }
      }
      std::cout << "random: " << runs << " runs of";
      for (const std::string& set : sets) std::cout << " " << set;
      std::cout << "\n";
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
