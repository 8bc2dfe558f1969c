#pragma once

#include <cstdint>
#include <vector>

#include "model/config.h"

namespace moed {

// Numbers the routed experts of a model one after another, layer by layer.
class ExpertIndex {
 public:
  explicit ExpertIndex(const ModelConfig& model) : num_experts_(model.moe.num_experts) {
    for (int32_t layer = 0; layer < model.num_layers; ++layer) {
      const bool moe = model.layers[layer] == LayerKind::kMoe;
      moe_layer_.push_back(moe ? static_cast<int32_t>(layer_.size()) : -1);
      if (moe) layer_.push_back(layer);
    }
  }

  int32_t num_layers() const { return static_cast<int32_t>(layer_.size()); }  // that have experts
  int32_t num_experts() const { return num_experts_; }                        // of one of them
  int32_t size() const { return num_layers() * num_experts_; }
  bool has(ExpertId id) const {
    return id.layer >= 0 && id.layer < static_cast<int32_t>(moe_layer_.size()) && moe_layer_[id.layer] >= 0 &&
           id.expert >= 0 && id.expert < num_experts_;
  }
  // Among layers that have experts.
  int32_t moe_layer(int32_t layer) const { return moe_layer_[layer]; }
  int32_t layer(int32_t moe_layer) const { return layer_[moe_layer]; }
  // REQUIRES: has(id).
  int32_t of(ExpertId id) const { return moe_layer_[id.layer] * num_experts_ + id.expert; }
  ExpertId id(int32_t index) const { return {layer_[index / num_experts_], index % num_experts_}; }

 private:
  int32_t num_experts_;
  std::vector<int32_t> moe_layer_;  // [num_layers]; -1: without experts
  std::vector<int32_t> layer_;      // [those with experts]
};

}  // namespace moed
