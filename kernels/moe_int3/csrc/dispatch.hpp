// The routines of the instruction set in use.
#pragma once

#include "routines.hpp"

namespace rl_accel::moe_int3 {

const Routines& chosen_routines();

}  // namespace rl_accel::moe_int3
