#pragma once

#include <chrono>
#include <cstdint>

namespace moed {

// Microseconds of a monotonic clock. Pure code takes the time as an argument; only main, the serving loop and the doors
// read it.
inline int64_t now_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace moed
