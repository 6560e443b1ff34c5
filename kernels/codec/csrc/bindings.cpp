// Python face of the codec: addresses and sizes in, which cpp.py takes from tensors; Python's lock is released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "codec.hpp"

namespace nb = nanobind;
using namespace rl_accel::codec;

namespace {

using Address = std::uintptr_t;

Values values(Address data, bool bfloat16) {
  return {reinterpret_cast<const void*>(data), bfloat16 ? Dtype::kBfloat16 : Dtype::kFloat32};
}

Rows rows(std::size_t num_rows, std::size_t numel, Address pieces, std::size_t num_pieces) {
  return {num_rows, numel, reinterpret_cast<const Piece*>(pieces), num_pieces};
}

std::uint8_t* bytes(Address data) { return reinterpret_cast<std::uint8_t*>(data); }

}  // namespace

NB_MODULE(_codec, m) {
  m.doc() = "4- and 8-bit codec; see kernels/codec/README.md";
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "quantize",
      [](Address out, std::size_t numel, Address x, bool x_bfloat16, Address subtract, bool subtract_bfloat16, int bits,
         std::size_t group_size, bool stochastic, std::uint64_t key, std::uint64_t offset, bool hadamard,
         unsigned threads) {
        quantize(bytes(out), numel, values(x, x_bfloat16), values(subtract, subtract_bfloat16), {bits, group_size},
                 {stochastic, key, offset}, hadamard, threads);
      },
      Unlocked());
  m.def(
      "dequantize",
      [](Address out, bool bfloat16, std::size_t numel, Address blocks, std::size_t num_blocks, int bits,
         std::size_t group_size, bool hadamard, bool add, unsigned threads) {
        dequantize(reinterpret_cast<void*>(out), bfloat16 ? Dtype::kBfloat16 : Dtype::kFloat32, numel, bytes(blocks),
                   num_blocks, {bits, group_size}, hadamard, add, threads);
      },
      Unlocked());
  m.def(
      "quantize_rows",
      [](Address out, std::size_t num_rows, std::size_t numel, Address pieces, std::size_t num_pieces, Address x,
         bool x_bfloat16, Address subtract, bool subtract_bfloat16, int bits, std::size_t group_size, bool stochastic,
         std::uint64_t key, std::uint64_t offset, bool hadamard, unsigned threads) {
        quantize_rows(bytes(out), rows(num_rows, numel, pieces, num_pieces), values(x, x_bfloat16),
                      values(subtract, subtract_bfloat16), {bits, group_size}, {stochastic, key, offset}, hadamard,
                      threads);
      },
      Unlocked());
  m.def(
      "dequantize_rows",
      [](Address out, bool bfloat16, std::size_t num_rows, std::size_t numel, Address pieces, std::size_t num_pieces,
         Address blocks, std::size_t num_layers, int bits, std::size_t group_size, bool hadamard, bool add,
         unsigned threads) {
        dequantize_rows(reinterpret_cast<void*>(out), bfloat16 ? Dtype::kBfloat16 : Dtype::kFloat32,
                        rows(num_rows, numel, pieces, num_pieces), bytes(blocks), num_layers, {bits, group_size},
                        hadamard, add, threads);
      },
      Unlocked());
  m.def(
      "requantize",
      [](Address out, std::size_t numel, Address blocks, std::size_t num_blocks, int from_bits,
         std::size_t from_group_size, int bits, std::size_t group_size, bool stochastic, std::uint64_t key,
         std::uint64_t offset, unsigned threads) {
        requantize(bytes(out), numel, bytes(blocks), num_blocks, {from_bits, from_group_size}, {bits, group_size},
                   {stochastic, key, offset}, threads);
      },
      Unlocked());
  m.def("set_instructions", [](const std::string& name) {
    if (!set_instructions(name.c_str())) throw std::invalid_argument("this CPU has no instruction set " + name);
  });
  m.def("instructions", &instructions);
}
