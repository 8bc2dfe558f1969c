#pragma once

#include <memory>

#include "engine/kv_pool.h"
#include "engine/moe_executor.h"
#include "engine/running_pass.h"
#include "kernels/device.h"
#include "model/architectures.h"
#include "model/weights.h"

namespace moed {

// What a forward pass reads. All of it outlives the pipeline.
struct PipelineInputs {
  const ModelConfig& model;
  const DenseWeights& weights;
  const ExpertStore& experts;
  const KvPool& kv;
  const float* rope;  // [max_model_len, rotary_dim], see RopeAppend
};

// The one forward pass. Carries a pass's rows through a layer at a time, each half in turn: what begins the next layer
// is done at the end of this one, so that a half's attention may go on while the other half's products run. Serving
// thread only.
class Pipeline {
 public:
  // device and stream outlive the pipeline.
  Pipeline(const PipelineInputs& inputs, Device& device, Stream& stream);

  // Embeds the rows and starts layer 0.
  void begin(RunningPass& pass);
  // Runs one layer. True: more to do.
  bool advance(RunningPass& pass);

 private:
  // Norm, QKV, rope, KV append.
  void before_attention(int32_t layer, const RowViews& rows);
  void run_attention(int32_t layer, const RunningPass& pass, const Half& half);
  // Output projection and the FFN's norm.
  void after_attention(int32_t layer, const RowViews& rows);
  void start_layer(int32_t layer, RunningPass& pass, const Half& half);

  const ModelConfig& model_;
  const DenseWeights& weights_;
  const KvPool& kv_;
  const float* rope_;
  Ops& ops_;
  Stream& stream_;
  MoeExecutor moe_;
};

}  // namespace moed
