// What one instruction set offers: inner loops over the values of one group. Tables of function pointers, so that one
// binary holds all sets and chooses when it runs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rl_accel::codec {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using std::size_t;

constexpr size_t kBlock = 32;  // values that are rotated and packed together; every group is a multiple
constexpr u32 kMagnitude = 0x7FFFFFFF;
constexpr u32 kWeyl = 0x9E3779B9;  // the constants of reference.noise
constexpr u32 kMix1 = 0x7FEB352D;
constexpr u32 kMix2 = 0x846CA68B;

// Noise of a group: value i starts from the word first + i * kWeyl; high stands for all bits above the lowest 32.
struct Noise {
  u32 first;
  u32 high;
};

// First `count` values of x - subtract, rotated if asked for, as float32; zeros from there to `total`, a multiple of
// 32. Returns the largest magnitude's bits.
using Fill = u32 (*)(float* values, const void* x, const void* subtract, size_t count, size_t total);

// Largest magnitude's bits of `count` values, a multiple of 32.
using Largest = u32 (*)(const float* values, size_t count);

// Codes of `count` finite values, a multiple of 32.
using Encode = void (*)(u8* codes, const float* values, size_t count, float inverse, Noise noise);

// values = codes * scale, or values += codes * scale; `count` is a multiple of 32.
using Accumulate = void (*)(float* values, const u8* codes, size_t count, float scale);

// The last block of a sum: out = [out +] rotated back(sum + codes * scale) for any `count`; sum may be null.
using Finish = void (*)(void* out, const u8* codes, size_t count, float scale, const float* sum);

struct Routines {
  const char* name;
  Fill fill[2][3][2];        // x bfloat16; subtract none, float32, bfloat16; Hadamard
  Largest largest;
  Encode encode[2][2];       // 8 bits; stochastic
  Accumulate accumulate[2][2];  // 8 bits; add
  Finish finish[2][2][2][2];    // 8 bits; bfloat16; Hadamard; add
};

extern const Routines kScalar;
#if defined(__x86_64__)
extern const Routines kAvx2;
extern const Routines kAvx512;
#endif

}  // namespace rl_accel::codec
