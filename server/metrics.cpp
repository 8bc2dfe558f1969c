#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <array>
#include <map>
#include <utility>
#include <vector>

#include "engine/lane_estimate.h"

namespace moed {
namespace {

using Buckets = prometheus::Histogram::BucketBoundaries;

// vLLM's boundaries, seconds and tokens.
const Buckets kFirstTokenBuckets = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,  0.25,  0.5,   0.75,
                                    1.0,   2.5,   5.0,  7.5,  10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0};
const Buckets kInterTokenBuckets = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2,  0.3,  0.4, 0.5,
                                    0.75, 1.0,   2.5,  5.0,   7.5, 10.0, 20.0, 40.0, 80.0};
const Buckets kRequestBuckets = {0.3,  0.5,  0.8,  1.0,  1.5,   2.0,   2.5,   5.0,   10.0,   15.0,  20.0,
                                 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0};
// 1, 2, 5 and their tenfolds, as vLLM makes them for a context of 1 Mi tokens.
const Buckets kTokenBuckets = {1,     2,     5,      10,     20,     50,      100,     200,     500,      1'000,
                               2'000, 5'000, 10'000, 20'000, 50'000, 100'000, 200'000, 500'000, 1'000'000};
const Buckets kIterationBuckets = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};

double seconds(int64_t us) { return static_cast<double>(us) * 1e-6; }

// Brings a counter up to what was counted elsewhere.
void raise(prometheus::Counter* counter, double total) {
  const double growth = total - counter->Value();
  if (growth > 0) counter->Increment(growth);
}

const char* reason_label(FinishReason reason) {
  switch (reason) {
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "abort";
    case FinishReason::kError:
      return "error";
    case FinishReason::kNone:
    case FinishReason::kStop:
      break;
  }
  return "stop";
}

struct LaneTime {
  const char* name;
  double StepTimes::*time_us;
};
constexpr std::array<LaneTime, 7> kLaneTimes{{{"attention", &StepTimes::attention_us},
                                              {"experts", &StepTimes::experts_us},
                                              {"dense", &StepTimes::dense_us},
                                              {"sampling", &StepTimes::sample_us},
                                              {"host_attention", &StepTimes::host_attention_us},
                                              {"host_experts", &StepTimes::host_experts_us},
                                              {"ring_wait", &StepTimes::ring_wait_us}}};

}  // namespace

struct ServerMetrics::State {
  prometheus::Registry registry;
  prometheus::Labels labels;

  prometheus::Gauge* running = nullptr;
  prometheus::Gauge* waiting = nullptr;
  prometheus::Gauge* kv_usage = nullptr;
  prometheus::Counter* prompt_tokens = nullptr;
  prometheus::Counter* generation_tokens = nullptr;
  prometheus::Counter* preemptions = nullptr;
  prometheus::Counter* prefix_queries = nullptr;
  prometheus::Counter* prefix_hits = nullptr;
  prometheus::Histogram* first_token = nullptr;
  prometheus::Histogram* inter_token = nullptr;
  prometheus::Histogram* time_per_output_token = nullptr;
  prometheus::Histogram* e2e = nullptr;
  prometheus::Histogram* queue_time = nullptr;
  prometheus::Histogram* prefill_time = nullptr;
  prometheus::Histogram* decode_time = nullptr;
  prometheus::Histogram* inference_time = nullptr;
  prometheus::Histogram* request_prompt_tokens = nullptr;
  prometheus::Histogram* request_generation_tokens = nullptr;
  prometheus::Histogram* request_generation_tokens_max = nullptr;
  prometheus::Histogram* request_max_tokens = nullptr;
  prometheus::Histogram* iteration_tokens = nullptr;
  std::map<std::string, prometheus::Counter*> success;
  std::map<std::string, prometheus::Counter*> cancelled;  // by phase
  std::array<prometheus::Gauge*, 2> pool_usage{};         // by Pool
  std::array<prometheus::Gauge*, 2> pool_blocks{};        // by Pool
  prometheus::Counter* expert_hits = nullptr;
  prometheus::Counter* expert_misses = nullptr;
  prometheus::Counter* experts_prefetched = nullptr;
  prometheus::Counter* experts_prefetched_unused = nullptr;
  prometheus::Counter* expert_evictions = nullptr;
  prometheus::Counter* expert_bytes = nullptr;
  prometheus::Counter* host_expert_rows = nullptr;
  prometheus::Counter* device_expert_rows = nullptr;
  prometheus::Counter* copy_wait = nullptr;
  std::vector<prometheus::Counter*> lanes;  // as kLaneTimes
  LaneEstimate lane_estimate;               // of the serving thread

