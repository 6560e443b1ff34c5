// Python face of the KV cache: addresses and sizes in, which cpp.py takes from tensors; Python's lock is released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "kv_int4.hpp"

namespace nb = nanobind;
using namespace rl_accel::kv_int4;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address data) {
  return reinterpret_cast<T*>(data);
}

}  // namespace

NB_MODULE(_kv_int4, m) {
  m.doc() = "KV cache with codes of 4 or 8 bits; see kernels/kv_int4/README.md";
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "store",
      [](Address pages, std::size_t block_size, std::size_t head_size, int bits, std::size_t num_heads, Address slots,
         std::size_t num_tokens, Address k, std::size_t k_stride, Address v, std::size_t v_stride, int dtype,
         Address shift, std::size_t order, unsigned threads) {
        store({pointer<std::uint8_t>(pages),
               {block_size, head_size, bits},
               num_heads,
               pointer<const std::int64_t>(slots),
               num_tokens,
               {pointer<const void>(k), k_stride},
               {pointer<const void>(v), v_stride},
               static_cast<Dtype>(dtype),
               pointer<const float>(shift),
               order},
              threads);
      },
      Unlocked());
  m.def(
      "attend",
      [](Address out, std::size_t out_stride, Address query, std::size_t query_stride, int dtype, std::size_t num_heads,
         std::size_t num_kv_heads, Address pages, std::size_t block_size, std::size_t head_size, int bits,
         Address block_table, std::size_t table_stride, Address query_start, Address seq_lens, std::size_t num_requests,
         float scale, std::size_t order, unsigned threads) {
        attend({pointer<void>(out),
                out_stride,
                {pointer<const void>(query), query_stride},
                static_cast<Dtype>(dtype),
                num_heads,
                num_kv_heads,
                pointer<const std::uint8_t>(pages),
                {block_size, head_size, bits},
                pointer<const std::int32_t>(block_table),
                table_stride,
                pointer<const std::int32_t>(query_start),
                pointer<const std::int32_t>(seq_lens),
                num_requests,
                scale,
                order},
               threads);
      },
      Unlocked());
  m.def("set_instructions", [](const std::string& name) {
    if (!set_instructions(name.c_str())) throw std::invalid_argument("this CPU has no instruction set " + name);
  });
  m.def("instructions", &instructions);
  m.attr("MAX_HEAD_SIZE") = kMaxHead;
}
