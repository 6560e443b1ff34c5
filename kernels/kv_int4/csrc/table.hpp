// The table of an instruction set from its vectors.
#pragma once

#include "attend.hpp"
#include "store.hpp"

namespace rl_accel::kv_int4 {
namespace {

template <class Isa>
constexpr Routines routines(const char* name) {
  return {name, {store_head<Isa, 4>, store_head<Isa, 8>}, {attend_item<Isa, 4>, attend_item<Isa, 8>}, merge_row<Isa>};
}

}  // namespace
}  // namespace rl_accel::kv_int4
