#include "engine/open_engine.h"

#include <cmath>
#include <utility>

#include "kernels/machine_file.h"

namespace moed {

StatusOr<std::unique_ptr<OpenedEngine>> OpenedEngine::open(const DeviceSpec& spec) {
  DeviceOptions options;
  options.num_threads = spec.num_threads;
  options.deterministic = spec.deterministic;
  options.memory_gib = spec.memory_gib;
  options.seed = spec.seed;
  options.router = spec.router;
  MOED_ASSIGN_OR_RETURN(auto device, open_device(spec.device, options));
  DeviceTrace* trace = nullptr;
  if (spec.traced) {
    auto traced = std::make_unique<TracedDevice>(std::move(device));
    trace = &traced->trace();
    device = std::move(traced);
  }
  std::unique_ptr<OpenedEngine> opened(new OpenedEngine(std::move(device)));
  opened->trace_ = trace;
  return opened;
}

Status OpenedEngine::start(const Model& model, const DenseWeights& weights, const ExpertStore& experts,
                           const EngineConfig& config) {
  MOED_ASSIGN_OR_RETURN(engine_, make_engine(model, weights, experts, *device_, config));
  return Status();
}

OpenedEngine::OpenedEngine(std::unique_ptr<Device> device) : device_(std::move(device)), pins_(*device_) {}

OpenedEngine::~OpenedEngine() = default;

int64_t OpenedEngine::device_memory_bytes() const { return device_->is_host() ? 0 : device_->memory_bytes(); }

std::string_view OpenedEngine::description() const { return device_->description(); }

int64_t OpenedEngine::host_memory_bytes() const {
  return std::llround(device_->machine()->host.memory_gib * (1 << 30));
}

MachineProfile OpenedEngine::profile() const {
  constexpr double kBytesPerUs = 1e3;  // of a GB/s
  const MachineFile& machine = *device_->machine();
  MachineProfile profile;
  profile.link_bytes = machine.link.h2d_gb_s * kBytesPerUs;
  profile.device_bytes = machine.device.dram_gb_s * kBytesPerUs;
  profile.device_flops = machine.device.bf16_tflops * 1e6;
  profile.host_bytes = machine.host.dram_gb_s * kBytesPerUs;
  profile.host_flops = machine.host.bf16_gflops * 1e3;
  profile.attention_bytes = machine.host.attention_gb_s * kBytesPerUs;
  profile.attention_flops = machine.host.attention_gflops * 1e3;
  for (const InterferencePoint& point : machine.interference) {
    profile.interference.push_back({point.dram_share, point.link_share});
  }
  return profile;
}

}  // namespace moed
