// Chooses the instruction set.
#include "dispatch.hpp"

#include "../../common/csrc/dispatch.hpp"
#include "codec.hpp"

namespace rl_accel::codec {
namespace {

std::vector<const Routines*> sets_of_this_cpu() {
  std::vector<const Routines*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (has_avx512()) sets.push_back(&kAvx512);
  if (has_avx2()) sets.push_back(&kAvx2);
#endif
  sets.push_back(&kScalar);
  return sets;
}

Dispatch<Routines>& dispatch() {
  static Dispatch<Routines> found(sets_of_this_cpu());
  return found;
}

}  // namespace

const Routines& chosen_routines() { return dispatch().chosen(); }

bool set_instructions(const char* name) { return dispatch().choose(name); }

const char* instructions() { return chosen_routines().name; }

}  // namespace rl_accel::codec
