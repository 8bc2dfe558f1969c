#include "offload/expert_cache.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/check.h"

namespace moed {
namespace {

// Layers that try ghosts.
constexpr int32_t kGhostLayers = 4;
// A ghost's hits fade by this at each visit of its layer.
constexpr float kHitDecay = 0.998F;
// What a rule must be better by to take over.
constexpr float kRuleMargin = 1.01F;
// What an expert's score must be better by to be copied in place of another that nobody asked to go.
constexpr float kCopyMargin = 1.25F;

}  // namespace

ExpertCache::ExpertCache(int32_t num_experts, std::span<const int32_t> shares, std::span<const uint8_t> resident)
    : num_experts_(num_experts),
      layers_(shares.size()),
      top_(num_experts),
      chosen_(num_words(num_experts)),
      visited_(num_experts) {
  const auto num_layers = static_cast<int32_t>(shares.size());
  const size_t words = num_words(num_experts);
  for (size_t i = 0; i < decays_.size(); ++i) decays_[i] = std::exp2(-1.0F / kHalfLives[i]);
  for (auto& scores : scores_) scores.resize(shares.size() * size_t(num_experts));
  for (int32_t l = 0; l < num_layers; ++l) {
    Layer& layer = layers_[l];
    layer.share = shares[l];
    layer.resident.resize(words);
    layer.wanted.resize(words);
    layer.kept.resize(words);
    for (int32_t expert = 0; expert < num_experts; ++expert) {
      if (resident[l * num_experts + expert] != 0) set_bit(layer.resident, expert);
    }
    const int32_t tries = std::min(num_layers, kGhostLayers);
    if (layer.share > 0 && int64_t{l} * tries / num_layers != int64_t{l + 1} * tries / num_layers) {
      layer.ghosts.resize(kHalfLives.size());
      for (Ghost& ghost : layer.ghosts) ghost.names.resize(words);
    }
    top_.choose(scores(l), layer.resident, layer.kept, layer.share, layer.wanted);
  }
}

void ExpertCache::visit(std::span<const int32_t> counts) {
  bits_above_0(counts, chosen_);
  for (int32_t expert = 0; expert < num_experts_; ++expert) visited_[expert] = counts[expert] > 0 ? 1.0F : 0.0F;
}

void ExpertCache::routed(int32_t layer_index, std::span<const int32_t> counts) {
  Layer& layer = layers_[layer_index];
  ++layer.num_changes;
  visit(counts);
  if (!layer.ghosts.empty()) try_ghosts(layer);
  for (size_t i = 0; i < decays_.size(); ++i) {
    float* scores = scores_[i].data() + size_t(layer_index) * num_experts_;
    for (int32_t expert = 0; expert < num_experts_; ++expert) {
      scores[expert] = scores[expert] * decays_[i] + visited_[expert];
    }
  }
  for (size_t i = 0; i < layer.ghosts.size(); ++i) {
    Ghost& ghost = layer.ghosts[i];
    top_.choose(scores(layer_index, i), layer.resident, ghost.names, layer.share, ghost.names);
  }
  top_.choose(scores(layer_index), layer.resident, layer.kept, layer.share, layer.wanted);
}

// Before the scores learn of the visit: what each ghost would have held.
void ExpertCache::try_ghosts(Layer& layer) {
  for (Ghost& ghost : layer.ghosts) {
    int32_t hits = 0;
    for (size_t word = 0; word < chosen_.size(); ++word) hits += std::popcount(chosen_[word] & ghost.names[word]);
    ghost.hits = ghost.hits * kHitDecay + static_cast<float>(hits);
  }
  choose_rule();
}

void ExpertCache::choose_rule() {
  std::array<float, kHalfLives.size()> hits{};
  for (const Layer& layer : layers_) {
    for (size_t i = 0; i < layer.ghosts.size(); ++i) hits[i] += layer.ghosts[i].hits;
  }
  const auto best = std::max_element(hits.begin(), hits.end());
  if (*best <= hits[rule_] * kRuleMargin) return;
  rule_ = static_cast<int32_t>(best - hits.begin());
  ++num_rules_;
}

int32_t ExpertCache::keep(int32_t layer_index, int32_t expert) {
  Layer& layer = layers_[layer_index];
  MOED_CHECK(has_bit(layer.wanted, expert) && !has_bit(layer.kept, expert)) << "expert " << expert;
  set_bit(layer.kept, expert);
  if (layer.num_kept < layer.share) {
    ++layer.num_kept;
    return -1;
  }
  for (size_t word = 0; word < layer.kept.size(); ++word) {
    const uint64_t stale = layer.kept[word] & ~layer.wanted[word];
    if (stale == 0) continue;
    layer.kept[word] &= ~(stale & -stale);
    return static_cast<int32_t>(word) * 64 + std::countr_zero(stale);
  }
  MOED_CHECK(false) << "as many experts are wanted as are kept, and this one was not";
  return -1;
}

void ExpertCache::drop(int32_t layer_index, int32_t expert) {
  Layer& layer = layers_[layer_index];
  MOED_CHECK(has_bit(layer.kept, expert)) << "expert " << expert;
  clear_bit(layer.kept, expert);
  --layer.num_kept;
  ++layer.num_changes;
}

bool ExpertCache::gains(int32_t layer_index, int32_t expert) const {
  const Layer& layer = layers_[layer_index];
  const std::span<const float> scores = this->scores(layer_index);
  if (layer.num_kept < layer.share) return scores[expert] > 0.0F;
  float least = scores[expert];
  for (size_t word = 0; word < layer.kept.size(); ++word) {
    for (uint64_t bits = layer.kept[word] & ~layer.wanted[word]; bits != 0; bits &= bits - 1) {
      least = std::min(least, scores[word * 64 + static_cast<size_t>(std::countr_zero(bits))]);
    }
  }
  return scores[expert] > kCopyMargin * least;
}

}  // namespace moed
