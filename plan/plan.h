#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "base/status.h"
#include "model/config.h"

namespace moed {

// Where an expert runs: already in device memory; copied through the ring, then on the device; or where its weights
// are.
enum class Place : uint8_t { kResident, kStreamed, kHost };

// whole: all experts of the layer come, no answer of the router is needed on the host. routed: only those that rows
// chose.
enum class LayerMode : uint8_t { kWhole, kRouted };

// Marginal costs with which place_experts weighs places at a layer; infinity forbids one.
struct ExpertCosts {
  double copy_us = std::numeric_limits<double>::infinity();
  double device_row_us = std::numeric_limits<double>::infinity();
  double host_base_us = 0.0;
  double host_row_us = 1.0;
};

// What a pass looks like to the planner: numbers only.
struct StepShape {
  int32_t num_sequences = 0;
  int32_t num_rows = 0;         // new tokens of all sequences
  int32_t num_sampled = 0;      // rows that need logits
  int64_t context_tokens = 0;   // sum over sequences of tokens that attention reads
  int64_t attended_tokens = 0;  // sum over rows of the tokens that a row attends to

  // A sequence's rows of tokens [num_cached, num_cached + num_new).
  void add(int32_t num_cached, int32_t num_new, bool samples) {
    ++num_sequences;
    num_rows += num_new;
    num_sampled += samples ? 1 : 0;
    context_tokens += num_cached + num_new;
    attended_tokens += int64_t{num_new} * num_cached + int64_t{num_new} * (num_new + 1) / 2;
  }
};

// What the engine is to do in one pass. A value: policies make it, validate() checks it, the engine carries out any
// valid one.
struct StepPlan {
  int32_t split = 0;               // index of the sequence that begins the second half; num_sequences: one half
  std::vector<LayerMode> layers;   // [num_layers]
  std::vector<ExpertId> prefetch;  // in the order in which they should come
  ExpertCosts costs;
};

// The plan of a box without a device: one half, every expert where its weights are.
StepPlan host_plan(const StepShape& shape, const ModelConfig& config);

// Gives each expert of a layer that rows want a place, so that the makespan over {copies, host, device} is small: experts
// sorted by rows, the cut between host and device swept, then one swap. rows: [num_experts] that want it; places:
// [num_experts], kResident where it stands in device memory (kept), anything elsewhere. Ties go to the lower expert.
// Source: performance-model notes, "three places for an expert". Does not allocate beyond the first call's sizes.
class ExpertPlacer {
 public:
  void place(const ExpertCosts& costs, std::span<const int32_t> rows, std::span<Place> places);

 private:
  std::vector<int32_t> order_;
};

// Errors name the field, and layer and expert where there is one.
Status validate(const StepPlan& plan, const StepShape& shape, const ModelConfig& config);

}  // namespace moed
