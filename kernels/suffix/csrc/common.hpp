// Types shared by the suffix index: tokens, chunked storage, 64-bit mixing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace rl_accel::suffix {

using Token = std::int32_t;
using u8 = std::uint8_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

inline constexpr u32 kNone = 0xffffffffu;

// Thrown for wrong use and for snapshots that cannot be read; becomes rl_accel.errors.DraftError in Python.
struct SuffixError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline u64 mix64(u64 x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9ull;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Fetches the cache line of `at`. GCC takes a function of nothing but __builtin_prefetch for pure and drops calls of
// it; the empty statement is a side effect.
inline void fetch(const void* at) {
  __builtin_prefetch(at);
  asm volatile("");
}

// Append-only array in chunks of 2^kLog2 items: growing copies nothing and moves nothing, so there is no latency spike.
template <typename T, unsigned kLog2>
class ChunkedArray {
 public:
  static constexpr u32 kChunk = 1u << kLog2;

  T& operator[](u32 i) { return chunks_[i >> kLog2][i & (kChunk - 1)]; }
  const T& operator[](u32 i) const { return chunks_[i >> kLog2][i & (kChunk - 1)]; }
  u32 size() const { return size_; }

  u32 push_back(const T& value) {
    if ((size_ >> kLog2) == chunks_.size()) chunks_.emplace_back(new T[kChunk]);
    (*this)[size_] = value;
    return size_++;
  }

  std::size_t memory_bytes() const {
    return chunks_.size() * kChunk * sizeof(T) + chunks_.capacity() * sizeof(chunks_[0]);
  }

 private:
  std::vector<std::unique_ptr<T[]>> chunks_;
  u32 size_ = 0;
};

}  // namespace rl_accel::suffix
