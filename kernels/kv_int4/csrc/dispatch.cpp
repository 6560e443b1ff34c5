// Chooses the instruction set.
#include "dispatch.hpp"

#include <atomic>
#include <cstring>

namespace rl_accel::kv_int4 {
namespace {

// The sets that this CPU has, widest first.
const Routines* supported(int number) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx512 && number-- == 0) return &kAvx512;
  if (avx2 && number-- == 0) return &kAvx2;
#endif
  return number == 0 ? &kScalar : nullptr;
}

std::atomic<const Routines*>& chosen() {
  static std::atomic<const Routines*> routines{supported(0)};
  return routines;
}

}  // namespace

const Routines& chosen_routines() { return *chosen().load(std::memory_order_relaxed); }

bool set_instructions(const char* name) {
  for (int number = 0; const Routines* routines = supported(number); ++number)
    if (!std::strcmp(name, "auto") || !std::strcmp(name, routines->name)) {
      chosen() = routines;
      return true;
    }
  return false;
}

const char* instructions() { return chosen_routines().name; }

}  // namespace rl_accel::kv_int4
