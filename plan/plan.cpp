#include "plan/plan.h"

#include <cmath>
#include <set>
#include <string>

namespace moed {
namespace {

std::string name_of(ExpertId id) {
  return "layer " + std::to_string(id.layer) + ", expert " + std::to_string(id.expert);
}

Status validate_costs(const ExpertCosts& costs) {
  const std::pair<const char*, double> fields[] = {{"costs.copy_us", costs.copy_us},
                                                   {"costs.device_row_us", costs.device_row_us},
                                                   {"costs.host_base_us", costs.host_base_us},
                                                   {"costs.host_row_us", costs.host_row_us}};
  for (const auto& [name, value] : fields) {
    if (!(value >= 0.0)) return invalid_argument(std::string(name) + " must not be negative or NaN", name);
  }
  const bool host = std::isfinite(costs.host_base_us) && std::isfinite(costs.host_row_us);
  const bool device = std::isfinite(costs.copy_us) && std::isfinite(costs.device_row_us);
  if (!host && !device) {
    return invalid_argument("costs forbid both the host and the device: an absent expert would have no place", "costs");
  }
  return Status();
}

Status validate_prefetch(const StepPlan& plan, const ModelConfig& config) {
  std::set<ExpertId> seen;
  for (const ExpertId id : plan.prefetch) {
    if (id.layer < 0 || id.layer >= config.num_layers) {
      return invalid_argument(
          "prefetch names " + name_of(id) + "; the model has " + std::to_string(config.num_layers) + " layers",
          "prefetch");
    }
    if (config.layers[id.layer] != LayerKind::kMoe) {
      return invalid_argument("prefetch names " + name_of(id) + "; that layer has no experts", "prefetch");
    }
    if (id.expert < 0 || id.expert >= config.moe.num_experts) {
      return invalid_argument(
          "prefetch names " + name_of(id) + "; the layer has " + std::to_string(config.moe.num_experts) + " experts",
          "prefetch");
    }
    if (!seen.insert(id).second) return invalid_argument("prefetch names " + name_of(id) + " twice", "prefetch");
  }
  return Status();
}

}  // namespace

StepPlan host_plan(const StepShape& shape, const ModelConfig& config) {
  StepPlan plan;
  plan.split = shape.num_sequences;
  plan.layers.assign(config.num_layers, LayerMode::kRouted);
  return plan;
}

Status validate(const StepPlan& plan, const StepShape& shape, const ModelConfig& config) {
  if (plan.split < 1 || plan.split > shape.num_sequences) {
    return invalid_argument("split " + std::to_string(plan.split) + " is not within the pass's " +
                                std::to_string(shape.num_sequences) + " sequences",
                            "split");
  }
  if (static_cast<int64_t>(plan.layers.size()) != config.num_layers) {
    return invalid_argument("layers has " + std::to_string(plan.layers.size()) + " modes; the model has " +
                                std::to_string(config.num_layers) + " layers",
                            "layers");
  }
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    const LayerMode mode = plan.layers[layer];
    if (mode != LayerMode::kWhole && mode != LayerMode::kRouted) {
      return invalid_argument("layers[" + std::to_string(layer) + "] is no mode", "layers");
    }
  }
  MOED_RETURN_IF_ERROR(validate_prefetch(plan, config));
  return validate_costs(plan.costs);
}

}  // namespace moed
