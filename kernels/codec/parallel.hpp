// Splits a range of groups over threads that live for one call: nothing is left behind for a fork to break. Starting one
// takes about 20 us, so each gets at least half a Mi values.
#pragma once

#include <cstddef>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

namespace rl_accel::codec {

constexpr std::size_t kValuesPerThread = std::size_t{1} << 19;

// Calls work(first, last, scratch) for parts of [0, num_groups); scratch holds `scratch_size` floats of the thread's own.
template <class Work>
void split_groups(std::size_t num_groups, std::size_t group_size, unsigned threads, std::size_t scratch_size, Work&& work) {
  const std::size_t most = num_groups * group_size / kValuesPerThread;
  const std::size_t parts = most < 2 || threads < 2 ? 1 : most < threads ? most : threads;
  const std::unique_ptr<float[]> scratch(scratch_size ? new float[parts * scratch_size] : nullptr);
  const auto run = [&](std::size_t part) {
    work(num_groups * part / parts, num_groups * (part + 1) / parts, scratch.get() + part * scratch_size);
  };
  std::vector<std::thread> helpers;
  helpers.reserve(parts - 1);
  std::size_t started = 1;
  try {
    for (; started < parts; ++started) helpers.emplace_back(run, started);
  } catch (const std::system_error&) {  // no more threads to be had
    for (std::size_t part = started; part < parts; ++part) run(part);
  }
  run(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace rl_accel::codec
