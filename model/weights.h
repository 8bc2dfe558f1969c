#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/bf16.h"
#include "base/huge_pages.h"
#include "base/status.h"
#include "model/architectures.h"
#include "model/tensor_source.h"

namespace moed {

// Views into DenseWeights' arena. Weights are bf16 [out, in]; norms and biases fp32. Null where the model has none.
struct LayerWeights {
  const float* attention_norm = nullptr;     // [hidden]
  const Bf16* qkv = nullptr;                 // [q_size + 2 * kv_size, hidden]: q, k, v rows
  const float* qkv_bias = nullptr;           // [q_size + 2 * kv_size]
  const float* q_norm = nullptr;             // [head_dim] or [q_size]
  const float* k_norm = nullptr;             // [head_dim] or [kv_size]
  const Bf16* output = nullptr;              // [hidden, q_size]
  const float* output_bias = nullptr;        // [hidden]
  const float* ffn_norm = nullptr;           // [hidden]
  const Bf16* router = nullptr;              // [experts, hidden]
  const float* router_correction = nullptr;  // [experts]
  // Blob order: gate, up, down, one run of bytes. Of the dense FFN or the shared expert.
  const Bf16* ffn = nullptr;
  const Bf16* shared_router = nullptr;  // [1, hidden]
};

// Everything but the routed experts: resident where the model runs. Owns one arena. Immutable after load.
class DenseWeights {
 public:
  // progress (may be empty) is called from the calling thread with the bytes that arrived since its last call.
  static StatusOr<DenseWeights> load(const Model& model, const TensorSource& source,
                                     const std::function<void(int64_t)>& progress);
  const Bf16* embedding() const { return embedding_; }     // [vocab, hidden]
  const Bf16* head() const { return head_; }               // [vocab, hidden]; the embedding when tied
  const float* final_norm() const { return final_norm_; }  // [hidden]
  const LayerWeights& layer(int32_t layer) const { return layers_[layer]; }
  int64_t bytes() const { return arena_.size(); }

 private:
  HugePages arena_;
  const Bf16* embedding_ = nullptr;
  const Bf16* head_ = nullptr;
  const float* final_norm_ = nullptr;
  std::vector<LayerWeights> layers_;
};

}  // namespace moed
