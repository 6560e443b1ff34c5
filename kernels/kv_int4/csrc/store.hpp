// Store of one head: rotates and quantizes K and V of a token and writes them into its page.
#pragma once

#include "maths.hpp"

namespace rl_accel::kv_int4 {
namespace {

constexpr u16 kNan16 = 0x7E00;

struct Token {
  u16 scale, offset;
};

// Writes codes of x, a byte each.
template <class Isa>
Token quantize(u8* codes, const float* x, size_t count, float max_code) {
  auto lows = Isa::load(x), highs = lows;
  for (size_t i = kLanes; i < count; i += kLanes) {
    lows = Isa::min(lows, Isa::load(x + i));
    highs = Isa::max(highs, Isa::load(x + i));
  }
  const float low = Isa::lowest(lows) + 0.0f, high = Isa::highest(highs) + 0.0f;  // no negative zeros
  const u16 offset = Isa::to_half(low), scale = Isa::to_half((high - low) / max_code);
  const float offset_read = Isa::from_half(offset), scale_read = Isa::from_half(scale);
  const bool bad = not_finite<Isa>(x, count) + offset_read * 0.0f + scale_read * 0.0f != 0.0f;
  if (bad || scale_read == 0.0f) {
    std::memset(codes, 0, count);
    return bad ? Token{kNan16, kNan16} : Token{scale, offset};
  }
  for (size_t i = 0; i < count; i += kLanes) {
    const auto steps = Isa::div(Isa::sub(Isa::load(x + i), Isa::set(offset_read)), Isa::set(scale_read));
    const auto inside = Isa::max(Isa::min(steps, Isa::set(max_code)), Isa::set(0.0f));
    Isa::store_bytes(codes + i, Isa::round(inside));
  }
  return {scale, offset};
}

// The code of 8 dims each 4 bits, or of 4 dims each 8.
template <int kBits>
u32 word(const u8* codes) {
  if constexpr (kBits == 8) {
    u32 out;
    std::memcpy(&out, codes, sizeof out);
    return out;
  } else {
    std::uint64_t x;
    std::memcpy(&x, codes, sizeof x);
    x = (x | x >> 4) & 0x00FF00FF00FF00FF;
    x = (x | x >> 8) & 0x0000FFFF0000FFFF;
    return static_cast<u32>(x | x >> 16);
  }
}

template <int kBits>
void write_token(u8* half, const Layout& layout, size_t position, Token token) {
  u16* scales = reinterpret_cast<u16*>(half + layout.code_bytes());
  scales[position] = token.scale;
  scales[layout.block_size + position] = token.offset;
}

template <class Isa, int kBits>
void store_head(const Store& task, size_t head, size_t part, size_t num_parts, Scratch& scratch) {
  constexpr size_t kCodes = 32 / kBits;
  constexpr u32 kMask = (1u << kBits) - 1;
  const Layout& layout = task.layout;
  const size_t d = layout.head_size;
  float* x = scratch.values;
  u8* codes = scratch.codes;
  for (size_t n = 0; n < task.num_tokens; ++n) {
    if (task.slots[n] < 0) continue;
    const size_t slot = static_cast<size_t>(task.slots[n]);
    if (num_parts > 1 && slot / kLanes % num_parts != part) continue;
    const size_t position = slot % layout.block_size;
    u8* k_half = task.pages + (slot / layout.block_size * task.num_heads + head) * layout.page_bytes();
    u8* v_half = k_half + layout.half_bytes();

    read<Isa>(x, task.k.data, task.dtype, n * task.k.stride + head * d, d);
    if (task.shift)
      for (size_t i = 0; i < d; i += kLanes)
        Isa::store(x + i, Isa::sub(Isa::load(x + i), Isa::load(task.shift + head * d + i)));
    rotate<Isa>(x, d, task.order);
    write_token<kBits>(k_half, layout, position, quantize<Isa>(codes, x, d, kMask));
    u32* k_words = reinterpret_cast<u32*>(k_half) + position / kLanes * (d / kCodes) * kLanes + position % kLanes;
    for (size_t i = 0; i < d / kCodes; ++i) k_words[i * kLanes] = word<kBits>(codes + i * kCodes);

    read<Isa>(x, task.v.data, task.dtype, n * task.v.stride + head * d, d);
    write_token<kBits>(v_half, layout, position, quantize<Isa>(codes, x, d, kMask));
    u32* v_words = reinterpret_cast<u32*>(v_half) + position / kCodes * kLanes;
    const u32 shift = static_cast<u32>(position % kCodes) * kBits, others = ~(kMask << shift);
    for (size_t i = 0; i < d; i += kLanes, v_words += layout.block_size / kCodes * kLanes)
      for (size_t lane = 0; lane < kLanes; ++lane)
        v_words[lane] = (v_words[lane] & others) | static_cast<u32>(codes[i + lane]) << shift;
  }
}

}  // namespace
}  // namespace rl_accel::kv_int4
