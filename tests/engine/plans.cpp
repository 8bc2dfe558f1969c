#include "tests/engine/plans.h"

#include <algorithm>
#include <limits>
#include <memory>

namespace moed {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr int32_t kStagingSlots = 2;
constexpr ExpertCosts kStream{.copy_us = 1.0, .device_row_us = 0.1, .host_base_us = kNever, .host_row_us = kNever};
constexpr ExpertCosts kHost{.copy_us = kNever, .device_row_us = 0.1, .host_base_us = 1.0, .host_row_us = 1.0};
constexpr ExpertCosts kWeighed{.copy_us = 3.0, .device_row_us = 0.1, .host_base_us = 1.0, .host_row_us = 1.0};

constexpr PolicyCase kPolicies[] = {
    {"all_resident", LayerMode::kRouted, kStream, 100, 0},
    {"all_streamed", LayerMode::kWhole, kStream, 0, 0},
    {"all_streamed_wide", LayerMode::kWhole, kStream, 0, 100},
    {"missed_streamed", LayerMode::kRouted, kStream, 0, 0},
    {"all_host", LayerMode::kRouted, kHost, 0, 0},
    {"hot_streamed", LayerMode::kRouted, kStream, 30, 20},
    {"hot_host", LayerMode::kRouted, kHost, 30, 0},
    {"weighed", LayerMode::kRouted, kWeighed, 20, 20},
};

std::vector<ExpertId> random_order(std::vector<ExpertId> experts, std::mt19937_64& random) {
  std::shuffle(experts.begin(), experts.end(), random);
  return experts;
}

}  // namespace

std::vector<ExpertId> all_experts(const ModelConfig& model) {
  std::vector<ExpertId> experts;
  for (ExpertId id; id.layer < model.num_layers; ++id.layer) {
    if (model.layers[id.layer] != LayerKind::kMoe) continue;
    for (id.expert = 0; id.expert < model.moe.num_experts; ++id.expert) experts.push_back(id);
  }
  return experts;
}

std::span<const PolicyCase> policy_cases() { return kPolicies; }

EngineConfig config_of(const PolicyCase& policy, const ModelConfig& model, EngineConfig config) {
  const std::vector<ExpertId> experts = all_experts(model);
  if (experts.empty()) return config;
  const auto count = static_cast<int>(experts.size());
  const auto share = [&](int percent) { return (count * percent + 99) / 100; };
  const auto num_resident = share(policy.resident_percent);
  std::mt19937_64 random(9);
  const std::vector<ExpertId> shuffled = random_order(experts, random);
  config.ring.resident.assign(shuffled.begin(), shuffled.begin() + num_resident);
  config.ring.staging_slots = kStagingSlots;
  config.ring.num_slots = std::min(count, num_resident + std::max(kStagingSlots, share(policy.slots_percent)));
  return config;
}

EngineBox::Planner planner_of(const PolicyCase& policy) {
  return [policy](const ModelConfig& model, int32_t split) {
    StepPlan plan;
    plan.split = split;
    plan.layers.assign(model.num_layers, policy.mode);
    plan.costs = policy.costs;
    return plan;
  };
}

RingConfig random_ring(const ModelConfig& model, RingKind kind, std::mt19937_64& random) {
  RingConfig ring;
  const std::vector<ExpertId> experts = random_order(all_experts(model), random);
  const auto count = static_cast<int32_t>(experts.size());
  if (count == 0 || kind == RingKind::kNone) return ring;
  if (kind == RingKind::kFull) {
    ring.resident = experts;
    ring.num_slots = count;
    return ring;
  }
  const auto below = [&](int32_t limit) { return static_cast<int32_t>(random() % limit); };
  ring.staging_slots = std::min(count, kStagingSlots + below(3));
  ring.resident.assign(experts.begin(), experts.begin() + below(count - ring.staging_slots + 1));
  const int32_t least = ring.staging_slots + static_cast<int32_t>(ring.resident.size());
  ring.num_slots = below(3) == 0 ? least : least + below(count - least + 1);
  ring.cache = below(3) != 0;
  ring.packet_bytes = 512 << below(6);
  return ring;
}

EngineBox::Planner random_planner(const RingConfig& ring, uint64_t seed) {
  const auto random = std::make_shared<std::mt19937_64>(seed);
  const bool has_ring = ring.num_slots > 0;
  const bool full = has_ring && static_cast<int32_t>(ring.resident.size()) == ring.num_slots;
  return [random, has_ring, full](const ModelConfig& model, int32_t split) {
    const auto below = [&](int32_t limit) { return static_cast<int32_t>((*random)() % limit); };
    const auto cost = [&] { return below(4) == 0 ? 0.0 : 0.1 * below(100); };
    StepPlan plan;
    plan.split = split;
    plan.layers.assign(model.num_layers, LayerMode::kRouted);
    plan.costs = {cost(), cost(), cost(), cost()};
    const bool device = has_ring && below(5) != 0;
    if ((device || full) && below(3) == 0) plan.costs.host_base_us = plan.costs.host_row_us = kNever;
    if (!device) {
      plan.costs.copy_us = kNever;
      return plan;
    }
    for (LayerMode& mode : plan.layers) mode = below(2) == 0 ? LayerMode::kWhole : LayerMode::kRouted;
    plan.prefetch = random_order(all_experts(model), *random);
    plan.prefetch.resize(plan.prefetch.empty() ? 0 : below(static_cast<int32_t>(plan.prefetch.size()) + 1));
    return plan;
  };
}

}  // namespace moed
