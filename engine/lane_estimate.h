#pragma once

#include <utility>

#include "engine/step.h"

namespace moed {

// Completes the times of passes, one after another, for sums: a pass whose lanes were measured stands, with its shares,
// for itself and for those before it whose lanes were not. What is added to the lanes is then what was added to
// total_us, but for the passes since the last that was measured. One thread.
class LaneEstimate {
 public:
  // What to add to sums. Times of the host lane and total_us are as measured.
  StepTimes of(const StepTimes& times) {
    StepTimes estimate = times;
    if (!times.lanes_measured) {
      unmeasured_us_ += times.total_us;
      return estimate;
    }
    // A pass that took no time (all of its sequences left) has no shares to give.
    if (times.total_us <= 0.0) return estimate;
    const double scale = (std::exchange(unmeasured_us_, 0.0) + times.total_us) / times.total_us;
    for (double StepTimes::*lane :
         {&StepTimes::attention_us, &StepTimes::experts_us, &StepTimes::dense_us, &StepTimes::sample_us}) {
      estimate.*lane *= scale;
    }
    return estimate;
  }

 private:
  double unmeasured_us_ = 0.0;
};

}  // namespace moed
