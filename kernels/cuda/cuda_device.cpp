#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>

#include "base/check.h"
#include "kernels/cuda/cuda_context.h"
#include "kernels/cuda/cuda_linear.h"
#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/cuda_stream.h"
#include "kernels/cuda/requirements.h"
#include "kernels/device_kind.h"
#include "kernels/host/host_device.h"

namespace moed::cuda {
namespace {

constexpr double kGib = int64_t{1} << 30;

// What the device is opened with, once it is known to be there.
struct Found {
  int32_t index = 0;
  std::string name;
  std::string text;  // "NVIDIA H200, compute capability 9.0, driver for CUDA 13.0"
  bool kernels_read_pinned = false;
};

// Leaves its workspace to others when it dies.
class OpStream final : public CudaStream {
 public:
  OpStream(Context& context, CudaOps& ops) : CudaStream(context), ops_(ops) {}
  ~OpStream() override { ops_.forget(*this); }

 private:
  CudaOps& ops_;
};

class CudaDevice final : public Device {
 public:
  CudaDevice(std::unique_ptr<Context> context, std::unique_ptr<Device> host, std::unique_ptr<CudaLinear> linear,
             int64_t capacity_bytes, const Found& found, bool deterministic)
      : context_(std::move(context)),
        host_(std::move(host)),
        linear_(std::move(linear)),
        epoch_(*context_),
        memory_(*context_, capacity_bytes),
        ops_(*context_, *linear_, deterministic),
        kernels_read_pinned_(found.kernels_read_pinned) {
    char gib[48];
    std::snprintf(gib, sizeof(gib), "%.2f GiB", static_cast<double>(capacity_bytes) / kGib);
    description_ = "cuda: " + found.text + ", " + gib + "; host " + std::string(host_->description());
  }

  std::string_view description() const override { return description_; }
  bool is_host() const override { return false; }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override {
    MOED_ASSIGN_OR_RETURN(std::byte * data, memory_.allocate(bytes, memory));
    return Buffer(this, data, bytes, memory);
  }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<OpStream>(*context_, ops_); }
  std::unique_ptr<Event> make_event() override {
    return std::make_unique<CudaEvent>(*context_, epoch_, /*timed=*/false);
  }
  std::unique_ptr<Event> make_timed_event() override {
    return std::make_unique<CudaEvent>(*context_, epoch_, /*timed=*/true);
  }
  Ops& ops() override { return ops_; }
  // Those of the host device take no notice of their stream.
  Ops& host_ops() override { return host_->host_ops(); }
  Stream& host_stream() override { return host_stream_; }
  void on_host_work(std::function<void()> tick) override { host_->on_host_work(std::move(tick)); }
  std::unique_ptr<HostAttention> make_host_attention() override { return host_->make_host_attention(); }
  int64_t memory_bytes() const override { return memory_.capacity_bytes(); }
  Status pin(std::byte* data, int64_t bytes) override {
    MOED_CHECK(data != nullptr && bytes > 0) << "pin: " << bytes << " bytes";
    if (!kernels_read_pinned_) {
      return Status(StatusCode::kResourceExhausted, "this GPU does not see pinned memory at the host's addresses");
    }
    return memory_.pin(data, bytes);
  }
  void unpin(std::byte* data) override { memory_.unpin(data); }
  int num_host_threads() const override { return host_->num_host_threads(); }
  void run_host(int64_t count, FunctionRef<void(int64_t index, int thread)> fn) override { host_->run_host(count, fn); }

 private:
  void release(std::byte* data, int64_t size, Memory memory) override { memory_.release(data, size, memory); }

