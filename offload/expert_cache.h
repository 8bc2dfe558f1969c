#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "offload/top_experts.h"

namespace moed {

// Decides which experts of each layer should survive the pass; holds no bytes. An expert's score is the sum of its past
// visits, each worth less the older it is (LRFU: Lee et al., IEEE Transactions on Computers 50(12), 2001): with a
// half-life of one visit that is recency, with a long one frequency. Ghosts, lists of names without bytes, try each
// half-life on some layers; the one with most hits of late rules. Layers do not compete: a scan over all of them leaves
// each layer's share in place. Serving thread only; allocates at construction alone.
class ExpertCache {
 public:
  // In visits of the layer.
  static constexpr std::array<float, 5> kHalfLives = {1.0F, 8.0F, 24.0F, 72.0F, 216.0F};

  // shares: [layers], how many experts of each are kept. resident: [layers * num_experts], not 0 for those that are
  // never counted.
  ExpertCache(int32_t num_experts, std::span<const int32_t> shares, std::span<const uint8_t> resident);

  // A visit of the layer: counts[expert] rows.
  void routed(int32_t layer, std::span<const int32_t> counts);
  // Whether the expert is among those of its layer that should be kept.
  bool keeps(int32_t layer, int32_t expert) const { return has_bit(layers_[layer].wanted, expert); }
  bool kept(int32_t layer, int32_t expert) const { return has_bit(layers_[layer].kept, expert); }
  // It is kept from now on; returns the expert that is kept no more in its stead, -1: none. REQUIRES: keeps(), not
  // kept().
  int32_t keep(int32_t layer, int32_t expert);
  // It never came. REQUIRES: kept().
  void drop(int32_t layer, int32_t expert);
  // Those of the layer's experts [64 * word, +64) that should be kept and are not.
  uint64_t missing(int32_t layer, size_t word) const {
    return layers_[layer].wanted[word] & ~layers_[layer].kept[word];
  }
  // Grows whenever an expert of the layer that did not gain might.
  int64_t num_changes(int32_t layer) const { return layers_[layer].num_changes + num_rules_; }
  // Whether a missing expert is so much better than one that is kept in its stead that it is worth a copy.
  bool gains(int32_t layer, int32_t expert) const;
  // Of an expert by its ExpertIndex.
  float score(int32_t expert) const { return scores_[rule_][expert]; }
  std::span<const float> scores(int32_t layer) const { return scores(layer, rule_); }
  // Index into kHalfLives.
  int32_t rule() const { return rule_; }

 private:
  struct Ghost {
    ExpertBits names;
    float hits = 0.0F;  // decayed as routed() goes on
  };
  struct Layer {
    int32_t share = 0;
    int32_t num_kept = 0;
    int64_t num_changes = 0;
    ExpertBits resident;
    ExpertBits wanted;
    ExpertBits kept;
    std::vector<Ghost> ghosts;  // one a half-life; none in layers that do not try
  };

  std::span<const float> scores(int32_t layer, size_t rule) const {
    return std::span(scores_[rule]).subspan(size_t(layer) * num_experts_, num_experts_);
  }
  // chosen_, visited_
  void visit(std::span<const int32_t> counts);
  void try_ghosts(Layer& layer);
  void choose_rule();

  const int32_t num_experts_;
  std::vector<Layer> layers_;
  std::array<float, kHalfLives.size()> decays_;
  std::array<std::vector<float>, kHalfLives.size()> scores_;  // [layers * num_experts]
  int32_t rule_ = 0;
  int64_t num_rules_ = 0;  // times that another took over
  TopExperts top_;
  ExpertBits chosen_;           // by the rows of a visit
  std::vector<float> visited_;  // [num_experts]: 1 for those
};

}  // namespace moed
