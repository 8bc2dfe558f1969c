#include "tests/kernels/ops_devices.h"

#include "tests/kernels/cases.h"

namespace moed {

std::vector<OpsDevice> ops_devices() {
  std::vector<OpsDevice> devices;
  for (const char* device : {"cpu", "emulated"}) {
    for (const std::string& isa : cases::supported_isas()) devices.push_back({device, isa});
  }
  return devices;
}

std::vector<OpsDevice> invariant_devices() {
  std::vector<OpsDevice> devices;
  for (const std::string& isa : cases::supported_isas()) {
    for (const int threads : {1, 2, 3}) devices.push_back({"cpu", isa, threads});
  }
  return devices;
}

StatusOr<std::unique_ptr<Device>> open_ops_device(const OpsDevice& device, bool deterministic) {
  return open_device(device.device,
                     {.num_threads = device.num_threads, .deterministic = deterministic, .isa = device.isa});
}

}  // namespace moed
