#include <algorithm>
#include <bit>

#include <gtest/gtest.h>

#include "tests/offload/cache_trace.h"

namespace moed {
namespace {

std::vector<Trace> zipf_layers(const ZipfTrace& spec, int32_t num_layers) {
  std::vector<Trace> layers;
  for (int32_t layer = 0; layer < num_layers; ++layer) layers.push_back(zipf_trace(spec, 100 + layer));
  return layers;
}

// By trying all caches: after each visit any that are a part of what was held and what came.
int64_t most_hits(const Trace& trace, size_t visit, uint32_t held, int32_t capacity) {
  if (visit == trace.size()) return 0;
  uint32_t came = 0;
  for (const int32_t expert : trace[visit]) came |= 1U << expert;
  const uint32_t room = held | came;
  int64_t best = 0;
  for (uint32_t next = room;; next = (next - 1) & room) {
    if (std::popcount(next) <= capacity) best = std::max(best, most_hits(trace, visit + 1, next, capacity));
    if (next == 0) break;
  }
  return std::popcount(held & came) + best;
}

TEST(Belady, IsTheMostThatBruteForceFinds) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Trace trace = zipf_trace(
        {.num_experts = 5, .top_k = 2, .exponent = 0.3, .batch_rows = 1, .num_visits = 6, .shift_visits = 3}, seed);
    for (int32_t capacity = 1; capacity <= 3; ++capacity) {
      EXPECT_EQ(optimal_hits(trace, 5, capacity), most_hits(trace, 0, 0, capacity)) << seed;
    }
  }
}

TEST(Belady, RingHas85PercentOfTheOptimumsHits) {
  constexpr int32_t kLayers = 4;
  const std::vector<Trace> layers = zipf_layers({.num_visits = 6000, .shift_visits = 2000}, kLayers);
  for (const int32_t share : {32, 64}) {
    const Hits hits = play(layers, 128, share * kLayers);
    EXPECT_GE(static_cast<double>(hits.ring), 0.85 * static_cast<double>(hits.optimal))
        << share << " of 128 cached: " << hits.ring << " of " << hits.optimal << " hits";
    EXPECT_LE(hits.ring, hits.optimal);
  }
}

}  // namespace
}  // namespace moed
