#pragma once

#include "plan/plan.h"

namespace moed {

// What a pass costs on this machine. Pure; thread-compatible. Now the simplest model that can weigh a sweep of the
// weights against products: time = max(weight bytes / bandwidth, rows * us a row) + attention. The calibrated model of
// performance-model.md takes its place.
class StepModel {
 public:
  StepModel() = default;
  // sweep_us: reading each weight that a pass touches once. row_us: products of one row. context_us: attention to one
  // token.
  StepModel(double sweep_us, double row_us, double context_us)
      : sweep_us_(sweep_us), row_us_(row_us), context_us_(context_us) {}

  double predict_us(const StepShape& shape) const;

  // True when rows of `light` should ride in the pass of `heavy` instead of interrupting it: the delay that the light
  // pass's sequences suffer is less than the sweep that sharing saves. False when light is empty.
  bool share_sweep(const StepShape& light, const StepShape& heavy) const;

  double sweep_us() const { return sweep_us_; }
  double row_us() const { return row_us_; }
  double context_us() const { return context_us_; }

 private:
  double sweep_us_ = 0.0;
  double row_us_ = 0.0;
  double context_us_ = 0.0;
};

// Follows measured passes. Serving thread only.
//
// The logarithm of measured / predicted, clamped to a factor of 2 either way, moves the model by a share of 1/8 (more
// for the first few passes): a lasting change by a factor of 3 is followed to within 10% in about 20 passes, a single
// outlier moves the model by at most 9%. Each parameter takes the part of the correction that its term has in the
// prediction, and stays within a factor of 64 of the prior.
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

// A prior from the model's shape and plain assumptions about the machine (bytes/us a pass can read, FLOP/us it can do).
StepModel prior_step_model(const ModelConfig& config, double bytes_per_us, double flops_per_us);

}  // namespace moed
