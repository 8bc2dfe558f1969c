#include "engine/open_engine.h"

#include <utility>

namespace moed {

StatusOr<std::unique_ptr<OpenedEngine>> OpenedEngine::open(const Model& model, const DenseWeights& weights,
                                                           const ExpertStore& experts, const DeviceSpec& spec,
                                                           const EngineConfig& config) {
  DeviceOptions options;
  options.num_threads = spec.num_threads;
  options.deterministic = spec.deterministic;
  options.memory_gib = spec.memory_gib;
  MOED_ASSIGN_OR_RETURN(auto device, open_device(spec.device, options));
  std::unique_ptr<OpenedEngine> opened(new OpenedEngine(std::move(device)));
  MOED_ASSIGN_OR_RETURN(opened->engine_, make_engine(model, weights, experts, *opened->device_, config));
  return opened;
}

OpenedEngine::OpenedEngine(std::unique_ptr<Device> device) : device_(std::move(device)) {}

OpenedEngine::~OpenedEngine() = default;

std::string_view OpenedEngine::description() const { return device_->description(); }

}  // namespace moed
