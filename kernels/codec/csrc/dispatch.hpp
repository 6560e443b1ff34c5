// The inner loops of the instruction set in use.
#pragma once

#include "routines.hpp"

namespace rl_accel::codec {

const Routines& chosen_routines();

}  // namespace rl_accel::codec
