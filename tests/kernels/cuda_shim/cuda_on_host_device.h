#pragma once

#include <memory>

#include "kernels/device.h"

namespace moed {

// The host device with the ops of kernels/cuda, run by cuda_on_host: what the launch functions and the kernels do,
// without what a driver does. Its workspace is as large as they say, and not a byte more.
std::unique_ptr<Device> open_cuda_on_host(bool deterministic);

}  // namespace moed
