#include "tests/kernels/ops_devices.h"

#include "tests/kernels/cases.h"

namespace moed {
namespace {

// The GPU, where the build knows one and the machine has it.
void add_cuda(std::vector<OpsDevice>& devices) {
  static const bool there = open_device("cuda", {.num_threads = 1}).ok();
  if (there) devices.push_back({"cuda", "gpu"});
}

}  // namespace

std::vector<OpsDevice> ops_devices() {
  std::vector<OpsDevice> devices;
  for (const char* device : {"cpu", "emulated"}) {
    for (const std::string& isa : cases::supported_isas()) devices.push_back({device, isa});
  }
  add_cuda(devices);
  return devices;
}

std::vector<OpsDevice> invariant_devices() {
  std::vector<OpsDevice> devices;
  for (const std::string& isa : cases::supported_isas()) {
    for (const int threads : {1, 2, 3}) devices.push_back({"cpu", isa, threads});
  }
  add_cuda(devices);
  return devices;
}

StatusOr<std::unique_ptr<Device>> open_ops_device(const OpsDevice& device, bool deterministic) {
  DeviceOptions options{.num_threads = device.num_threads, .deterministic = deterministic};
  if (device.device != "cuda") options.isa = device.isa;
  return open_device(device.device, options);
}

}  // namespace moed
