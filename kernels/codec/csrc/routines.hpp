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

struct Noise {
  u64 key;
  u64 index;  // of the first value
};

// First `count` values of x - subtract, rotated if asked for, as float32; zeros from there to `total`. For each group
// the bits of its largest magnitude. `total` is a multiple of group_size, here and below.
using Fill = void (*)(float* values, const void* x, const void* subtract, size_t count, size_t total, size_t group_size,
                      u32* largest);
using Largest = void (*)(const float* values, size_t total, size_t group_size, u32* largest);

// Codes of round(value * inverse); zeros for groups whose inverse is 0.
using Encode = void (*)(u8* codes, const float* values, size_t total, size_t group_size, const float* inverses,
                        Noise noise);

// values = codes * scale, or values += codes * scale, for a multiple of 32 values: whole groups or a part of one.
using Accumulate = void (*)(float* values, const u8* codes, size_t count, size_t group_size, const u8* scales);

// The last block of a sum: out = [out +] rotated back(sum + codes * scale) for any `count`; sum may be null.
using Finish = void (*)(void* out, const u8* codes, size_t count, size_t group_size, const u8* scales,
                        const float* sum);

struct Routines {
  const char* name;
  Fill fill[2][3][2];  // x bfloat16; subtract none, float32, bfloat16; Hadamard
  Largest largest;
  Encode encode[2][2];          // 8 bits; stochastic
  Accumulate accumulate[2][2];  // 8 bits; add
  Finish finish[2][2][2][2];    // 8 bits; bfloat16; Hadamard; add
};

extern const Routines kScalar;
#if defined(__x86_64__)
extern const Routines kAvx2;
extern const Routines kAvx512;
#endif

}  // namespace rl_accel::codec
