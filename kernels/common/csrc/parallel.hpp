// Runs items on several threads, each taking the next one when it is done. The threads are those of OpenMP, which torch
// keeps warm: a decoding call lasts about as long as starting threads would. Built without OpenMP (as under the thread
// sanitizer, which does not see its barriers) threads of the call's own do the same.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#if !defined(_OPENMP)
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace rl_accel {

// Calls work(item, worker) for every item below num_items; workers are numbered below `threads`.
template <class Work>
void parallel(std::size_t num_items, unsigned threads, Work&& work) {
  threads = static_cast<unsigned>(std::min<std::size_t>(threads, num_items));
  if (threads <= 1) {  // without OpenMP: a process that forked may lack its threads
    for (std::size_t item = 0; item < num_items; ++item) work(item, 0u);
    return;
  }
  std::atomic<std::size_t> next{0};
  std::atomic<unsigned> workers{0};
  const auto run = [&] {
    const unsigned worker = workers.fetch_add(1, std::memory_order_relaxed);
    for (std::size_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < num_items;) work(item, worker);
  };
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  run();
#else
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    while (others.size() < threads - 1) others.emplace_back(run);
  } catch (const std::system_error&) {  // no more threads to be had
  }
  run();
  for (std::thread& other : others) other.join();
#endif
}

}  // namespace rl_accel
