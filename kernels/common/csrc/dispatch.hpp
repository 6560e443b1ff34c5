// Chooses among the instruction sets that a kernel is compiled for, when the program runs.
#pragma once

#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

namespace rl_accel {
namespace {

#if defined(__x86_64__)
// GCC's run-time support has to be initialized before these are called.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

// One of a kernel. `Routines` has a `name`.
template <class Routines>
class Dispatch {
 public:
  // `sets`: those that this CPU has, widest first, at least one.
  explicit Dispatch(std::vector<const Routines*> sets) : sets_(std::move(sets)), chosen_(sets_.front()) {}

  const Routines& chosen() const { return *chosen_.load(std::memory_order_relaxed); }

  // Chooses the set of a name, or the widest for "auto"; false if this CPU has no such set.
  bool choose(const char* name) {
    for (const Routines* routines : sets_)
      if (!std::strcmp(name, "auto") || !std::strcmp(name, routines->name)) {
        chosen_ = routines;
        return true;
      }
    return false;
  }

 private:
  const std::vector<const Routines*> sets_;
  std::atomic<const Routines*> chosen_;
};

}  // namespace rl_accel
