// The routines of the instruction set in use.
#pragma once

#include "routines.hpp"

namespace rl_accel::kv_int4 {

const Routines& chosen_routines();

}  // namespace rl_accel::kv_int4
