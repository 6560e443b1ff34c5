// What store and attention share, over vectors of 16 floats that the file of each instruction set brings as `Isa`. All
// of it has internal linkage, since those files are compiled for different CPUs. For the same reason nothing of the C++
// library is used here.
#pragma once

#include <cstring>

#include "../../common/csrc/exp.hpp"
#include "../../common/csrc/hadamard.hpp"
#include "routines.hpp"

namespace rl_accel::kv_int4 {
namespace {

constexpr float kTiny = 1e-30f;  // magnitudes below are taken for 0: their reciprocals overflow
constexpr float kInfinity = __builtin_inff();

struct Bfloat16 {
  u16 bits;
};
struct Float16 {
  u16 bits;
};

template <class Isa>
using Floats = typename Isa::Floats;

// Calls f with a null pointer of the type.
template <class F>
void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(static_cast<float*>(nullptr));
    case Dtype::kBfloat16:
      return f(static_cast<Bfloat16*>(nullptr));
    case Dtype::kFloat16:
      return f(static_cast<Float16*>(nullptr));
  }
}

template <class Isa>
void read(float* to, const void* data, Dtype dtype, size_t offset, size_t count) {
  with_type(dtype, [&]<class T>(T*) {
    const T* from = static_cast<const T*>(data) + offset;
    for (size_t i = 0; i < count; i += kLanes) Isa::store(to + i, Isa::load(from + i));
  });
}

template <class Isa>
void write(void* data, Dtype dtype, size_t offset, const float* from, size_t count) {
  with_type(dtype, [&]<class T>(T*) {
    T* to = static_cast<T*>(data) + offset;
    for (size_t i = 0; i < count; i += kLanes) Isa::store(to + i, Isa::load(from + i));
  });
}

// What sums up to `largest` are multiplied by when a larger score is found.
template <class Isa>
float decay(float largest, float now) {
  return largest == -kInfinity ? 0.0f : Isa::first(exp_neg<Isa>(Isa::set(largest - now)));
}

// In place; every `order` values, stages with strides 1, 2, 4 and on.
template <class Isa>
void rotate(float* x, size_t count, size_t order) {
  if (order == 1) return;
  const auto blocks = [&]<size_t kOrder>() {
    for (size_t i = 0; i < count; i += kOrder) Isa::template rotate<kOrder>(x + i);
  };
  switch (order) {
    case 16:
      blocks.template operator()<16>();
      break;
    case 32:
      blocks.template operator()<32>();
      break;
    case 64:
      blocks.template operator()<64>();
      break;
    case 128:
      blocks.template operator()<128>();
      break;
    case 256:
      blocks.template operator()<256>();
      break;
    default:
      for (size_t stride = 1; stride < order; stride *= 2)
        for (size_t i = 0; i < count; i += 2 * stride)
          for (size_t k = i; k < i + stride; ++k) {
            const float first = x[k], second = x[k + stride];
            x[k] = first + second;
            x[k + stride] = first - second;
          }
  }
  const auto factor = Isa::set(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(order))));
  for (size_t i = 0; i < count; i += kLanes) Isa::store(x + i, Isa::mul(Isa::load(x + i), factor));
}

// 0, or NaN if a value is not finite.
template <class Isa>
float not_finite(const float* x, size_t count) {
  auto found = Isa::set(0.0f);
  for (size_t i = 0; i < count; i += kLanes) found = Isa::add(found, Isa::mul(Isa::load(x + i), Isa::set(0.0f)));
  return Isa::sum(found);
}

}  // namespace
}  // namespace rl_accel::kv_int4
