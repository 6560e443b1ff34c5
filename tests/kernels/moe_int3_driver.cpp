// Drives the quantized experts without Python, for runs under sanitizers. Everything random comes from the seed;
// buffers have exactly the size that a call may touch. Results are right if the instruction sets agree: the tests from
// Python compare one with the specification.
//
//   moe_int3_driver random SEED SECONDS     random calls: instruction sets and thread counts agree
//   moe_int3_driver threads SEED SECONDS    calls that start threads, from several threads at once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <initializer_list>
#include <iostream>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "moe_int3.hpp"
#include "routines.hpp"

#if defined(WITHOUT_AVX512) && defined(__x86_64__)  // never chosen on a CPU that lacks it
const rl_accel::moe_int3::Routines rl_accel::moe_int3::kAvx512{};
#endif

using namespace rl_accel::moe_int3;

namespace {

using Random = std::mt19937_64;
using Clock = std::chrono::steady_clock;
using Bytes = std::vector<std::uint8_t>;
using Halves = std::vector<std::uint16_t>;
using Values = std::vector<float>;

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

Values normal(Random& random, std::size_t count, bool any_bits) {
  Values out(count);
  std::normal_distribution<float> distribution;
  for (float& x : out) {
    x = distribution(random);
    const auto bits = static_cast<std::uint32_t>(random());
    if (any_bits && !below(random, 64)) std::memcpy(&x, &bits, sizeof x);
  }
  return out;
}

// The bits, NaN all alike.
Bytes bytes(Values values) {
  for (float& x : values)
    if (x != x) x = 0.0f;
  Bytes out(values.size() * sizeof(float));
  if (!out.empty()) std::memcpy(out.data(), values.data(), out.size());
  return out;
}

// Matrices with factors, quantized from random weights.
class Quantized {
 public:
  Quantized(Random& random, std::size_t count, std::size_t rows, std::size_t length, bool any_bits, unsigned threads)
      : count_(count), rows_(rows), layout_{any_of(random, {2, 3, 4}), length % 64 ? 32u : 64u, length} {
    const Values weights = normal(random, count * rows * length, any_bits);
    codes_.resize(count * rows * layout_.bytes());
    scales_.resize(count * rows * layout_.groups());
    offsets_.resize(scales_.size());
    quantize(weights.data(), count * rows, layout_, 3, codes_.data(), scales_.data(), offsets_.data(), threads);
    starts_.push_back(0);
    for (std::size_t i = 0; i < count; ++i)
      starts_.push_back(starts_.back() + static_cast<std::int32_t>(any_of(random, {0, 1, 5, 9})));
    factor(random, length, v_codes_, v_scales_, threads);
    factor(random, rows, u_codes_, u_scales_, threads);
  }
  Matrix matrix() const { return {codes_.data(), scales_.data(), offsets_.data(), layout_, rows_}; }
  Factors factors() const {
    return {v_codes_.data(), v_scales_.data(), u_codes_.data(), u_scales_.data(), starts_.data()};
  }
  // Everything that was made, and what is read from it.
  std::vector<Bytes> contents(unsigned threads) const {
    Values weights(count_ * rows_ * layout_.in_features), v(ranks() * layout_.in_features);
    dequantize(matrix(), count_ * rows_, weights.data(), threads);
    dequantize_factor(v_codes_.data(), v_scales_.data(), ranks(), layout_.in_features, v.data(), threads);
    return {codes_, halves(scales_), halves(offsets_), v_codes_, u_codes_, halves(u_scales_), bytes(weights), bytes(v)};
  }

 private:
  std::size_t ranks() const { return static_cast<std::size_t>(starts_.back()); }
  static Bytes halves(const Halves& values) {
    Bytes out(values.size() * 2);
    if (!out.empty()) std::memcpy(out.data(), values.data(), out.size());
    return out;
  }
  void factor(Random& random, std::size_t length, Bytes& codes, Halves& scales, unsigned threads) {
    const Values values = normal(random, ranks() * length, false);
    codes.resize(ranks() * row_bytes(length, kFactorBits));
    scales.resize(ranks() * divide_up(length, kBlock));
    quantize_factor(values.data(), ranks(), length, 2, codes.data(), scales.data(), threads);
  }

  std::size_t count_, rows_;
  Layout layout_;
  Bytes codes_, v_codes_, u_codes_;
  Halves scales_, offsets_, v_scales_, u_scales_;
  std::vector<std::int32_t> starts_;
};

// A layer made and asked, all from one seed.
std::vector<Bytes> layer(std::uint64_t seed, unsigned threads, bool any_bits, std::size_t scale) {
  Random random(seed);
  const std::size_t num_experts = 1 + below(random, 4), slots = 1 + below(random, 3);
  const std::size_t hidden = 32 * scale * (1 + below(random, 4)), inner = 32 * scale * (1 + below(random, 3));
  const Quantized w13(random, num_experts, 2 * inner, hidden, any_bits, threads);
  const Quantized w2(random, num_experts, hidden, inner, any_bits, threads);
  const std::size_t num_tokens = below(random, 12);
  const Values x = normal(random, num_tokens * hidden, any_bits), weights = normal(random, num_tokens * slots, false);
  std::vector<std::int32_t> ids(num_tokens * slots);
  for (std::int32_t& id : ids) id = static_cast<std::int32_t>(below(random, num_experts + 1)) - 1;
  const bool low_rank = below(random, 4) != 0;
  Values out(num_tokens * hidden), one(num_tokens * 2 * inner);
  require(experts({x.data(), num_tokens, weights.data(), ids.data(), slots, num_experts, w13.matrix(),
                   low_rank ? w13.factors() : Factors{}, w2.matrix(), low_rank ? w2.factors() : Factors{}, out.data()},
                  threads),
          "ids are in range");
  linear(x.data(), num_tokens, w13.matrix(), w13.factors(), below(random, num_experts), one.data(), threads);
  std::vector<Bytes> results = w13.contents(threads);
  results.push_back(bytes(out));
  results.push_back(bytes(one));
  return results;
}

void random_calls(std::uint64_t seed, const std::vector<std::string>& sets) {
  set_instructions("scalar");
  const auto expected = layer(seed, 1, seed % 2, 1);
  for (const std::string& set : sets) {
    set_instructions(set.c_str());
    require(layer(seed, 1 + static_cast<unsigned>(seed % 4), seed % 2, 1) == expected, "results agree");
  }
}

void threads(std::uint64_t seed, double seconds) {
  std::atomic<unsigned> calls{0}, wrong{0};
  set_instructions("auto");
  for (const auto deadline = after(seconds); Clock::now() < deadline; ++seed) {
    const auto expected = layer(seed, 1, false, 4);
    const auto caller = [&](unsigned workers) {
      wrong += layer(seed, workers, false, 4) != expected;
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
    std::uint64_t seed = std::stoull(args.at(1));
    const double seconds = std::stod(args.at(2));
    if (args.at(0) == "threads") threads(seed, seconds);
    if (args.at(0) == "random") {
      const auto sets = supported();
      std::uint64_t runs = 0;
      for (const auto deadline = after(seconds); Clock::now() < deadline; ++runs) {
        try {
          random_calls(seed + runs, sets);
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