  prometheus::Gauge* gauge(const char* name, const char* help) {
    return &prometheus::BuildGauge().Name(name).Help(help).Labels(labels).Register(registry).Add({});
  }
  prometheus::Counter* counter(const char* name, const char* help) {
    return &prometheus::BuildCounter().Name(name).Help(help).Labels(labels).Register(registry).Add({});
  }
  prometheus::Histogram* histogram(const char* name, const char* help, const Buckets& buckets) {
    return &prometheus::BuildHistogram().Name(name).Help(help).Labels(labels).Register(registry).Add({}, buckets);
  }
};

ServerMetrics::ServerMetrics(const std::string& model_name) : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.labels = {{"model_name", model_name}, {"engine", "0"}};
  s.running = s.gauge("vllm:num_requests_running", "Number of sequences that run.");
  s.waiting = s.gauge("vllm:num_requests_waiting", "Number of requests that wait.");
  s.kv_usage = s.gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks that sequences hold. 1 means all.");
  s.prompt_tokens = s.counter("vllm:prompt_tokens_total", "Prompt tokens of requests that began to generate.");
  s.generation_tokens = s.counter("vllm:generation_tokens_total", "Generated tokens.");
  s.preemptions = s.counter("vllm:num_preemptions_total", "Sequences preempted for lack of KV blocks.");
  s.prefix_queries = s.counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.");
  s.prefix_hits = s.counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.");
  s.first_token = s.histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", kFirstTokenBuckets);
  s.inter_token =
      s.histogram("vllm:inter_token_latency_seconds", "Between two tokens of a choice.", kInterTokenBuckets);
  s.time_per_output_token =
      s.histogram("vllm:request_time_per_output_token_seconds",
                  "Mean time of an output token of a request, the first left out.", kInterTokenBuckets);
  s.e2e = s.histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", kRequestBuckets);
  s.iteration_tokens = s.histogram("vllm:iteration_tokens_total", "Rows of a pass.", kIterationBuckets);
  s.queue_time = s.histogram("vllm:request_queue_time_seconds", "Arrival to first pass.", kRequestBuckets);
  s.prefill_time = s.histogram("vllm:request_prefill_time_seconds", "First pass to first token.", kRequestBuckets);
  s.decode_time = s.histogram("vllm:request_decode_time_seconds", "First token to last.", kRequestBuckets);
  s.inference_time = s.histogram("vllm:request_inference_time_seconds", "First pass to last token.", kRequestBuckets);
  s.request_prompt_tokens = s.histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", kTokenBuckets);
  s.request_generation_tokens =
      s.histogram("vllm:request_generation_tokens", "Generated tokens of a request, all choices.", kTokenBuckets);
  s.request_generation_tokens_max = s.histogram("vllm:request_max_num_generation_tokens",
                                                "Generated tokens of a request's longest choice.", kTokenBuckets);
  s.request_max_tokens = s.histogram("vllm:request_params_max_tokens", "max_tokens of a request.", kTokenBuckets);
  auto& cancelled = prometheus::BuildCounter()
                        .Name("moed:requests_cancelled_total")
                        .Help("Requests that were given up, by how far they had come.")
                        .Labels(s.labels)
                        .Register(s.registry);
  for (const char* const phase : {"waiting", "prefill", "decode"}) {
    s.cancelled[phase] = &cancelled.Add({{"phase", phase}});
  }
  auto& success = prometheus::BuildCounter()
                      .Name("vllm:request_success_total")
                      .Help("Requests that ended, by reason.")
                      .Labels(s.labels)
                      .Register(s.registry);
  for (const char* reason : {"stop", "length", "abort", "error"}) {
    s.success[reason] = &success.Add({{"finished_reason", reason}});
  }
  add_own_series();
}

