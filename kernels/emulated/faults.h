#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/status.h"

namespace moed {

// What is to go wrong on an emulated device, for tests of those who must survive it.
class Faults {
 public:
  enum class Kind : uint8_t { kCopy, kLaunch, kLost, kMemory };

  // "KIND:N", several of them behind commas: the N-th of its kind fails, counted from 1 in the order of enqueueing.
  // copy: copies of streams; launch: ops of streams; lost: both together; memory: allocations of any kind of memory.
  // Errors: kInvalidArgument.
  static StatusOr<Faults> parse(std::string_view text);

  // Counts one more of the kind. True: this one fails.
  bool hit(Kind kind) { return ++counts_[static_cast<size_t>(kind)] == at_[static_cast<size_t>(kind)]; }

 private:
  std::array<int64_t, 4> counts_{};
  std::array<int64_t, 4> at_{};  // 0: never
};

}  // namespace moed
