#pragma once

#include <cstdint>

namespace moed {

// Which rows a layer's answer is about: those of a half of a live pass. What was foreseen for some is compared with
// what the same chose.
struct RowsId {
  static constexpr int32_t kPasses = 2;
  static constexpr int32_t kHalves = 2;
  static constexpr int32_t kCount = kPasses * kHalves;
  int32_t pass = 0;  // of the passes alive, [0, kPasses)
  int32_t half = 0;  // [0, kHalves)
  int32_t index() const { return pass * kHalves + half; }
};

}  // namespace moed
