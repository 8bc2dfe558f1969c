#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

namespace moed {

// What one layer's rows chose, visit by visit: ascending experts, each once.
using Trace = std::vector<std::vector<int32_t>>;

struct ZipfTrace {
  int32_t num_experts = 128;
  int32_t top_k = 8;
  double exponent = 1.0;
  int32_t batch_rows = 1;
  int32_t num_visits = 10000;
  int32_t shift_visits = 2000;  // so often the hot set becomes another
};

// Each row draws top_k distinct experts, one after another, with weights 1 / rank^exponent over a random order of the
// experts; the order is drawn anew at each shift.
inline Trace zipf_trace(const ZipfTrace& spec, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<double> weights(spec.num_experts);
  for (int32_t rank = 0; rank < spec.num_experts; ++rank) weights[rank] = std::pow(rank + 1.0, -spec.exponent);
  std::vector<int32_t> order(spec.num_experts);
  std::iota(order.begin(), order.end(), 0);
  Trace trace(spec.num_visits);
  std::vector<uint8_t> chosen(spec.num_experts);
  std::vector<uint8_t> drawn(spec.num_experts);
  std::discrete_distribution<int32_t> draw(weights.begin(), weights.end());
  for (int32_t visit = 0; visit < spec.num_visits; ++visit) {
    if (visit % spec.shift_visits == 0) std::shuffle(order.begin(), order.end(), random);
    std::fill(chosen.begin(), chosen.end(), 0);
    for (int32_t row = 0; row < spec.batch_rows; ++row) {
      std::fill(drawn.begin(), drawn.end(), 0);
      for (int32_t count = 0; count < spec.top_k;) {
        const int32_t expert = order[draw(random)];
        if (drawn[expert] != 0) continue;
        drawn[expert] = chosen[expert] = 1;
        ++count;
      }
    }
    for (int32_t expert = 0; expert < spec.num_experts; ++expert) {
      if (chosen[expert] != 0) trace[visit].push_back(expert);
    }
  }
  return trace;
}

// Hits of Belady's MIN with bypass: after each visit the cache holds those of what it held and what came that will be
// wanted soonest. No cache of `capacity` experts that fetches only what is wanted has more.
inline int64_t optimal_hits(const Trace& trace, int32_t num_experts, int32_t capacity) {
  constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  const auto num_visits = static_cast<int64_t>(trace.size());
  std::vector<std::vector<int64_t>> uses(num_experts);
  for (int64_t visit = 0; visit < num_visits; ++visit) {
    for (const int32_t expert : trace[visit]) uses[expert].push_back(visit);
  }
  std::vector<size_t> past(num_experts);
  std::vector<int32_t> held;
  int64_t hits = 0;
  for (int64_t visit = 0; visit < num_visits; ++visit) {
    for (const int32_t expert : trace[visit]) {
      if (std::find(held.begin(), held.end(), expert) != held.end()) {
        ++hits;
      } else {
        held.push_back(expert);
      }
      ++past[expert];
    }
    const auto next = [&](int32_t expert) {
      return past[expert] < uses[expert].size() ? uses[expert][past[expert]] : kNever;
    };
    std::sort(held.begin(), held.end(), [&](int32_t a, int32_t b) { return next(a) < next(b); });
    if (held.size() > static_cast<size_t>(capacity)) held.resize(capacity);
  }
  return hits;
}

// Hits of the best set of `capacity` experts that stays for `period` visits, chosen afterwards for each period: what
// there is to know of how popular experts are.
inline int64_t fixed_hits(const Trace& trace, int32_t num_experts, int32_t capacity, size_t period) {
  int64_t hits = 0;
  for (size_t begin = 0; begin < trace.size(); begin += period) {
    std::vector<int64_t> uses(num_experts);
    for (size_t visit = begin; visit < std::min(begin + period, trace.size()); ++visit) {
      for (const int32_t expert : trace[visit]) ++uses[expert];
    }
    std::sort(uses.rbegin(), uses.rend());
    hits += std::accumulate(uses.begin(), uses.begin() + std::min(capacity, num_experts), int64_t{0});
  }
  return hits;
}

}  // namespace moed
