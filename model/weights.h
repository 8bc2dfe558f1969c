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

// Where everything but the routed experts stands. Does not own.
struct DenseViews {
  const Bf16* embedding = nullptr;    // [vocab, hidden]
  const Bf16* head = nullptr;         // [vocab, hidden]; the embedding when tied
  const float* final_norm = nullptr;  // [hidden]
  std::vector<LayerWeights> layers;   // [num_layers]
};

// Everything but the routed experts: resident where the model runs. Owns one arena. Immutable after load.
class DenseWeights {
 public:
  // progress (may be empty) is called from the calling thread with the bytes that arrived since its last call.
  static StatusOr<DenseWeights> load(const Model& model, const TensorSource& source,
                                     const std::function<void(int64_t)>& progress);
  const Bf16* embedding() const { return views_.embedding; }
  const Bf16* head() const { return views_.head; }
  const float* final_norm() const { return views_.final_norm; }
  const LayerWeights& layer(int32_t layer) const { return views_.layers[layer]; }
  const DenseViews& views() const { return views_; }
  // The same views of a copy of the arena that begins at `copy`, which need not be readable here.
  DenseViews views_at(const std::byte* copy) const;
  const std::byte* data() const { return arena_.data(); }
  int64_t bytes() const { return arena_.size(); }

 private:
  HugePages arena_;
  DenseViews views_;
};

}  // namespace moed
