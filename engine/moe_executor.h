#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/expert_tables.h"
#include "engine/host_lane.h"
#include "engine/running_pass.h"
#include "kernels/ops.h"
#include "model/weights.h"
#include "offload/expert_store.h"
#include "offload/ring.h"
#include "plan/plan.h"

namespace moed {

// What FFNs read. All of it outlives the executor.
struct MoeInputs {
  const ModelConfig& model;
  const DenseViews& weights;
  const ExpertStore& experts;
  ExpertRing* ring = nullptr;  // null: no routed expert ever runs on a device that is not the host
  int32_t ring_slots = 0;
};

// Runs the FFN of a layer on some rows: routes them, groups their (row, choice) pairs by expert, runs each expert where
// the plan's costs say, and adds the outputs up in the order of choices, so that it does not matter where an expert ran
// and which was done first. Dense FFNs and the shared expert are experts that every row chose; they run on the device.
//
// On the device that is the host all experts run in one call and nothing is waited for. Else, in a layer that comes
// whole, every expert passes through the ring in order and the router's answer stays on the device; in a routed one the
// experts that stand in device memory run at once, then the host reads what is missing, runs its share and copies the
// rest. No lease outlives run(): halves and passes cannot wait for each other's slots. Serving thread only.
class MoeExecutor {
 public:
  // device, stream and lane outlive it.
  MoeExecutor(const MoeInputs& inputs, ExpertTables tables, Device& device, Stream& stream, HostLane& lane);

  // Tells the ring what should come next for this pass, once a layer while no other pass comes between.
  void prefetch(RunningPass& pass);
  // residual += FFN(normed). Clobbers the rows' expert buffers.
  void run(int32_t layer, RunningPass& pass, const Half& half);

  int64_t host_expert_rows() const { return host_expert_rows_; }
  int64_t device_expert_rows() const { return device_expert_rows_; }

 private:
  // A layer of a half on its way.
  struct Work {
    int32_t layer;
    RunningPass& pass;
    const Half& half;
    const RowViews rows;
    const HalfTables& tables;
    const int32_t choices;
  };

  // listed: of the plan's, those to look through.
  void want_layers(const StepPlan& plan, std::span<const ExpertId> listed, int32_t begin, int32_t end);
  void run_dense(const Work& work);
  // experts and weights: what the layer's router says of the work's rows.
  void route(const Work& work, int32_t layer, Matrix<int32_t> experts, Matrix<float> weights);
  void group(const Work& work, bool mirror);
  // Whether to ask the next layer's router about this layer's rows: not for experts that are there anyway, nor in
  // halves that have op calls enough. predict() asks it.
  bool wants_prediction(const Work& work) const;
  void predict(const Work& work);
  void count_rows(const Work& work, const int32_t* offsets);
  ExpertFfn device_args(const Work& work) const;
  void run_shared(const Work& work);
  void run_on_host_device(const Work& work);
  void run_whole(const Work& work);
  void run_routed(const Work& work);
  // places_ of all experts, from what the router chose and what was present.
  void place(const Work& work);
  // normed rows to where the host lane reads them.
  void send_normed(const Work& work);
  // The experts that are not in device memory. sent: normed rows are where the host lane reads them.
  void run_missing(const Work& work, bool sent);
  // The host's share.
  void run_hosted(const Work& work);
  // Leases what the ring gives, feeds its copies, enqueues the experts whose copies are. False: nothing was enqueued.
  bool stream_some(const Work& work);
  void finish_streams(const Work& work);
  void enqueue_leases(const Work& work, std::vector<Lease>& leases);
  void combine(const Work& work, bool with_host);
  bool streams(const StepPlan& plan) const;

  const ModelConfig& model_;
  const DenseViews& weights_;
  const ExpertStore& experts_;
  ExpertRing* ring_;
  const int32_t ring_slots_;
  const bool all_fit_;  // each expert has a slot: none need be foreseen
  ExpertTables tables_;
  Device& device_;
  Ops& ops_;
  Stream& stream_;
  HostLane& lane_;
  std::unique_ptr<Event> reached_;
  ExpertPlacer placer_;
  std::vector<Place> places_;      // [num_experts]
  std::vector<int32_t> counts_;    // [num_experts]: rows that chose each
  std::vector<int32_t> streamed_;  // experts to stream, from next_streamed_ on
  std::vector<int32_t> hosted_;    // experts of the host
  size_t next_streamed_ = 0;
  std::vector<Lease> present_;
  std::vector<Lease> pending_;                   // leased, their copies not all enqueued
  std::vector<Lease> submitted_;                 // about to be enqueued
  std::vector<ExpertId> wanted_;                 // what prefetch() asks for
  const RunningPass* prefetched_for_ = nullptr;  // the last pass that prefetch() was for; may be dead
  bool prefetching_ = false;
  int64_t host_expert_rows_ = 0;
  int64_t device_expert_rows_ = 0;
};

}  // namespace moed
