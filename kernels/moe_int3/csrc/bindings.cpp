// Python face of the quantized experts: addresses and sizes in, which cpp.py takes from tensors; Python's lock is
// released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "moe_int3.hpp"

namespace nb = nanobind;
using namespace rl_accel::moe_int3;

namespace {

using Address = std::uintptr_t;
using Size = std::size_t;

template <class T>
T* pointer(Address data) {
  return reinterpret_cast<T*>(data);
}

}  // namespace

NB_MODULE(_moe_int3, m) {
  m.doc() = "Quantized expert layers; see kernels/moe_int3/README.md";
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Matrix>(m, "Matrix")
      .def("__init__", [](Matrix* self, Address codes, Address scales, Address offsets, int bits, Size group_size,
                          Size in_features, Size out_features) {
        new (self) Matrix{pointer<const std::uint8_t>(codes),
                          pointer<const std::uint16_t>(scales),
                          pointer<const std::uint16_t>(offsets),
                          {bits, group_size, in_features},
                          out_features};
      });
  nb::class_<Factors>(m, "Factors")
      .def("__init__",
           [](Factors* self, Address v_codes, Address v_scales, Address u_codes, Address u_scales, Address starts) {
             new (self) Factors{pointer<const std::uint8_t>(v_codes), pointer<const std::uint16_t>(v_scales),
                                pointer<const std::uint8_t>(u_codes), pointer<const std::uint16_t>(u_scales),
                                pointer<const std::int32_t>(starts)};
           });
  m.def(
      "quantize",
      [](Address weights, Size rows, int bits, Size group_size, Size in_features, int iterations, Address codes,
         Address scales, Address offsets, unsigned threads) {
        quantize(pointer<const float>(weights), rows, {bits, group_size, in_features}, iterations,
                 pointer<std::uint8_t>(codes), pointer<std::uint16_t>(scales), pointer<std::uint16_t>(offsets),
                 threads);
      },
      Unlocked());
  m.def(
      "dequantize",
      [](const Matrix& matrix, Size rows, Address weights, unsigned threads) {
        dequantize(matrix, rows, pointer<float>(weights), threads);
      },
      Unlocked());
  m.def(
      "quantize_factor",
      [](Address values, Size rows, Size length, int iterations, Address codes, Address scales, unsigned threads) {
        quantize_factor(pointer<const float>(values), rows, length, iterations, pointer<std::uint8_t>(codes),
                        pointer<std::uint16_t>(scales), threads);
      },
      Unlocked());
  m.def(
      "dequantize_factor",
      [](Address codes, Address scales, Size rows, Size length, Address values, unsigned threads) {
        dequantize_factor(pointer<const std::uint8_t>(codes), pointer<const std::uint16_t>(scales), rows, length,
                          pointer<float>(values), threads);
      },
      Unlocked());
  m.def(
      "linear",
      [](Address x, Size num_tokens, const Matrix& matrix, const Factors& factors, Size expert, Address out,
         unsigned threads) {
        linear(pointer<const float>(x), num_tokens, matrix, factors, expert, pointer<float>(out), threads);
      },
      Unlocked());
  m.def(
      "experts",
      [](Address x, Size num_tokens, Address weights, Address ids, Size slots, Size num_experts, const Matrix& w13,
         const Factors& w13_factors, const Matrix& w2, const Factors& w2_factors, Address out, unsigned threads) {
        return experts(
            {pointer<const float>(x), num_tokens, pointer<const float>(weights), pointer<const std::int32_t>(ids),
             slots, num_experts, w13, w13_factors, w2, w2_factors, pointer<float>(out)},
            threads);
      },
      Unlocked());
  m.def("set_instructions", [](const std::string& name) {
    if (!set_instructions(name.c_str())) throw std::invalid_argument("this CPU has no instruction set " + name);
  });
  m.def("instructions", &instructions);
}
