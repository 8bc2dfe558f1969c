#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "offload/ring.h"
#include "tests/offload/ring_box.h"
#include "tests/offload/traces.h"

namespace moed {

struct Hits {
  int64_t wanted = 0;
  int64_t optimal = 0;
  int64_t fixed = 0;  // fixed_hits()
  int64_t ring = 0;
};

// Plays traces, one a layer, all of as many visits, to a ring on the host device as the engine would: what is there is
// leased, the router's answer comes, the rest is copied. num_slots are all that the ring has; the optimum gets as many,
// num_slots / layers each.
inline Hits play(const std::vector<Trace>& layers, int32_t num_experts, int32_t num_slots, size_t period = 2000) {
  const auto num_layers = static_cast<int32_t>(layers.size());
  RingBox box({.num_layers = num_layers, .num_experts = num_experts, .hidden = 8, .intermediate = 6}, "cpu");
  const auto ring = box.ring({.num_slots = num_slots, .staging_slots = 2, .resident = {}});
  std::vector<Lease> leases;
  std::vector<int32_t> counts(num_experts);
  Hits hits;
  for (size_t visit = 0; visit < layers[0].size(); ++visit) {
    for (int32_t layer = 0; layer < num_layers; ++layer) {
      ring->acquire_present(layer, leases);
      counts.assign(num_experts, 0);
      for (const int32_t expert : layers[layer][visit]) counts[expert] = 1;
      for (const Lease& lease : leases) hits.ring += counts[lease.id().expert];
      ring->routed(layer, RowsId(), counts);
      for (const Lease& lease : leases) counts[lease.id().expert] = 0;
      ring->retire(leases, *box.reader);
      for (const int32_t expert : layers[layer][visit]) {
        ++hits.wanted;
        if (counts[expert] == 0) continue;
        ring->pump();
        leases.push_back(std::move(*ring->acquire({layer, expert})));
        while (!ring->submitted(leases.back())) ring->wait();
        ring->retire(leases, *box.reader);
      }
    }
  }
  for (const Trace& layer : layers) {
    hits.optimal += optimal_hits(layer, num_experts, num_slots / num_layers);
    hits.fixed += fixed_hits(layer, num_experts, num_slots / num_layers, period);
  }
  return hits;
}

}  // namespace moed
