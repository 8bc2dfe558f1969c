// What the ring costs the serving thread, on a device whose calls do nothing: 48 layers of 128 experts, 64 rows that
// choose 8 each by Zipf's law, a quarter of the experts in device memory. An iteration is one layer. Beside it what
// else the thread decides for a layer under policy hot: the pass's plan and its check, the list of prefetches, the
// experts' places, a table of addresses.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string_view>
#include <tuple>

#include "plan/policies.h"
#include "tests/offload/fake_device.h"
#include "tests/offload/ring_box.h"
#include "tests/offload/traces.h"

namespace moed {
namespace {

constexpr int32_t kLayers = 48;
constexpr int32_t kExperts = 128;
constexpr int32_t kTopK = 8;
constexpr int32_t kSlots = kLayers * kExperts / 4;

struct Bench {
  Bench(int32_t rows, bool decides_)
      : decides(decides_),
        predicts(rows * kTopK * 2 < kExperts),
        box({.num_layers = kLayers, .num_experts = kExperts, .hidden = 8, .intermediate = 6}) {
    box.device = std::make_unique<FakeDevice>(FakeDevice::Options{.copies = false}, std::move(box.device));
    box.reader = box.device->make_stream();
    ring = box.ring({.num_slots = kSlots, .staging_slots = 4, .resident = {}});
    for (int32_t i = 0; i < kLayers; ++i) {
      traces.push_back(zipf_trace({.num_experts = kExperts, .batch_rows = rows, .num_visits = 64}, 100 + i));
    }
    leases.reserve(kExperts);
    wanted.reserve(ExpertRing::kPrefetchMax);
    for (int32_t row = 0; row < rows; ++row) shape.add(1000, 1, true);
    attended_tokens.assign(static_cast<size_t>(rows), 1001);
  }
  // The rest of what a layer costs: `layer` and `counts` as step() leaves them for a layer.
  void decide() {
    if (layer == 0) {
      const Policy& hot = *std::find_if(policies().begin(), policies().end(),
                                        [](const Policy& policy) { return policy.name == std::string_view("hot"); });
      plan = hot.plan({.shape = shape,
                       .attended_tokens = attended_tokens,
                       .config = box.model.config,
                       .residency = residency,
                       .rates = rates});
      MOED_CHECK(validate(plan, shape, box.model.config, residency).ok()) << "a plan of hot";
    }
    wanted.clear();
    for (const ExpertId id : plan.prefetch) {
      if (wanted.size() == wanted.capacity()) break;
      if (id.layer >= layer) wanted.push_back(id);
    }
    if (!wanted.empty()) ring->prefetch(wanted);
    for (int32_t expert = 0; expert < kExperts; ++expert) {
      places[expert] = present[expert] != 0 ? Place::kResident : Place::kHost;
    }
    placer.place(plan.costs, counts, places);
    std::fill(table.begin(), table.end(), nullptr);
    for (int32_t expert = 0; expert < kExperts; ++expert) {
      if (counts[expert] > 0 && places[expert] == Place::kHost) table[expert] = box.store.blob({layer, expert}).data;
    }
    benchmark::DoNotOptimize(table.data());
  }
  // A layer as the engine runs it; of the misses, `streamed` are copied and the rest runs on the host.
  void step(size_t streamed) {
    const std::vector<int32_t>& experts = traces[layer][visit];
    counts.assign(kExperts, 0);
    for (const int32_t expert : experts) counts[expert] = 1;
    ring->acquire_present(layer, leases);
    for (const Lease& lease : leases) {
      ring->order(lease, *box.reader);
      present[lease.id().expert] = 1;
    }
    ring->retire(leases, *box.reader);
    ring->pump();
    if (predicts && ring->wants_prediction(layer)) ring->predicted(layer, RowsId(), counts);
    ring->routed(layer, RowsId(), counts);
    if (decides) decide();
    for (const int32_t expert : experts) {
      if (streamed == 0) break;
      if (present[expert] != 0) continue;
      --streamed;
      leases.push_back(std::move(*ring->acquire({layer, expert})));
      ring->pump();
      while (!ring->submitted(leases.back())) ring->wait();
      ring->order(leases.back(), *box.reader);
      ring->retire(leases, *box.reader);
    }
    ring->pump();
    std::fill(present.begin(), present.end(), 0);
    layer = (layer + 1) % kLayers;
    if (layer == 0) visit = (visit + 1) % traces[0].size();
  }

  const bool decides;
  const bool predicts;  // as MoeExecutor: not where rows want half of a layer's experts
  RingBox box;
  std::unique_ptr<ExpertRing> ring;
  std::vector<Trace> traces;
  std::vector<Lease> leases;
  std::vector<int32_t> counts;
  std::vector<uint8_t> present = std::vector<uint8_t>(kExperts);
  int32_t layer = 0;
  size_t visit = 0;
  const MachineRates rates;
  const Residency residency{.has_device = true, .num_slots = kSlots, .resident = {}};
  StepShape shape;
  std::vector<int64_t> attended_tokens;
  StepPlan plan;
  ExpertPlacer placer;
  std::vector<Place> places = std::vector<Place>(kExperts);
  std::vector<const std::byte*> table = std::vector<const std::byte*>(kExperts);
  std::vector<ExpertId> wanted;
};

// One of each kind for the whole run: its experts take longer to make than a measurement.
Bench& bench_of(int32_t rows, size_t streamed, bool decides) {
  static std::map<std::tuple<int32_t, size_t, bool>, std::unique_ptr<Bench>> benches;
  std::unique_ptr<Bench>& bench = benches[{rows, streamed, decides}];
  if (bench == nullptr) {
    bench = std::make_unique<Bench>(rows, decides);
    for (int i = 0; i < 64 * kLayers; ++i) bench->step(streamed);
  }
  return *bench;
}

void layer_cost(benchmark::State& state) {
  const auto streamed = static_cast<size_t>(state.range(1));
  Bench& bench = bench_of(static_cast<int32_t>(state.range(0)), streamed, state.range(2) != 0);
  for (auto _ : state) bench.step(streamed);
  const RingStats stats = bench.ring->stats();
  state.counters["hits"] = static_cast<double>(stats.hits);
  state.counters["misses"] = static_cast<double>(stats.misses);
  state.counters["prefetched"] = static_cast<double>(stats.prefetched);
}

BENCHMARK(layer_cost)
    ->ArgNames({"rows", "streamed", "decides"})
    ->ArgsProduct({{1}, {8}, {0, 1}})
    ->ArgsProduct({{64}, {0, 8, 128}, {0, 1}})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace moed

BENCHMARK_MAIN();
