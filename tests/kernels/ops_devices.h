#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels/device.h"

namespace moed {

// A device that the op suite runs on.
struct OpsDevice {
  std::string device;
  std::string isa;
  int num_threads = 2;
};

// Each binary of the suite has its own: ops_devices.cpp, or the one of another folder.
std::vector<OpsDevice> ops_devices();
// Those whose bits, when deterministic, must not depend on the batch.
std::vector<OpsDevice> invariant_devices();
StatusOr<std::unique_ptr<Device>> open_ops_device(const OpsDevice& device, bool deterministic);

}  // namespace moed
