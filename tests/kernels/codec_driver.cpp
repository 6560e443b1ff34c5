// Drives the codec without Python, for runs under sanitizers. Everything random comes from the seed; buffers have
// exactly the size that a call may touch, and start where their type just allows.
//
//   codec_driver random SEED SECONDS     random calls: instruction sets agree, what comes back is near what went in
//   codec_driver threads SEED SECONDS    calls that start threads, from several threads at once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <iostream>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "codec.hpp"

using namespace rl_accel::codec;

namespace {

using Random = std::mt19937_64;
using Clock = std::chrono::steady_clock;
using Bytes = std::vector<std::uint8_t>;

std::size_t below(Random& random, std::size_t n) { return random() % n; }

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

// `numel` values behind `shift` others, in memory that ends with them.
template <class T>
class Buffer {
 public:
  Buffer(std::size_t numel, std::size_t shift) : shift_(shift), numel_(numel), data_(new T[shift + numel]()) {}
  T* data() const { return data_.get() + shift_; }
  std::size_t num_bytes() const { return numel_ * sizeof(T); }
  Bytes bytes() const {
    const auto* first = reinterpret_cast<const std::uint8_t*>(data());
    return {first, first + num_bytes()};
  }

 private:
  std::size_t shift_, numel_;
  std::unique_ptr<T[]> data_;
};

Format any_format(Random& random) { return {below(random, 2) ? 4 : 8, std::size_t{32} << below(random, 11)}; }

Rounding any_rounding(Random& random, Format format) {
  return {below(random, 2) == 1, random(), (random() >> 20) * format.group_size};
}

// Floats of like size, or any bits at all; as bfloat16 (uint16_t) the upper half of each.
template <class T>
Buffer<T> any_values(Random& random, std::size_t numel, bool any_bits) {
  Buffer<T> out(numel, below(random, 16));
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < numel; ++i) {
    const float x = normal(random);
    auto bits = static_cast<std::uint32_t>(random());
    if (!any_bits) std::memcpy(&bits, &x, sizeof x);
    std::memcpy(out.data() + i, reinterpret_cast<const std::uint8_t*>(&bits) + sizeof bits - sizeof(T), sizeof(T));
  }
  return out;
}

template <class T>
bool same(const Buffer<T>& a, const Buffer<T>& b) {
  if (a.bytes() == b.bytes()) return true;
  for (std::size_t i = 0; i < a.num_bytes() / sizeof(T); ++i) {
    bool nan = false;
    if constexpr (std::is_same_v<T, float>) nan = std::isnan(a.data()[i]) && std::isnan(b.data()[i]);
    if (!nan && std::memcmp(a.data() + i, b.data() + i, sizeof(T))) return false;
  }
  return true;
}

// Runs the call with each instruction set; returns what it wrote, which must be the same every time.
template <class T, class Call>
Buffer<T> agreed(const std::vector<std::string>& sets, std::size_t numel, std::size_t shift, const Bytes& before,
                 Call&& call) {
  Buffer<T> first(numel, shift);
  for (std::size_t i = 0; i < sets.size(); ++i) {
    require(set_instructions(sets[i].c_str()), "a set stays supported");
    Buffer<T> out(numel, shift);
    if (!before.empty()) std::memcpy(out.data(), before.data(), before.size());
    call(out.data());
    if (i == 0)
      first = std::move(out);
    else
      require(same(out, first), "instruction sets agree");
  }
  return first;
}

void random_calls(Random& random, const std::vector<std::string>& sets) {
  const std::size_t numel = below(random, 8) ? below(random, 9000) : below(random, 40);
  const bool any_bits = below(random, 3) == 0, hadamard = below(random, 2), half = below(random, 2);
  const bool other_half = below(random, 2), add = below(random, 2);
  const Format format = any_format(random), next = any_format(random);
  const Rounding rounding = any_rounding(random, format), next_rounding = any_rounding(random, next);
  const auto x = any_values<float>(random, half ? 0 : numel, any_bits), other = any_values<float>(random, numel, false);
  const auto x_half = any_values<std::uint16_t>(random, half ? numel : 0, any_bits);
  const auto held_half = any_values<std::uint16_t>(random, numel, false);
  const std::size_t num_bytes = format.packed_bytes(numel), num_blocks = 1 + below(random, 4);

  Buffer<std::uint8_t> blocks(num_blocks * num_bytes, 4 * below(random, 9));
  for (std::size_t block = 0; block < num_blocks; ++block) {
    Values left{x.data(), Dtype::kFloat32}, right{};
    if (half) left = {x_half.data(), Dtype::kBfloat16};
    if (block && other_half) right = {held_half.data(), Dtype::kBfloat16};
    if (block && !other_half) right = {other.data(), Dtype::kFloat32};
    const auto out = agreed<std::uint8_t>(sets, num_bytes, 4, {}, [&](std::uint8_t* to) {
      quantize(to, numel, left, right, format, rounding, hadamard, 1);
    });
    if (num_bytes) std::memcpy(blocks.data() + block * num_bytes, out.data(), num_bytes);
  }
  if (!half && !any_bits) {
    const auto back = agreed<float>(sets, numel, 1, {}, [&](float* to) {
      dequantize(to, Dtype::kFloat32, numel, blocks.data(), 1, format, hadamard, false, 1);
    });
    for (std::size_t i = 0; i < numel; ++i) {
      float scale;
      std::memcpy(&scale, blocks.data() + format.code_bytes(numel) + i / format.group_size * sizeof scale,
                  sizeof scale);
      require(std::abs(back.data()[i] - x.data()[i]) <= 1.01f * scale, "values come back within a scale");
    }
  }
  if (any_bits)  // bytes that nobody wrote
    for (std::size_t i = 0; i < num_blocks * num_bytes; ++i) blocks.data()[i] = static_cast<std::uint8_t>(random());
  agreed<float>(sets, numel, below(random, 16), add ? other.bytes() : Bytes(), [&](float* to) {
    dequantize(to, Dtype::kFloat32, numel, blocks.data(), num_blocks, format, hadamard, add, 1);
  });
  agreed<std::uint16_t>(sets, numel, below(random, 32), add ? held_half.bytes() : Bytes(), [&](std::uint16_t* to) {
    dequantize(to, Dtype::kBfloat16, numel, blocks.data(), num_blocks, format, hadamard, add, 1);
  });
  agreed<std::uint8_t>(sets, next.packed_bytes(numel), 4, {}, [&](std::uint8_t* to) {
    requantize(to, numel, blocks.data(), num_blocks, format, next, next_rounding, 1);
  });
}