void ServerMetrics::add_own_series() {
  State& s = *state_;
  auto& usage = prometheus::BuildGauge()
                    .Name("moed:kv_usage")
                    .Help("Share of a KV pool's blocks that sequences hold. 1 means all.")
                    .Labels(s.labels)
                    .Register(s.registry);
  auto& blocks = prometheus::BuildGauge()
                     .Name("moed:kv_blocks")
                     .Help("Blocks of a KV pool.")
                     .Labels(s.labels)
                     .Register(s.registry);
  auto& rows = prometheus::BuildCounter()
                   .Name("moed:expert_requests_total")
                   .Help("Rows times the experts that they chose, by where they were computed.")
                   .Labels(s.labels)
                   .Register(s.registry);
  for (const Pool pool : {Pool::kHost, Pool::kDevice}) {
    const prometheus::Labels label = {{"pool", pool == Pool::kHost ? "host" : "device"}};
    s.pool_usage[static_cast<size_t>(pool)] = &usage.Add(label);
    s.pool_blocks[static_cast<size_t>(pool)] = &blocks.Add(label);
  }
  s.host_expert_rows = &rows.Add({{"place", "host"}});
  s.device_expert_rows = &rows.Add({{"place", "device"}});
  s.expert_hits = s.counter("moed:expert_cache_hits_total", "Experts wanted on the device that stood in its memory.");
  s.expert_misses = s.counter("moed:expert_cache_misses_total", "Experts wanted on the device that had to be copied.");
  s.experts_prefetched = s.counter("moed:experts_prefetched_total", "Experts copied before a layer wanted them.");
  s.experts_prefetched_unused =
      s.counter("moed:experts_prefetched_unused_total", "Of these, the ones overwritten before a layer wanted them.");
  s.expert_evictions = s.counter("moed:expert_evictions_total", "Experts that others took the place of.");
  s.expert_bytes = &prometheus::BuildCounter()
                        .Name("moed:h2d_bytes_total")
                        .Help("Bytes copied to the device, by what they are.")
                        .Labels(s.labels)
                        .Register(s.registry)
                        .Add({{"kind", "experts"}});
  s.copy_wait = s.counter("moed:expert_copy_wait_seconds_total", "Time with nothing to do but wait for copies.");
  auto& lanes =
      prometheus::BuildCounter()
          .Name("moed:lane_seconds")
          .Help(
              "Time of passes: stretches of the device's stream, estimated from some passes where marks cost, "
              "and what the host lane did meanwhile.")
          .Labels(s.labels)
          .Register(s.registry);
  for (const LaneTime& lane : kLaneTimes) s.lanes.push_back(&lanes.Add({{"lane", lane.name}, {"kind", "measured"}}));
}

ServerMetrics::~ServerMetrics() = default;

void ServerMetrics::add_times(const StepTimes& times) {
  const StepTimes estimate = state_->lane_estimate.of(times);
  for (size_t lane = 0; lane < kLaneTimes.size(); ++lane) {
    state_->lanes[lane]->Increment(estimate.*kLaneTimes[lane].time_us * 1e-6);
  }
}

void ServerMetrics::set_plan(const std::string& policy, const std::string& kv, int32_t halves) {
  prometheus::BuildGauge()
      .Name("moed:plan")
      .Help("How passes are planned.")
      .Labels(state_->labels)
      .Register(state_->registry)
      .Add({{"policy", policy}, {"kv", kv}, {"halves", std::to_string(halves)}})
      .Set(1);
}

void ServerMetrics::set_cache(int32_t block_tokens, int64_t host_blocks, int64_t device_blocks, bool prefix_cache) {
  prometheus::BuildGauge()
      .Name("vllm:cache_config_info")
      .Help("The KV cache: tokens of a block, blocks, whether prompts share them.")
      .Labels(state_->labels)
      .Register(state_->registry)
      .Add({{"block_size", std::to_string(block_tokens)},
            {"num_gpu_blocks", std::to_string(device_blocks)},
            {"num_cpu_blocks", std::to_string(host_blocks)},
            {"enable_prefix_caching", prefix_cache ? "True" : "False"}})
      .Set(1);
}

