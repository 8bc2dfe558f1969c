#pragma once

#include <cstdlib>
#include <string>
#include <string_view>

namespace moed {

// The device that a test says "emulated" for: MOED_TEST_DEVICE, by which tools/gpu_check.sh takes suites to a GPU, if
// it is set.
inline std::string test_device(std::string_view spec) {
  const char* chosen = spec == "emulated" ? std::getenv("MOED_TEST_DEVICE") : nullptr;
  return chosen == nullptr ? std::string(spec) : chosen;
}

}  // namespace moed
