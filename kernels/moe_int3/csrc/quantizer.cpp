// Splits quantization and its undoing into runs of rows for threads.
#include <algorithm>

#include "../../common/csrc/parallel.hpp"
#include "dispatch.hpp"

namespace rl_accel::moe_int3 {
namespace {

constexpr size_t kItemWeights = 16384;  // of an item; less is done before another thread has begun

// Calls work(first row, number of rows).
template <class Work>
void over_rows(size_t rows, size_t length, unsigned threads, Work&& work) {
  const size_t each = std::max<size_t>(1, kItemWeights / std::max<size_t>(length, 1));
  parallel(divide_up(rows, each), threads, [&](size_t item, unsigned) {
    const size_t first = item * each;
    work(first, std::min(each, rows - first));
  });
}

}  // namespace

void quantize(const float* weights, size_t rows, Layout layout, int iterations, u8* codes, u16* scales, u16* offsets,
              unsigned threads) {
  const Quantize quantize = chosen_routines().quantize;
  over_rows(rows, layout.in_features, threads, [&](size_t first, size_t count) {
    quantize(weights + first * layout.in_features, count, layout, iterations, codes + first * layout.bytes(),
             scales + first * layout.groups(), offsets + first * layout.groups());
  });
}

void dequantize(const Matrix& matrix, size_t rows, float* weights, unsigned threads) {
  const Dequantize dequantize = chosen_routines().dequantize;
  const Layout& layout = matrix.layout;
  over_rows(rows, layout.in_features, threads, [&](size_t first, size_t count) {
    const Matrix part{matrix.codes + first * layout.bytes(), matrix.scales + first * layout.groups(),
                      matrix.offsets + first * layout.groups(), layout, matrix.out_features};
    dequantize(part, count, weights + first * layout.in_features);
  });
}

void quantize_factor(const float* values, size_t rows, size_t length, int iterations, u8* codes, u16* scales,
                     unsigned threads) {
  const QuantizeFactor quantize_factor = chosen_routines().quantize_factor;
  const size_t blocks = divide_up(length, kBlock), bytes = row_bytes(length, kFactorBits);
  over_rows(rows, length, threads, [&](size_t first, size_t count) {
    quantize_factor(values + first * length, count, length, iterations, codes + first * bytes, scales + first * blocks);
  });
}

void dequantize_factor(const u8* codes, const u16* scales, size_t rows, size_t length, float* values,
                       unsigned threads) {
  const DequantizeFactor dequantize_factor = chosen_routines().dequantize_factor;
  const size_t blocks = divide_up(length, kBlock), bytes = row_bytes(length, kFactorBits);
  over_rows(rows, length, threads, [&](size_t first, size_t count) {
    dequantize_factor(codes + first * bytes, scales + first * blocks, count, length, values + first * length);
  });
}

}  // namespace rl_accel::moe_int3
