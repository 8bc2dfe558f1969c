#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "kernels/device.h"

namespace moed {

// A kind of device. A spec is "name" or "name:argument"; a kind takes either or both.
struct DeviceKind {
  std::string_view name;
  StatusOr<std::unique_ptr<Device>> (*open)(const DeviceOptions& options);
  std::string_view argument;
  StatusOr<std::unique_ptr<Device>> (*open_with)(std::string_view argument, const DeviceOptions& options);

  std::string usage() const {
    const std::string text(name);
    if (open_with == nullptr) return text;
    const std::string with = ":" + std::string(argument);
    return open == nullptr ? text + with : text + "[" + with + "]";
  }
};

// Null in a build without CUDA. Which of the two definitions a binary has, CMake decides (MOED_CUDA).
const DeviceKind* cuda_kind();

}  // namespace moed
