#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/pass_buffers.h"
#include "engine/step_clock.h"
#include "kernels/ops.h"
#include "model/weights.h"
#include "offload/expert_store.h"

namespace moed {

// Runs the FFN of a layer on some rows: routes them, groups their (row, choice) pairs by expert, runs each expert once
// for all its rows, and adds the outputs up in the order of choices, so that it does not matter which expert was done
// first. Dense FFNs and the shared expert are experts that every row chose. Serving thread only; allocates at
// construction alone.
class MoeExecutor {
 public:
  MoeExecutor(const ModelConfig& model, const DenseWeights& weights, const ExpertStore& experts, Device& device,
              Stream& stream);

  // residual += FFN(normed). Clobbers the rows' expert buffers.
  void run(int32_t layer, const RowViews& rows, StepClock& clock);

 private:
  void run_dense(const LayerWeights& weights, const RowViews& rows);
  void route(const LayerWeights& weights, const RowViews& rows);
  std::span<const ExpertWork> group(int32_t layer, const RowViews& rows);
  void run_shared(int32_t layer, const LayerWeights& weights, const RowViews& rows);
  void run_works(std::span<const ExpertWork> works, int32_t choices, const RowViews& rows);

  const ModelConfig& model_;
  const DenseWeights& weights_;
  const ExpertStore& experts_;
  Device& device_;
  Ops& ops_;
  Stream& stream_;
  std::unique_ptr<Event> routed_;
  std::vector<int32_t> pair_ends_;  // [num_experts]: while sorting, where an expert's next pair goes
  std::vector<ExpertWork> works_;
};

}  // namespace moed
