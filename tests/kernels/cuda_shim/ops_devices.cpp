#include "tests/kernels/ops_devices.h"

#include "tests/kernels/cuda_shim/cuda_on_host_device.h"

namespace moed {

std::vector<OpsDevice> ops_devices() { return {{"cuda_on_host", "shim", 1}}; }

std::vector<OpsDevice> invariant_devices() { return ops_devices(); }

StatusOr<std::unique_ptr<Device>> open_ops_device(const OpsDevice&, bool deterministic) {
  return open_cuda_on_host(deterministic);
}

}  // namespace moed
