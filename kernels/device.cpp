#include "kernels/device.h"

#include <chrono>

namespace moed {

double Device::now_us() const {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace moed
