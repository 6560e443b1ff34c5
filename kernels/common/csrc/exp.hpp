// exp and SiLU as kernels/common/exp.py specifies them, bit for bit, over the vectors of an instruction set: `Isa`
// brings Floats, set, add, sub, mul, div, floor, times_power (y * 2^n), zero_where_less and select_less. Compile with
// -ffp-contract=off. Internal linkage: files are compiled for different CPUs.
#pragma once

namespace rl_accel {
namespace {

// exp of values <= 0; NaN stays. Called, it would pass pairs of registers through memory.
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats exp_neg(typename Isa::Floats x) {
  const auto n = Isa::floor(Isa::add(Isa::mul(x, Isa::set(1.4426950408889634f)), Isa::set(0.5f)));
  const auto r = Isa::sub(Isa::sub(x, Isa::mul(n, Isa::set(0.693359375f))), Isa::mul(n, Isa::set(-2.12194440e-4f)));
  auto y = Isa::set(1.9875691500e-4f);
  constexpr float kTerms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  for (const float term : kTerms) y = Isa::add(Isa::mul(y, r), Isa::set(term));
  y = Isa::add(Isa::add(Isa::mul(y, Isa::mul(r, r)), r), Isa::set(1.0f));
  return Isa::zero_where_less(x, Isa::set(-87.0f), Isa::times_power(y, n));
}

// x / (1 + exp(-x)).
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Floats silu(typename Isa::Floats x) {
  const auto zero = Isa::set(0.0f), e = exp_neg<Isa>(Isa::sub(zero, Isa::abs(x)));
  return Isa::div(Isa::select_less(x, zero, Isa::mul(x, e), x), Isa::add(e, Isa::set(1.0f)));
}

}  // namespace
}  // namespace rl_accel
