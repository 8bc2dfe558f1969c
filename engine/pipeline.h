#pragma once

#include <memory>

#include "engine/host_lane.h"
#include "engine/kv_pool.h"
#include "engine/moe_executor.h"
#include "engine/running_pass.h"
#include "kernels/device.h"
#include "model/architectures.h"
#include "model/weights.h"

namespace moed {

// Null: there is none.
struct KvPools {
  const KvPool* host = nullptr;
  const KvPool* device = nullptr;
  const KvPool* staging = nullptr;  // one layer, on the device

  // On the device, the blocks of the staging pool come after the device pool's.
  KvLayer layer(KvPath path, int32_t layer) const;
};

// What a forward pass reads. All of it outlives the pipeline.
struct PipelineInputs {
  const ModelConfig& model;
  const DenseViews& weights;
  KvPools kv;
  const float* rope = nullptr;  // [max_model_len, rotary_dim], see RopeAppend
};

// The one forward pass. Carries a pass's rows through a layer at a time, each half in turn: what begins the next layer
// is done at the end of this one, so that a half's attention goes on while the other half's products run. A layer of a
// half takes at most 12 op calls, 4 more with a shared expert, and one for each expert that was asked for and not
// there. Serving thread only.
class Pipeline {
 public:
  // device, stream, lane and moe outlive the pipeline.
  Pipeline(const PipelineInputs& inputs, Device& device, Stream& stream, HostLane& lane, MoeExecutor& moe);

  // Embeds the rows and starts layer 0.
  void begin(RunningPass& pass);
  // Runs one layer. True: more to do.
  bool advance(RunningPass& pass);
  // Takes a sequence's rows out, if it is in the pass.
  void drop(RunningPass& pass, SequenceId id);

 private:
  void start_layer(int32_t layer, RunningPass& pass, const Half& half);
  // Norm, QKV; then rope, KV append and what attention the device computes, path by path.
  void before_attention(int32_t layer, const RowViews& rows);
  void append_kv(int32_t layer, RunningPass& pass, const Half& half, KvPath path);
  void start_attention(int32_t layer, RunningPass& pass, const Half& half, KvPath path);
  // Blocks of staged sequences: those with earlier tokens to the device, or those with new ones back.
  void fetch_staged(int32_t layer, const Half& half);
  void return_staged(int32_t layer, const Half& half);
  void copy_staged(int32_t layer, const Member& member, bool fetch);
  // The attention output of all rows stands on the device.
  void join_attention(RunningPass& pass, const Half& half);
  // Output projection and the FFN's norm.
  void after_attention(int32_t layer, const RowViews& rows);

  const ModelConfig& model_;
  const DenseViews& weights_;
  const KvPools kv_;
  const float* rope_;
  Device& device_;
  Ops& ops_;
  Stream& stream_;
  HostLane& lane_;
  MoeExecutor& moe_;
};

}  // namespace moed
