#include "kernels/cuda/requirements.h"

#include <algorithm>
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

// Code runs as it is; PTX only where the driver knows the language of the toolkit that wrote it, minor number included.
Status check_kernels(const Offer& offer, const Compiled& compiled) {
  if (compiled.code.empty() && compiled.ptx.empty()) return {};
  const int32_t capability = 10 * offer.major + offer.minor;
  const auto runs = [&](int32_t code) { return code / 10 == offer.major && code <= capability; };
  if (std::any_of(compiled.code.begin(), compiled.code.end(), runs)) return {};
  const std::string gpu = "GPU " + std::to_string(offer.index) + " (" + offer.name + ") has compute capability " +
                          std::to_string(offer.major) + "." + std::to_string(offer.minor);
  const std::string build = "build with ARCHS=" + std::to_string(capability);
  if (std::none_of(compiled.ptx.begin(), compiled.ptx.end(), [&](int32_t ptx) { return ptx <= capability; })) {
    return unavailable(gpu + ", for which this build has no kernels: " + build);
  }
  if (offer.driver_version >= offer.runtime_version) return {};
  return unavailable(gpu + ", for which the driver would have to translate kernels of CUDA " +
                     version(offer.runtime_version) + ", but it knows CUDA up to " + version(offer.driver_version) +
                     ": update the driver or " + build);
}

}  // namespace

Compiled parse_architectures(std::string_view text) {
  Compiled compiled;
  while (!text.empty()) {
    const std::string_view item = text.substr(0, text.find(','));
    text.remove_prefix(std::min(item.size() + 1, text.size()));
    int32_t number = 0;
    const auto [end, error] = std::from_chars(item.data(), item.data() + item.size(), number);
    const std::string_view kind = item.substr(end - item.data());
    if (error != std::errc() || !(kind.empty() || kind == "-real" || kind == "-virtual")) return {};
    if (kind != "-virtual") compiled.code.push_back(number);
    if (kind != "-real") compiled.ptx.push_back(number);
  }
  return compiled;
}

Status check_offer(const Offer& offer, const Compiled& compiled) {
  if (offer.driver_version == 0) return unavailable("no NVIDIA driver on this machine (libcuda.so.1 is not there)");
  // A driver runs what all toolkits of its major version compiled; what it has to translate is another matter.
  if (offer.driver_version / 1000 < offer.runtime_version / 1000) {
    return unavailable("the NVIDIA driver runs CUDA up to " + version(offer.driver_version) +
                       ", this build needs one for CUDA " + std::to_string(offer.runtime_version / 1000) +
                       ".0 or later: update the driver");
  }
  if (offer.num_devices == 0) {
    return unavailable("the NVIDIA driver shows no GPU (" +
                       (offer.refusal.empty() ? "CUDA_VISIBLE_DEVICES hides some?" : offer.refusal) + ")");
  }
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
  return check_kernels(offer, compiled);
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
