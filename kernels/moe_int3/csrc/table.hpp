// The table of an instruction set from its vectors.
#pragma once

#include "multiply.hpp"
#include "quantize.hpp"

namespace rl_accel::moe_int3 {
namespace {

template <class Isa>
constexpr Routines routines(const char* name) {
  return {name,          quantize<Isa>, quantize_factor<Isa>, dequantize<Isa>, dequantize_factor<Isa>,
          multiply<Isa>, activate<Isa>, add_scaled<Isa>};
}

}  // namespace
}  // namespace rl_accel::moe_int3