  const std::unique_ptr<Context> context_;
  const std::unique_ptr<Device> host_;
  const std::unique_ptr<CudaLinear> linear_;
  const Epoch epoch_;
  CudaMemory memory_;
  CudaOps ops_;
  HostLaneStream host_stream_;
  const bool kernels_read_pinned_;
  std::string description_;
};

StatusOr<Found> find_device(int32_t index) {
  Offer offer;
  offer.index = index;
  // Each of these may fail for want of a driver; their answers then stay 0, which says so.
  cudaDriverGetVersion(&offer.driver_version);
  cudaRuntimeGetVersion(&offer.runtime_version);
  if (const cudaError_t error = cudaGetDeviceCount(&offer.num_devices); error != cudaSuccess) {
    offer.num_devices = 0;
    offer.refusal = error_text(error);
  }
  cudaDeviceProp properties{};
  if (index < offer.num_devices) {
    const cudaError_t error = cudaGetDeviceProperties(&properties, index);
    if (error != cudaSuccess) {
      return Status(StatusCode::kUnavailable,
                    "device cuda:" + std::to_string(index) + ": the driver does not describe it: " + error_text(error),
                    "device");
    }
    offer.name = properties.name;
    offer.major = properties.major;
    offer.minor = properties.minor;
  }
  cudaGetLastError();
  MOED_RETURN_IF_ERROR(check_offer(offer, parse_architectures(MOED_CUDA_ARCHITECTURES)));
  Found found;
  found.index = index;
  found.name = offer.name;
  found.text = offer.name + ", compute capability " + std::to_string(offer.major) + "." + std::to_string(offer.minor) +
               ", driver for CUDA " + std::to_string(offer.driver_version / 1000) + "." +
               std::to_string(offer.driver_version % 1000 / 10);
  found.kernels_read_pinned = properties.unifiedAddressing != 0 && properties.canUseHostPointerForRegisteredMem != 0;
  return found;
}

// What allocate() may give out: what is free without what kernels and libraries take, at most the cap.
StatusOr<int64_t> capacity_bytes(const Found& found, double memory_gib) {
  size_t free_bytes = 0, all_bytes = 0;
  const cudaError_t error = cudaMemGetInfo(&free_bytes, &all_bytes);
  if (error != cudaSuccess) {
    return Status(StatusCode::kUnavailable,
                  "device cuda:" + std::to_string(found.index) + ": no context: " + error_text(error), "device");
  }
  const double room_gib = static_cast<double>(static_cast<int64_t>(free_bytes) - CudaMemory::kOwnBytes) / kGib;
  if (room_gib <= 0.0 || !(memory_gib >= 0.0)) {
    char text[192];
    std::snprintf(text, sizeof(text), "device memory of %.2f GiB: %s has %.2f GiB free, %.2f of which kernels take",
                  memory_gib, found.name.c_str(), static_cast<double>(free_bytes) / kGib,
                  static_cast<double>(CudaMemory::kOwnBytes) / kGib);
    return invalid_argument(text, "device_memory_gib");
  }
  return std::llround((memory_gib == 0.0 ? room_gib : std::min(memory_gib, room_gib)) * kGib);
}

StatusOr<std::unique_ptr<Device>> open_index(int32_t index, const DeviceOptions& options) {
  MOED_ASSIGN_OR_RETURN(const Found found, find_device(index));
  MOED_ASSIGN_OR_RETURN(auto host, open_host_device(options));
  auto context = std::make_unique<Context>(index);
  context->activate();
  MOED_ASSIGN_OR_RETURN(auto linear, CudaLinear::make());
  MOED_ASSIGN_OR_RETURN(const int64_t bytes, capacity_bytes(found, options.memory_gib));
  auto device = std::make_unique<CudaDevice>(std::move(context), std::move(host), std::move(linear), bytes, found,
                                             options.deterministic);
  return std::unique_ptr<Device>(std::move(device));
}

StatusOr<std::unique_ptr<Device>> open_first(const DeviceOptions& options) { return open_index(0, options); }

StatusOr<std::unique_ptr<Device>> open_chosen(std::string_view argument, const DeviceOptions& options) {
  MOED_ASSIGN_OR_RETURN(const int32_t index, parse_index(argument));
  return open_index(index, options);
}

constexpr DeviceKind kKind{"cuda", &open_first, "N", &open_chosen};

}  // namespace
}  // namespace moed::cuda

namespace moed {

const DeviceKind* cuda_kind() { return &cuda::kKind; }

}  // namespace moed
