// Splits a call over threads that live as long as it: nothing is left behind for a fork to break. Starting one costs
// time, so each gets at least half a Mi values.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

namespace rl_accel::codec {

constexpr std::size_t kValuesPerThread = std::size_t{1} << 19;

// Calls work(first, last, scratch) for parts of [0, numel) that start at multiples of `unit`; scratch holds `unit`
// floats of the thread's own.
template <class Work>
void split(std::size_t numel, std::size_t unit, unsigned threads, Work&& work) {
  const std::size_t num_units = (numel + unit - 1) / unit;
  const std::size_t parts = std::clamp<std::size_t>(numel / kValuesPerThread, 1, std::max(threads, 1u));
  const std::unique_ptr<float[]> scratch(new float[parts * unit]);
  const auto run = [&](std::size_t part) {
    work(num_units * part / parts * unit, std::min(num_units * (part + 1) / parts * unit, numel),
         scratch.get() + part * unit);
  };
  std::vector<std::thread> others;
  others.reserve(parts - 1);
  std::size_t part = 1;
  try {
    for (; part < parts; ++part) others.emplace_back(run, part);
  } catch (const std::system_error&) {  // no more threads to be had
    for (; part < parts; ++part) run(part);
  }
  run(0);
  for (std::thread& other : others) other.join();
}

}  // namespace rl_accel::codec