// Pieces in rows: instruction sets agree, and each piece holds what a block of its own would.
void random_rows(Random& random, const std::vector<std::string>& sets) {
  const Format format = any_format(random);
  const Rounding rounding = any_rounding(random, format);
  const std::size_t num_rows = 1 + below(random, 3), groups = 1 + below(random, 9), group = format.group_size;
  const bool hadamard = below(random, 2);
  std::vector<Piece> pieces;
  std::size_t numel = 0;
  for (std::size_t row = 0; row < num_rows; ++row)
    for (std::size_t first = 0; first < groups;) {
      const std::size_t span = std::min(1 + below(random, 4), groups - first), count = below(random, span * group + 1);
      const auto position = (row * groups + first) * group;
      pieces.push_back({static_cast<std::int64_t>(numel), static_cast<std::int64_t>(count),
                        static_cast<std::int64_t>(position), static_cast<std::int64_t>(span * group)});
      numel += count;
      first += span;
    }
  std::shuffle(pieces.begin(), pieces.end(), random);
  const Rows rows{num_rows, groups * group, pieces.data(), pieces.size()};
  const auto x = any_values<float>(random, numel, below(random, 3) == 0);
  const std::size_t row_bytes = format.packed_bytes(groups * group);
  const auto out = agreed<std::uint8_t>(sets, num_rows * row_bytes, 4, {}, [&](std::uint8_t* to) {
    quantize_rows(to, rows, {x.data(), Dtype::kFloat32}, {}, format, rounding, hadamard, 1);
  });
  const auto back = agreed<float>(sets, numel, 1, {}, [&](float* to) {
    dequantize_rows(to, Dtype::kFloat32, rows, out.data(), 1, format, hadamard, false, 1);
  });
  for (const Piece& piece : pieces) {
    const auto count = static_cast<std::size_t>(piece.count);
    Buffer<std::uint8_t> block(format.packed_bytes(count), 0);
    Buffer<float> alone(count, 0);
    quantize(block.data(), count, {x.data() + piece.start, Dtype::kFloat32}, {}, format,
             {rounding.stochastic, rounding.key, rounding.offset + static_cast<std::uint64_t>(piece.target)}, hadamard,
             1);
    dequantize(alone.data(), Dtype::kFloat32, count, block.data(), 1, format, hadamard, false, 1);
    for (std::size_t i = 0; i < count; ++i) {
      const float ours = back.data()[static_cast<std::size_t>(piece.start) + i];
      require(ours == alone.data()[i] || (std::isnan(ours) && std::isnan(alone.data()[i])), "pieces are blocks");
    }
  }
}

// A call that is split gives what one that is not does, from two threads at once.
void threads(std::uint64_t seed, double seconds) {
  const std::size_t numel = (std::size_t{3} << 19) + 77;
  const Format format{4, 128}, to{8, 32768};
  const Rounding rounding{true, 5, 0};
  Random random(seed);
  const auto x = any_values<float>(random, numel, false);
  const auto all = [&](unsigned workers) {
    Buffer<std::uint8_t> block(format.packed_bytes(numel), 0), again(to.packed_bytes(numel), 0);
    Buffer<float> back(numel, 1);
    quantize(block.data(), numel, {x.data(), Dtype::kFloat32}, {}, format, rounding, true, workers);
    dequantize(back.data(), Dtype::kFloat32, numel, block.data(), 1, format, true, true, workers);
    requantize(again.data(), numel, block.data(), 1, format, to, rounding, workers);
    Bytes out = block.bytes();
    for (const Bytes& more : {back.bytes(), again.bytes()}) out.insert(out.end(), more.begin(), more.end());
    return out;
  };
  const Bytes expected = all(1);
  std::atomic<unsigned> calls{0}, wrong{0};
  const auto deadline = after(seconds);
  const auto caller = [&](unsigned workers) {
    do {
      wrong += all(workers) != expected;
      ++calls;
    } while (Clock::now() < deadline);
  };
  std::thread other(caller, 3);
  caller(2);
  other.join();
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
          random_rows(random, sets);
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
