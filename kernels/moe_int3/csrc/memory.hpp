// Working memory that stays with the calling thread: allocating it would cost page faults in every call.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace rl_accel::moe_int3 {

// `count` floats at a multiple of 64 bytes, of any value, until the next call with this tag in this thread.
template <int kTag>
float* kept(std::size_t count) {
  struct Aligned {
    void operator()(float* data) const { ::operator delete[](data, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<float[], Aligned> data;
  thread_local std::size_t capacity = 0;
  if (count > capacity) {
    data.reset();
    capacity = 0;
    data.reset(static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t{64})));
    capacity = count;
  }
  return data.get();
}

}  // namespace rl_accel::moe_int3
