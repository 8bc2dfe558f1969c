#pragma once

#include "plan/plan.h"
#include "plan/policies.h"

namespace moed {

// What a pass costs on this machine, microseconds.
struct StepCosts {
  double dense_us = 0.0;      // reading once each weight that every pass reads
  double experts_us = 0.0;    // reading once all experts
  double expert_share = 0.0;  // of a layer's experts, those that one row chooses: top_k / num_experts
  double row_us = 0.0;        // products of one row
  // Where link and host share the experts that are absent: of the rate that experts_us is at, the link's share, and the
  // rows of an expert beyond which the host's products take longer than its reading.
  double link_share = 1.0;
  double host_rows = 1.0;
  double context_us = 0.0;   // attention: reading the KV of one token
  double attended_us = 0.0;  // attention: products of one row with one token
};

// Predicts a pass. Pure; thread-compatible. Now the simplest model that can weigh a sweep of the weights against
// products: time = max(sweep, products) + attention, attention = max(KV read, products); the sweep reads the dense
// weights and the experts that some row chooses, as if rows chose independently and evenly; where link and host share
// them, the host's part of the rate falls as its experts' rows become many. The calibrated model of
// performance-model.md takes its place.
class StepModel {
 public:
  StepModel() = default;
  explicit StepModel(const StepCosts& costs) : costs_(costs) {}
  // Every pass sweeps all weights, in sweep_us; attention costs what reading does.
  StepModel(double sweep_us, double row_us, double context_us)
      : costs_{.dense_us = sweep_us, .row_us = row_us, .context_us = context_us} {}

  double predict_us(const StepShape& shape) const;

  // True when rows of `light` should ride in the pass of `heavy` instead of interrupting it: the delay that the light
  // pass's sequences suffer is less than the sweep that sharing saves. A shared pass then takes less than twice what
  // the light one alone would, however heavy the other is. False when light is empty.
  bool share_sweep(const StepShape& light, const StepShape& heavy) const;

  const StepCosts& costs() const { return costs_; }
  // Of all weights.
  double sweep_us() const { return costs_.dense_us + costs_.experts_us; }
  double row_us() const { return costs_.row_us; }
  double context_us() const { return costs_.context_us; }
  // Of the weights that a pass of so many rows reads, and of the host's products with them where it shares the experts.
  double sweep_us(int32_t num_rows) const;
  double attention_us(const StepShape& shape) const;

 private:
  StepCosts costs_;
};

// Follows measured passes. Serving thread only.
//
// The logarithm of measured / predicted, clamped to a factor of 2 either way, moves the model by a share of 1/8 (more
// for the first few passes): a lasting change by a factor of 3 is followed to within 10% in about 20 passes, a single
// outlier moves the model by at most 9%. Each parameter takes the part of the correction that its term has in the
// prediction (both sweeps alike), and stays within a factor of 64 of the prior.
class Tracker {
 public:
  explicit Tracker(StepModel prior) : prior_(prior), model_(prior) {}
  const StepModel& model() const { return model_; }
  // measured_us: wall time of a pass of that shape. Measurements that are not positive are ignored.
  void observe(const StepShape& shape, double measured_us);

 private:
  StepModel prior_;
  StepModel model_;
  int64_t num_observed_ = 0;
};

// A prior from the model's shape, where the policy has weights and KV, and assumptions about the machine: what a pass
// reads comes from device memory, over the link, or from host memory; rows are products of the device where experts
// come to it, which is what they do when rows are many.
StepModel prior_step_model(const ModelConfig& config, const Planning& planning);

}  // namespace moed
