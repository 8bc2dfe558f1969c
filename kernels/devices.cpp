#include <string>

#include "kernels/device.h"
#include "kernels/emulated/emulated_device.h"
#include "kernels/host/host_device.h"

namespace moed {
namespace {

struct DeviceKind {
  std::string_view name;
  StatusOr<std::unique_ptr<Device>> (*open)(const DeviceOptions& options);
};

// A new device is a folder and a row.
constexpr DeviceKind kDevices[] = {
    {"cpu", &open_host_device},
    {"emulated", &open_emulated_device},
};

}  // namespace

StatusOr<std::unique_ptr<Device>> open_device(std::string_view spec, const DeviceOptions& options) {
  if (spec.starts_with("emulated:")) {
    return invalid_argument("device \"" + std::string(spec) + "\": machine files are not read yet; use \"emulated\"",
                            "device");
  }
  std::string known;
  for (const DeviceKind& kind : kDevices) {
    if (kind.name == spec) return kind.open(options);
    known += (known.empty() ? "" : ", ") + std::string(kind.name);
  }
  return invalid_argument("unknown device \"" + std::string(spec) + "\"; this build has: " + known, "device");
}

}  // namespace moed
