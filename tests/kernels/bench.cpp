// Times of the host kernels over the shapes of cases.h: kernels_bench --benchmark_filter=Linear/avx512_bf16
#include <benchmark/benchmark.h>

#include <cmath>

#include "base/check.h"
#include "base/thread_pool.h"
#include "tests/kernels/cases.h"

namespace moed {
namespace {

// Weights cycle through this much memory, so that a decode step finds none of them in the cache, as in a pass over a
// model.
constexpr int64_t kColdBytes = int64_t{512} << 20;

struct Host {
  std::unique_ptr<Device> device;
  std::unique_ptr<Stream> stream;
};

Host open_host(const std::string& isa, bool deterministic) {
  Host host;
  host.device = open_device("cpu", {.num_threads = 0, .deterministic = deterministic, .isa = isa}).value();
  host.stream = host.device->make_stream();
  MOED_CHECK(host.device->ops().reserve(cases::limits_for(512)).ok());
  return host;
}

Buffer random_weights(Device& device, int64_t bytes) {
  Buffer buffer = device.allocate(bytes, Memory::kDevice).value();
  cases::Random random(1);
  const std::vector<Bf16> some = random.bf16s(65521, 0.03F);
  for (int64_t i = 0; i < bytes / 2; ++i) buffer.as<Bf16>()[i] = some[i % 65521];
  return buffer;
}

// The bandwidth that a plain sum over cold memory reaches: what one-row products are measured against.
void dram_read(benchmark::State& state) {
  const Host host = open_host("", false);
  const Buffer memory = random_weights(*host.device, kColdBytes);
  ThreadPool pool(default_compute_threads());
  constexpr int64_t kSlice = int64_t{1} << 20;
  int64_t sink = 0;
  for (auto _ : state) {
    pool.run(kColdBytes / kSlice, [&](int64_t slice, int) {
      const int64_t* words = memory.as<int64_t>() + slice * (kSlice / 8);
      int64_t sum = 0;
      for (int64_t i = 0; i < kSlice / 8; ++i) sum += words[i];
      __atomic_fetch_add(&sink, sum, __ATOMIC_RELAXED);
    });
  }
  benchmark::DoNotOptimize(sink);
  state.SetBytesProcessed(state.iterations() * kColdBytes);
}

void linear(benchmark::State& state, const std::string& isa, bool deterministic, const cases::LinearCase& c) {
  const Host host = open_host(isa, deterministic);
  const int64_t weight_bytes = int64_t{2} * c.in * c.out;
  const int64_t copies = std::max<int64_t>(1, kColdBytes / weight_bytes);
  const Buffer weights = random_weights(*host.device, copies * weight_bytes);
  cases::Random random(2);
  const std::vector<Bf16> x = random.bf16s(int64_t{c.rows} * c.in);
  std::vector<float> y(int64_t{c.rows} * c.out);
  int64_t copy = 0;
  for (auto _ : state) {
    const Bf16* w = weights.as<Bf16>() + copy * int64_t{c.in} * c.out;
    copy = (copy + 1) % copies;
    host.device->ops().linear({x.data(), c.rows, c.in}, {w, nullptr, c.in, c.out}, false, {y.data(), c.rows, c.out},
                              *host.stream);
  }
  state.SetBytesProcessed(state.iterations() * weight_bytes);
  state.counters["GFLOP/s"] = benchmark::Counter(2e-9 * c.rows * c.in * c.out * static_cast<double>(state.iterations()),
                                                 benchmark::Counter::kIsRate);
}

void expert_ffn(benchmark::State& state, const std::string& isa, const cases::FfnCase& c) {
  const Host host = open_host(isa, false);
  const BlobShape shape{BlobFormat::kBf16, c.hidden, c.intermediate};
  const int64_t layers = std::max<int64_t>(1, kColdBytes / (shape.bytes() * c.experts));
  const Buffer weights = random_weights(*host.device, layers * c.experts * shape.bytes());
  cases::Random random(3);
  const std::vector<Bf16> x = random.bf16s(int64_t{c.rows} * c.hidden);
  const int32_t num_pairs = c.rows * c.choices;
  std::vector<int32_t> offsets;
  std::vector<int32_t> pairs;
  for (int32_t expert = 0; expert <= c.experts; ++expert) {
    offsets.push_back(static_cast<int32_t>(pairs.size()));
    for (int32_t pair = 0; pair < num_pairs; ++pair) {
      if ((pair / c.choices * 7 + pair % c.choices) % c.experts == expert) pairs.push_back(pair);
    }
  }
  std::vector<Bf16> scratch(int64_t{c.rows} * c.choices * c.intermediate);
  std::vector<float> y(int64_t{c.rows} * c.choices * c.hidden);
  ExpertFfn args;
  args.x = Matrix<const Bf16>(x.data(), c.rows, c.hidden);
  args.choices = c.choices;
  args.scratch = Matrix<Bf16>(scratch.data(), c.rows * c.choices, c.intermediate);
  args.y = Matrix<float>(y.data(), c.rows * c.choices, c.hidden);
  args.shape = shape;
  args.offsets = offsets.data();
  args.pairs = pairs.data();
  args.pairs_max = num_pairs;
  std::vector<const std::byte*> blobs(c.experts);
  args.blobs = blobs;
  int64_t layer = 0;
  int64_t bytes = 0;
  for (auto _ : state) {
    for (int32_t expert = 0; expert < c.experts; ++expert) {
      blobs[expert] = weights.data() + (layer * c.experts + expert) * shape.bytes();
      if (offsets[expert + 1] > offsets[expert]) bytes += shape.bytes();
    }
    layer = (layer + 1) % layers;
    host.device->ops().expert_ffn(args, *host.stream);
  }
  state.SetBytesProcessed(bytes);
  state.counters["GFLOP/s"] = benchmark::Counter(
      6e-9 * c.rows * c.choices * c.hidden * c.intermediate * static_cast<double>(state.iterations()),
      benchmark::Counter::kIsRate);
}

// One layer's attention of the demo: 9 query heads over 3 KV heads of 64.
void attention(benchmark::State& state, const std::string& isa, int32_t spans, int32_t cached, int32_t rows) {
  const Host host = open_host(isa, false);
  cases::AttentionCase c{9, 3, 64, {}};
  for (int32_t i = 0; i < spans; ++i) c.spans.emplace_back(cached, rows);
  const cases::PagedKv kv = cases::make_kv(c, 1);
  std::vector<AttentionSpan> table;
  for (int32_t i = 0; i < spans; ++i) table.push_back({i * rows, rows, cached, kv.blocks[i].data()});
  cases::Random random(2);
  const int32_t width = c.num_heads * c.head_dim;
  const std::vector<Bf16> q = random.bf16s(int64_t{spans} * rows * width);
  std::vector<Bf16> out(q.size());
  Attention args;
  args.q = Matrix<const Bf16>(q.data(), spans * rows, width);
  args.num_heads = c.num_heads;
  args.kv = kv.layer;
  args.spans = table;
  args.scale = 0.125F;
  args.out = Matrix<Bf16>(out.data(), spans * rows, width);
  for (auto _ : state) host.device->ops().attention(args, *host.stream);
  const double seen = spans * (double(rows) * cached + 0.5 * rows * (rows + 1));
  state.counters["GFLOP/s"] =
      benchmark::Counter(4e-9 * width * seen * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
  state.SetBytesProcessed(state.iterations() * int64_t{spans} * (cached + rows) * 2 * 2 * c.num_kv_heads * c.head_dim);
}

void register_all() {
  benchmark::RegisterBenchmark("DramRead", dram_read)->UseRealTime();
  for (const std::string& isa : cases::supported_isas()) {
    for (const cases::LinearCase& c : cases::kLinearSpeed) {
      const std::string shape = std::to_string(c.rows) + "x" + std::to_string(c.in) + "x" + std::to_string(c.out);
      for (const bool deterministic : {true, false}) {
        const std::string name = "Linear/" + isa + (deterministic ? "/own/" : "/any/") + shape;
        benchmark::RegisterBenchmark(name.c_str(), linear, isa, deterministic, c)->UseRealTime();
      }
    }
    for (const cases::FfnCase& c : cases::kFfnSpeed) {
      const std::string name = "ExpertFfn/" + isa + "/rows:" + std::to_string(c.rows);
      benchmark::RegisterBenchmark(name.c_str(), expert_ffn, isa, c)->UseRealTime();
    }
    for (const auto& [spans, cached, rows] : {std::tuple{1, 127, 1}, {1, 4000, 1}, {16, 500, 1}, {1, 0, 512}}) {
      const std::string name =
          "Attention/" + isa + "/" + std::to_string(spans) + "x" + std::to_string(cached) + "+" + std::to_string(rows);
      benchmark::RegisterBenchmark(name.c_str(), attention, isa, spans, cached, rows)->UseRealTime();
    }
  }
}

}  // namespace
}  // namespace moed

int main(int argc, char** argv) {
  moed::register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}
