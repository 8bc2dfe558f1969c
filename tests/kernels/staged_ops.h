#pragma once

#include "kernels/op_ranges.h"

namespace moed {

// Takes calls whose arguments lie in ordinary host memory to a device and the results back: each range that the call
// names is copied to a device buffer of its own, each table to mapped memory. Bytes that a call does not say it reads
// arrive as NaN, so an op that says too little fails its test. Returns when the op has run.
class StagedOps final : public QueuedOps {
 public:
  explicit StagedOps(Device& device) : device_(device) {}
  Status reserve(const OpLimits& limits) override { return device_.ops().reserve(limits); }

 private:
  void enqueue(OpCall call, Stream& stream) override;
  Device& device_;
};

}  // namespace moed
