#pragma once

#include <random>
#include <span>

#include "tests/engine/engine_box.h"

namespace moed {

// The experts of a model, all layers.
std::vector<ExpertId> all_experts(const ModelConfig& model);

// How an engine is set up and what its plans say: the policies that the planner will have, as plans.
struct PolicyCase {
  const char* name;
  LayerMode mode;
  ExpertCosts costs;
  int resident_percent;  // of the experts, always in device memory
  int slots_percent;     // of the experts, beside the resident ones
};
std::span<const PolicyCase> policy_cases();
// Fills in the ring.
EngineConfig config_of(const PolicyCase& policy, const ModelConfig& model, EngineConfig config);
EngineBox::Planner planner_of(const PolicyCase& policy);

// kAny: a ring of random size, from the smallest to all experts, with a random resident set. kNone: no ring. kFull: all
// experts resident.
enum class RingKind : uint8_t { kAny, kNone, kFull };
RingConfig random_ring(const ModelConfig& model, RingKind kind, std::mt19937_64& random);
// Plans that are valid with this ring and else anything: modes, costs with infinities, prefetches.
EngineBox::Planner random_planner(const RingConfig& ring, uint64_t seed);

}  // namespace moed
