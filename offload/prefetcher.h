#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "base/function_ref.h"
#include "offload/expert_cache.h"
#include "offload/expert_index.h"
#include "offload/rows_id.h"

namespace moed {

// Says which absent expert should come next when no routed miss waits: those that the lookahead router names, then the
// plan's list, then what the cache would keep of the layers to come. The lookahead router is scored in each layer by
// the absent experts it names against as many of the most popular absent ones; its word counts while more of its own
// are chosen, and at least half of them. Experts go by their ExpertIndex. Serving thread only; allocates at
// construction alone.
class Prefetcher {
 public:
  // Experts of the plan's list that count.
  static constexpr size_t kListMax = 512;
  // Both outlive it.
  Prefetcher(const ExpertIndex& index, const ExpertCache& cache);

  // The lookahead's answer for a layer to these rows; present: those of its experts that are there or on their way.
  void predicted(int32_t moe_layer, RowsId rows, std::span<const int32_t> counts, std::span<const uint64_t> present);
  // The layer's turn has come. REQUIRES: before ExpertCache::routed().
  void routed(int32_t moe_layer, RowsId rows, std::span<const int32_t> counts);
  bool wants_prediction(int32_t moe_layer) const;
  // Whether the lookahead wins in the layer.
  bool trusts(int32_t moe_layer) const { return layers_[moe_layer].trusted; }

  // Replaces the plan's list, of which the first kListMax count.
  void list(std::span<const ExpertId> wanted);
  // Somebody had an expert copied: popular ones are worth copying for some visits.
  void streamed() { visits_streamed_ = 0; }
  // Whether it named the expert, so that it should not make room for another that it names.
  bool named(int32_t expert) const { return listed_[expert] == list_number_ || expected_[expert] == expected_number_; }
  // The next to come, -1: none.
  int32_t next(FunctionRef<bool(int32_t expert)> absent);

 private:
  // A prediction that waits for routed(): the absent experts it named, and as many popular ones. 0: nothing to learn.
  struct Trial {
    int32_t moe_layer = -1;  // -1: none waits
    int32_t count = 0;
    bool rivals = false;  // popular is known
    ExpertBits named;
    ExpertBits popular;
  };
  // How many of the experts that were named were chosen; the past fades.
  struct Tally {
    float named = 0.0F;
    float chosen = 0.0F;
    void count(int32_t num_named, const ExpertBits& bits, std::span<const int32_t> counts);
    float share() const { return named > 0.0F ? chosen / named : 0.0F; }
  };
  struct Layer {
    Tally lookahead;
    Tally popularity;
    bool trusted = false;
    int64_t visits = 0;
    int64_t num_scored = 0;
    int64_t changes_seen = -1;  // ExpertCache::num_changes() when none of its experts gained that was absent
  };

  // The lookahead of the layer is trusted and named the first `count` of keys_.
  void expect(int32_t moe_layer, int32_t count);
  Trial& trial_of(RowsId rows, int32_t moe_layer) { return trials_.at(rows.index())[moe_layer % 2]; }
  void score(Layer& layer, const Trial& trial, std::span<const int32_t> counts);
  int32_t next_popular(FunctionRef<bool(int32_t expert)> absent);

  const ExpertIndex& index_;
  const ExpertCache& cache_;
  std::vector<Layer> layers_;
  // Of each RowsId, for even and for odd layers: the next layer's is there before this one's is settled.
  std::array<std::array<Trial, 2>, RowsId::kCount> trials_;
  std::vector<int32_t> expecting_;  // what the lookahead wants, most rows first, from expecting_next_ on
  size_t expecting_next_ = 0;
  int32_t expecting_layer_ = -1;
  std::vector<uint32_t> expected_;  // [experts]: the number of the expectation that named it last
  uint32_t expected_number_ = 1;
  std::vector<int32_t> list_;  // the plan's, from list_next_ on
  size_t list_next_ = 0;
  std::vector<uint32_t> listed_;  // [experts]: the number of the list that named it last
  uint32_t list_number_ = 1;
  int32_t popular_layer_ = 0;   // where next_popular() goes on
  int32_t popular_left_ = 0;    // layers to look at before the next routed()
  int64_t visits_streamed_;     // routed() calls since streamed()
  std::vector<uint64_t> keys_;  // rows << 32 | expert
  TopExperts top_;
};

}  // namespace moed
