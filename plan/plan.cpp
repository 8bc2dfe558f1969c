#include "plan/plan.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

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
  return Status();
}

Status validate_layers(const StepPlan& plan, const ModelConfig& config) {
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
  return Status();
}

Status validate_prefetch(const StepPlan& plan, const ModelConfig& config) {
  std::vector<bool> seen(static_cast<size_t>(config.num_layers) * config.moe.num_experts);
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
    const size_t index = static_cast<size_t>(id.layer) * config.moe.num_experts + id.expert;
    if (seen[index]) return invalid_argument("prefetch names " + name_of(id) + " twice", "prefetch");
    seen[index] = true;
  }
  return Status();
}

// The layer's first expert that is not resident; nothing when all are.
std::optional<ExpertId> first_absent(const Residency& residency, const ModelConfig& config, int32_t layer) {
  auto next = std::lower_bound(residency.resident.begin(), residency.resident.end(), ExpertId{layer, 0});
  for (int32_t expert = 0; expert < config.moe.num_experts; ++expert) {
    if (next == residency.resident.end() || *next != ExpertId{layer, expert}) return ExpertId{layer, expert};
    ++next;
  }
  return std::nullopt;
}

// Whether the plan asks for nothing that its own costs, or the device, rule out.
Status validate_places(const StepPlan& plan, const ModelConfig& config, const Residency& residency) {
  const bool copies = plan.costs.device_allowed() && residency.has_device && residency.num_slots > 0;
  if (copies) return Status();
  const std::string why = !residency.has_device       ? "there is no device"
                          : residency.num_slots == 0  ? "the device has no slots for experts"
                          : plan.costs.host_allowed() ? "costs forbid copies or the device"
                                                      : "costs forbid both the host and the device";
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    if (config.layers[layer] != LayerKind::kMoe) continue;
    const bool whole = plan.layers[layer] == LayerMode::kWhole;
    if (!whole && plan.costs.host_allowed()) continue;
    const std::optional<ExpertId> absent = first_absent(residency, config, layer);
    if (!absent.has_value()) continue;
    return invalid_argument(
        name_of(*absent) + " would have no place: " + (whole ? "the layer is to come whole, but " : "") + why,
        whole && plan.costs.host_allowed() ? "layers" : "costs");
  }
  if (plan.prefetch.empty()) return Status();
  return invalid_argument("prefetch names " + name_of(plan.prefetch.front()) + ", but " + why, "prefetch");
}

}  // namespace

StepPlan host_plan(const StepShape& shape, const ModelConfig& config) {
  StepPlan plan;
  plan.split = shape.num_sequences;
  plan.layers.assign(config.num_layers, LayerMode::kRouted);
  return plan;
}

Status validate(const StepPlan& plan, const StepShape& shape, const ModelConfig& config, const Residency& residency) {
  if (plan.split < 1 || plan.split > shape.num_sequences) {
    return invalid_argument("split " + std::to_string(plan.split) + " is not within the pass's " +
                                std::to_string(shape.num_sequences) + " sequences",
                            "split");
  }
  MOED_RETURN_IF_ERROR(validate_layers(plan, config));
  MOED_RETURN_IF_ERROR(validate_prefetch(plan, config));
  MOED_RETURN_IF_ERROR(validate_costs(plan.costs));
  return validate_places(plan, config, residency);
}

}  // namespace moed
