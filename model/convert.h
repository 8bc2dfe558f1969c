#pragma once

#include <bit>
#include <cstdint>

namespace moed {

// IEEE half to float, exactly, subnormals, infinities and NaN included. Shifting the bits into a float's place leaves
// the exponent 112 short.
inline float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffU) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112F;
  const uint32_t finite = std::bit_cast<uint32_t>(scaled);
  const uint32_t bits = (half & 0x7c00U) == 0x7c00U ? (magnitude | 0x7f800000U) : finite;
  return std::bit_cast<float>(bits | sign);
}

}  // namespace moed