void ServerMetrics::set_scheduler(const SchedulerStats& stats) {
  State& s = *state_;
  s.running->Set(stats.num_running);
  s.waiting->Set(stats.num_waiting);
  s.kv_usage->Set(stats.kv_usage());
  for (const Pool pool : {Pool::kHost, Pool::kDevice}) {
    const PoolStats& blocks = stats.pool(pool);
    s.pool_blocks[static_cast<size_t>(pool)]->Set(static_cast<double>(blocks.blocks_total));
    s.pool_usage[static_cast<size_t>(pool)]->Set(blocks.blocks_total > 0 ? static_cast<double>(blocks.blocks_used) /
                                                                               static_cast<double>(blocks.blocks_total)
                                                                         : 0.0);
  }
  raise(s.preemptions, static_cast<double>(stats.num_preemptions));
  raise(s.prefix_queries, static_cast<double>(stats.prefix_queries_tokens));
  raise(s.prefix_hits, static_cast<double>(stats.prefix_hits_tokens));
}

void ServerMetrics::set_engine(const EngineStats& stats) {
  State& s = *state_;
  raise(s.expert_hits, static_cast<double>(stats.expert_hits));
  raise(s.expert_misses, static_cast<double>(stats.expert_misses));
  raise(s.experts_prefetched, static_cast<double>(stats.experts_prefetched));
  raise(s.experts_prefetched_unused, static_cast<double>(stats.experts_prefetched_unused));
  raise(s.expert_evictions, static_cast<double>(stats.expert_evictions));
  raise(s.expert_bytes, static_cast<double>(stats.expert_bytes_copied));
  raise(s.host_expert_rows, static_cast<double>(stats.host_expert_rows));
  raise(s.device_expert_rows, static_cast<double>(stats.device_expert_rows));
  raise(s.copy_wait, stats.ring_wait_us * 1e-6);
}

void ServerMetrics::add_prompt(int64_t prompt_tokens) {
  state_->prompt_tokens->Increment(static_cast<double>(prompt_tokens));
}
void ServerMetrics::add_generated_token() { state_->generation_tokens->Increment(); }
void ServerMetrics::add_iteration(int64_t rows) { state_->iteration_tokens->Observe(static_cast<double>(rows)); }
void ServerMetrics::observe_first_token(double seconds) { state_->first_token->Observe(seconds); }
void ServerMetrics::observe_inter_token(double seconds) { state_->inter_token->Observe(seconds); }

void ServerMetrics::finish_request(const FinishedRequest& request) {
  State& s = *state_;
  s.success[reason_label(request.reason)]->Increment();
  if (request.reason == FinishReason::kCancelled) {
    const char* const before_token = request.was_waiting ? "waiting" : "prefill";
    s.cancelled[request.first_token_us > 0 ? "decode" : before_token]->Increment();
  }
  if (request.reason == FinishReason::kCancelled || request.reason == FinishReason::kError) return;
  s.e2e->Observe(seconds(request.end_us - request.arrival_us));
  s.request_prompt_tokens->Observe(static_cast<double>(request.prompt_tokens));
  s.request_generation_tokens->Observe(static_cast<double>(request.generated_tokens));
  s.request_generation_tokens_max->Observe(static_cast<double>(request.generated_tokens_max));
  s.request_max_tokens->Observe(static_cast<double>(request.max_tokens));
  if (request.scheduled_us == 0 || request.first_token_us == 0) return;
  s.queue_time->Observe(seconds(request.scheduled_us - request.arrival_us));
  s.prefill_time->Observe(seconds(request.first_token_us - request.scheduled_us));
  s.decode_time->Observe(seconds(request.end_us - request.first_token_us));
  s.inference_time->Observe(seconds(request.end_us - request.scheduled_us));
  if (request.later_tokens > 0) {
    s.time_per_output_token->Observe(seconds(request.later_tokens_us) / static_cast<double>(request.later_tokens));
  }
}

std::string ServerMetrics::text() const { return prometheus::TextSerializer().Serialize(state_->registry.Collect()); }

}  // namespace moed
