#pragma once

#include <cmath>
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

  // Whether an absent expert may be copied and run on the device; whether it may run on the host.
  bool device_allowed() const { return std::isfinite(copy_us) && std::isfinite(device_row_us); }
  bool host_allowed() const { return std::isfinite(host_base_us) && std::isfinite(host_row_us); }
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

// What of the experts stands in device memory while the daemon runs.
struct Residency {
  bool has_device = false;         // with memory of its own
  int32_t num_slots = 0;           // experts that it holds at once: resident, kept for a while, passing through
  std::vector<ExpertId> resident;  // that never leave it; ascending, each once
};

// The plan of a box without a device: one half, every expert where its weights are.
StepPlan host_plan(const StepShape& shape, const ModelConfig& config);

// Gives each expert of a layer that rows want a place, so that the layer's makespan is small: the host runs its experts
// one after another, each host_base_us and host_row_us a row; copies follow each other, copy_us each, the experts with
// most rows first; the device runs the resident experts, then each streamed one when it is there, device_row_us a row.
// Experts are sorted by rows and a cut between the streamed and the host's is swept, with the streamed ones at either
// end of the order; then, at the best cut and the two beside it, the pair that should change places is looked for.
// Source: performance-model notes, "three places for an expert". Serving thread only.
class ExpertPlacer {
 public:
  // rows: [num_experts] that want each. places: [num_experts]; kResident where the expert stands in device memory, and
  // so it stays; the others become kStreamed or kHost, those that no row wants kHost. Costs that forbid the device
  // leave all to the host, whatever they say of the host. Among equal rows the lower expert comes first. Allocates only
  // when num_experts grows.
  void place(const ExpertCosts& costs, std::span<const int32_t> rows, std::span<Place> places);

 private:
  struct Cut;
  struct Ends {
    double host_us = 0.0;
    double device_us = 0.0;
    double makespan_us() const { return host_us > device_us ? host_us : device_us; }
  };
  void sort_absent(std::span<const int32_t> rows, std::span<Place> places);
  double host_us(const ExpertCosts& costs, int32_t count, int64_t rows) const;
  double device_us(const ExpertCosts& costs, int32_t count, int64_t rows, int32_t last_rows) const;
  Ends ends(const ExpertCosts& costs, const Cut& cut) const;
  Cut best_cut(const ExpertCosts& costs) const;
  void swap_one(const ExpertCosts& costs, Cut& cut) const;

  // Absent experts that rows want: most rows first, then the lower expert.
  struct Absent {
    int32_t expert;
    int32_t rows;
  };
  std::vector<Absent> order_;
  std::vector<Absent> unsorted_;
  std::vector<int64_t> rows_before_;  // [order_ + 1]: of those before each
  int64_t resident_rows_ = 0;
  double resident_us_ = 0.0;
};

// Errors name the field, and layer and expert where there is one. Contradictions count: layers that come whole and
// prefetches need copies; an expert that is neither on the device nor allowed on the host needs them too.
Status validate(const StepPlan& plan, const StepShape& shape, const ModelConfig& config, const Residency& residency);

}  // namespace moed
