#include <string>
#include <vector>

#include <spdlog/spdlog.h>

#include "kernels/device_kind.h"
#include "kernels/emulated/emulated_device.h"
#include "kernels/host/host_device.h"
#include "kernels/machine_file.h"
#include "kernels/simulated/simulated_device.h"

namespace moed {
namespace {

// The emulated device with the memory, and the faults, of a machine.
StatusOr<std::unique_ptr<Device>> open_emulated_machine(std::string_view path, const DeviceOptions& options) {
  MOED_ASSIGN_OR_RETURN(const MachineFile machine, load_machine_file(std::string(path)));
  DeviceOptions limited = options;
  const double gib = machine.device.memory_gib;
  // What is no amount of memory is refused where all such are.
  if (options.memory_gib == 0.0 || options.memory_gib > gib) limited.memory_gib = gib;
  if (options.faults.empty()) limited.faults = machine.faults;
  return open_emulated_device(limited);
}

// CUDA's first GPU where build and machine have one, else the host: a build with CUDA says why.
StatusOr<std::unique_ptr<Device>> open_best_device(const DeviceOptions& options) {
  if (cuda_kind() == nullptr) return open_host_device(options);
  StatusOr<std::unique_ptr<Device>> device = cuda_kind()->open(options);
  if (device.ok() || device.status().code() != StatusCode::kUnavailable) return device;
  spdlog::warn("{}; the CPU serves", device.status().message());
  return open_host_device(options);
}

// A new device is a folder and a row.
constexpr DeviceKind kDevices[] = {
    {"auto", &open_best_device, "", nullptr},
    {"cpu", &open_host_device, "", nullptr},
    {"emulated", &open_emulated_device, "FILE", &open_emulated_machine},
    {"simulated", nullptr, "FILE", &open_simulated_device},
};

}  // namespace

StatusOr<std::unique_ptr<Device>> open_device(std::string_view spec, const DeviceOptions& options) {
  std::vector<const DeviceKind*> kinds;
  for (const DeviceKind& kind : kDevices) kinds.push_back(&kind);
  if (cuda_kind() != nullptr) kinds.push_back(cuda_kind());
  const size_t colon = spec.find(':');
  const std::string_view name = spec.substr(0, colon);
  std::string known;
  for (const DeviceKind* kind : kinds) {
    if (kind->name == name) {
      if (colon == std::string_view::npos && kind->open != nullptr) return kind->open(options);
      if (colon != std::string_view::npos && kind->open_with != nullptr) {
        return kind->open_with(spec.substr(colon + 1), options);
      }
      return invalid_argument("device \"" + std::string(spec) + "\" must be given as " + kind->usage(), "device");
    }
    known += (known.empty() ? "" : ", ") + kind->usage();
  }
  if (name == "cuda") known += "; `make cuda` makes one with cuda";
  return invalid_argument("unknown device \"" + std::string(spec) + "\"; this build has: " + known, "device");
}

}  // namespace moed
