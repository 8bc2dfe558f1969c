#include "tests/kernels/ops_devices.h"

#include "tests/support/test_device.h"

// The op suite on one device (MOED_TEST_DEVICE), whatever the host.
namespace moed {

std::vector<OpsDevice> ops_devices() { return {{"emulated", "default"}}; }

std::vector<OpsDevice> invariant_devices() { return ops_devices(); }

StatusOr<std::unique_ptr<Device>> open_ops_device(const OpsDevice& device, bool deterministic) {
  return open_device(test_device(device.device), {.num_threads = device.num_threads, .deterministic = deterministic});
}

}  // namespace moed
