#include "kernels/cuda/requirements.h"

#include <charconv>

namespace moed::cuda {
namespace {

// What the kernels are compiled for; newer ones translate the PTX.
constexpr int32_t kMajorMin = 8;
constexpr int32_t kIndexMax = 1023;

std::string version(int32_t number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

Status unavailable(std::string why) {
  return Status(StatusCode::kUnavailable, "device cuda: " + std::move(why), "device");
}

}  // namespace

Status check_offer(const Offer& offer) {
  if (offer.driver_version == 0) return unavailable("no NVIDIA driver on this machine (libcuda.so.1 is not there)");
  // A driver runs all toolkits of its major version.
  if (offer.driver_version / 1000 < offer.runtime_version / 1000) {
    return unavailable("the NVIDIA driver runs CUDA up to " + version(offer.driver_version) +
                       ", this build needs one for CUDA " + std::to_string(offer.runtime_version / 1000) +
                       ".0 or later: update the driver");
  }
  if (offer.num_devices == 0) return unavailable("the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES hides some?)");
  if (offer.index >= offer.num_devices) {
    return invalid_argument("device cuda:" + std::to_string(offer.index) + ": the driver shows " +
                                std::to_string(offer.num_devices) + (offer.num_devices == 1 ? " GPU" : " GPUs") +
                                ", counted from 0",
                            "device");
  }
  if (offer.major < kMajorMin) {
    return unavailable("GPU " + std::to_string(offer.index) + " (" + offer.name + ") has compute capability " +
                       std::to_string(offer.major) + "." + std::to_string(offer.minor) +
                       ", too old: " + std::to_string(kMajorMin) + ".0 or later is needed");
  }
  return {};
}

StatusOr<int32_t> parse_index(std::string_view text) {
  int32_t index = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), index);
  if (error != std::errc() || end != text.data() + text.size() || index < 0 || index > kIndexMax) {
    return invalid_argument("device \"cuda:" + std::string(text) + "\": a number between 0 and " +
                                std::to_string(kIndexMax) + " must follow the colon",
                            "device");
  }
  return index;
}

}  // namespace moed::cuda
