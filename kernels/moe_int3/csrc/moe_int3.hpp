// Quantized expert layers on the CPU: what kernels/moe_int3/reference.py specifies, bit for bit.
//
// Bytes are laid out as kernels/moe_int3/layout.py says. Nothing is checked here: bits are 2, 3 or 4, group_size 32 or
// 64 and a divisor of in_features. Calls keep working memory per calling thread and may run at the same time.
// Time O(weights * iterations) a quantization, O(tokens * weights of their experts) a layer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rl_accel::moe_int3 {

constexpr std::size_t kBlock = 64;  // codes that are packed together
constexpr std::size_t kLanes = 8;
constexpr int kFactorBits = 4, kFactorZero = 8, kMaxFactorCode = 15;

inline std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }
inline std::size_t row_bytes(std::size_t length, int bits) {
  return divide_up(length, kBlock) * kLanes * static_cast<std::size_t>(bits);
}

struct Layout {
  int bits;
  std::size_t group_size;
  std::size_t in_features;

  std::size_t groups() const { return in_features / group_size; }
  std::size_t bytes() const { return row_bytes(in_features, bits); }
};

// Rows of one or more matrices.
struct Matrix {
  const std::uint8_t* codes;     // [rows, layout.bytes()]
  const std::uint16_t* scales;   // float16 [rows, layout.groups()]
  const std::uint16_t* offsets;  // likewise
  Layout layout;
  std::size_t out_features;  // rows of one matrix
};

// Compensators of the matrices; those of matrix e are the rows starts[e] .. starts[e + 1] - 1 of both.
struct Factors {
  const std::uint8_t* v_codes;    // [rows, bytes of in_features]
  const std::uint16_t* v_scales;  // [rows, blocks of in_features]
  const std::uint8_t* u_codes;    // [rows, bytes of out_features]
  const std::uint16_t* u_scales;
  const std::int32_t* starts;  // null: there are none
};

void quantize(const float* weights, std::size_t rows, Layout layout, int iterations, std::uint8_t* codes,
              std::uint16_t* scales, std::uint16_t* offsets, unsigned threads);
void dequantize(const Matrix& matrix, std::size_t rows, float* weights, unsigned threads);
void quantize_factor(const float* values, std::size_t rows, std::size_t length, int iterations, std::uint8_t* codes,
                     std::uint16_t* scales, unsigned threads);
void dequantize_factor(const std::uint8_t* codes, const std::uint16_t* scales, std::size_t rows, std::size_t length,
                       float* values, unsigned threads);

// out [tokens, out_features] of x [tokens, in_features].
void linear(const float* x, std::size_t num_tokens, const Matrix& matrix, const Factors& factors, std::size_t expert,
            float* out, unsigned threads);

struct Experts {
  const float* x;  // [num_tokens, w13.in_features]
  std::size_t num_tokens;
  const float* weights;     // [num_tokens, slots]
  const std::int32_t* ids;  // [num_tokens, slots]; negative: none
  std::size_t slots, num_experts;
  Matrix w13;  // gate above up
  Factors w13_factors;
  Matrix w2;
  Factors w2_factors;
  float* out;  // [num_tokens, w2.out_features]
};

// Returns false, and has done nothing, if an id is beyond the experts.
bool experts(const Experts& task, unsigned threads);

// Instruction sets: "scalar", "avx2", "avx512"; "auto" is the widest that this CPU has, and the default. Returns false
// for one that it lacks. The setting is for tests and benchmarks: it holds for the whole process.
bool set_instructions(const char* name);
const char* instructions();

}  // namespace rl_accel::moe_int3
