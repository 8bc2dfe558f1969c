#include "server/metrics.h"

#include <gtest/gtest.h>

#include <sstream>

namespace moed {
namespace {

// The value of the first line that begins with `series` and holds `label`; -1 when there is none.
double value_of(const std::string& text, const std::string& series, const std::string& label = "") {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with(series + "{") && line.find(label) != std::string::npos) {
      return std::stod(line.substr(line.rfind(' ')));
    }
  }
  return -1.0;
}

// vLLM's documented names; histograms by their sum and count.
TEST(ServerMetricsTest, EverySeriesIsThereFromTheStart) {
  ServerMetrics metrics("a-model");
  const std::string text = metrics.text();
  for (const char* name :
       {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
        "generation_tokens_total", "num_preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total"}) {
    EXPECT_EQ(value_of(text, std::string("vllm:") + name), 0.0) << name;
  }
  for (const char* name :
       {"time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
        "request_generation_tokens", "request_max_num_generation_tokens", "request_params_max_tokens",
        "iteration_tokens_total"}) {
    EXPECT_EQ(value_of(text, std::string("vllm:") + name + "_count"), 0.0) << name;
    EXPECT_EQ(value_of(text, std::string("vllm:") + name + "_sum"), 0.0) << name;
  }
  for (const char* name : {"expert_cache_hits_total", "expert_cache_misses_total", "experts_prefetched_total",
                           "experts_prefetched_unused_total", "expert_evictions_total", "h2d_bytes_total",
                           "expert_copy_wait_seconds_total"}) {
    EXPECT_EQ(value_of(text, std::string("moed:") + name), 0.0) << name;
  }
  for (const char* reason : {"stop", "length", "abort", "error"}) {
    EXPECT_EQ(value_of(text, "vllm:request_success_total", std::string("finished_reason=\"") + reason + "\""), 0.0);
  }
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("#")) continue;
    EXPECT_NE(line.find("model_name=\"a-model\""), std::string::npos) << line;
    EXPECT_NE(line.find("engine=\"0\""), std::string::npos) << line;
  }
}

// The boundaries of a histogram, as its text names them; without +Inf.
std::vector<double> buckets_of(const std::string& text, const std::string& series) {
  std::vector<double> found;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t at = line.find("le=\"");
    if (!line.starts_with(series + "_bucket{") || at == std::string::npos) continue;
    if (line.compare(at + 4, 4, "+Inf") != 0) found.push_back(std::stod(line.substr(at + 4)));
  }
  return found;
}

// What vLLM's vllm/v1/metrics/loggers.py has: dashboards and alerts name these boundaries.
TEST(ServerMetricsTest, HistogramsHaveTheBucketsOfVllm) {
  const ServerMetrics metrics("m");
  const std::string text = metrics.text();
  const std::vector<double> between_tokens = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2,  0.3,  0.4, 0.5,
                                              0.75, 1.0,   2.5,  5.0,   7.5, 10.0, 20.0, 40.0, 80.0};
  const std::vector<double> whole = {0.3,  0.5,  0.8,  1.0,  1.5,   2.0,   2.5,   5.0,   10.0,   15.0,  20.0,
                                     30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0};
  std::vector<double> counts;
  for (double power = 1; power <= 1e6; power *= 10) {
    for (const double step : {1.0, 2.0, 5.0}) {
      if (step * power <= 1e6) counts.push_back(step * power);
    }
  }
  EXPECT_EQ(buckets_of(text, "vllm:time_to_first_token_seconds"),
            (std::vector<double>{0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,  0.25,  0.5,   0.75,
                                 1.0,   2.5,   5.0,  7.5,  10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0}));
  for (const char* const name : {"inter_token_latency_seconds", "request_time_per_output_token_seconds"}) {
    EXPECT_EQ(buckets_of(text, std::string("vllm:") + name), between_tokens) << name;
  }
  for (const char* const name :
       {"e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "request_inference_time_seconds"}) {
    EXPECT_EQ(buckets_of(text, std::string("vllm:") + name), whole) << name;
  }
  for (const char* const name : {"request_prompt_tokens", "request_generation_tokens",
                                 "request_max_num_generation_tokens", "request_params_max_tokens"}) {
    EXPECT_EQ(buckets_of(text, std::string("vllm:") + name), counts) << name;
  }
  EXPECT_EQ(buckets_of(text, "vllm:iteration_tokens_total"),
            (std::vector<double>{1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384}));
}

TEST(ServerMetricsTest, TheCacheIsDescribedOnceItIsKnown) {
  ServerMetrics metrics("m");
  metrics.set_cache(16, 4096, 64, true);
  EXPECT_EQ(value_of(metrics.text(), "vllm:cache_config_info", "num_cpu_blocks=\"4096\""), 1.0);
  EXPECT_EQ(value_of(metrics.text(), "vllm:cache_config_info", "num_gpu_blocks=\"64\""), 1.0);
}

TEST(ServerMetricsTest, ExpertsAndPoolsAreCounted) {
  ServerMetrics metrics("m");
  SchedulerStats scheduler;
  scheduler.pools[static_cast<size_t>(Pool::kHost)] = {.blocks_used = 10, .blocks_total = 40};
  scheduler.pools[static_cast<size_t>(Pool::kDevice)] = {.blocks_used = 15, .blocks_total = 20};
  metrics.set_scheduler(scheduler);
  const EngineStats stats{.expert_hits = 11,
                          .expert_misses = 7,
                          .experts_prefetched = 5,
                          .experts_prefetched_unused = 2,
                          .expert_evictions = 3,
                          .expert_bytes_copied = 1'000'000'007,
                          .host_expert_rows = 100,
                          .device_expert_rows = 300,
                          .ring_wait_us = 2'500'000.0};
  for (int i = 0; i < 2; ++i) metrics.set_engine(stats);  // totals, not growth
  const std::string text = metrics.text();
  EXPECT_EQ(value_of(text, "moed:kv_usage", "pool=\"host\""), 0.25);
  EXPECT_EQ(value_of(text, "moed:kv_usage", "pool=\"device\""), 0.75);
  EXPECT_EQ(value_of(text, "moed:kv_blocks", "pool=\"device\""), 20.0);
  EXPECT_EQ(value_of(text, "vllm:kv_cache_usage_perc"), 25.0 / 60.0);
  EXPECT_EQ(value_of(text, "moed:expert_cache_hits_total"), 11.0);
  EXPECT_EQ(value_of(text, "moed:expert_cache_misses_total"), 7.0);
  EXPECT_EQ(value_of(text, "moed:experts_prefetched_total"), 5.0);
  EXPECT_EQ(value_of(text, "moed:experts_prefetched_unused_total"), 2.0);
  EXPECT_EQ(value_of(text, "moed:expert_evictions_total"), 3.0);
  EXPECT_EQ(value_of(text, "moed:h2d_bytes_total"), 1'000'000'007.0);
  EXPECT_EQ(value_of(text, "moed:expert_requests_total", "place=\"host\""), 100.0);
  EXPECT_EQ(value_of(text, "moed:expert_requests_total", "place=\"device\""), 300.0);
  EXPECT_EQ(value_of(text, "moed:expert_copy_wait_seconds_total"), 2.5);
}

TEST(ServerMetricsTest, LanesAddUpAndThePlanIsNamed) {
  ServerMetrics metrics("m");
  EXPECT_EQ(value_of(metrics.text(), "moed:lane_seconds", "ring_wait"), 0.0);
  for (int i = 0; i < 2; ++i) metrics.add_times({.attention_us = 250'000.0, .host_experts_us = 1'000'000.0});
  metrics.set_plan("hot", "split", 2);
  const std::string text = metrics.text();
  EXPECT_EQ(value_of(text, "moed:lane_seconds", "lane=\"attention\""), 0.5);
  EXPECT_EQ(value_of(text, "moed:lane_seconds", "lane=\"host_experts\""), 2.0);
  EXPECT_EQ(value_of(text, "moed:plan", "policy=\"hot\""), 1.0);
}

// A pass of 1 s, half of it attention, after two whose lanes nobody measured: they count as alike.
TEST(ServerMetricsTest, MeasuredPassesStandForTheOthers) {
  ServerMetrics metrics("m");
  const StepTimes measured{.total_us = 1e6, .attention_us = 0.5e6, .dense_us = 0.5e6, .ring_wait_us = 0.1e6};
  const StepTimes other{.lanes_measured = false, .total_us = 2e6, .ring_wait_us = 0.2e6};
  for (const StepTimes& times : {other, other, measured, measured, other}) metrics.add_times(times);
  const std::string text = metrics.text();
  EXPECT_DOUBLE_EQ(value_of(text, "moed:lane_seconds", "lane=\"attention\""), 3.0);
  EXPECT_DOUBLE_EQ(value_of(text, "moed:lane_seconds", "lane=\"dense\""), 3.0);
  EXPECT_EQ(value_of(text, "moed:lane_seconds", "lane=\"experts\""), 0.0);
  EXPECT_DOUBLE_EQ(value_of(text, "moed:lane_seconds", "lane=\"ring_wait\""), 0.8);
}

TEST(ServerMetricsTest, ARequestsTimeIsSplitAtItsFirstPassAndItsFirstToken) {
  ServerMetrics metrics("m");
  // Two choices of 3 and 5 tokens: 2 + 4 intervals that took 12 s in all.
  metrics.finish_request({.reason = FinishReason::kLength,
                          .arrival_us = 1'000'000,
                          .scheduled_us = 3'000'000,
                          .first_token_us = 6'000'000,
                          .end_us = 16'000'000,
                          .prompt_tokens = 7,
                          .generated_tokens = 8,
                          .generated_tokens_max = 5,
                          .max_tokens = 100,
                          .later_tokens_us = 12'000'000,
                          .later_tokens = 6});
  const std::string text = metrics.text();
  EXPECT_DOUBLE_EQ(value_of(text, "vllm:request_queue_time_seconds_sum"), 2.0);
  EXPECT_DOUBLE_EQ(value_of(text, "vllm:request_prefill_time_seconds_sum"), 3.0);
  EXPECT_DOUBLE_EQ(value_of(text, "vllm:request_decode_time_seconds_sum"), 10.0);
  EXPECT_DOUBLE_EQ(value_of(text, "vllm:request_inference_time_seconds_sum"), 13.0);
  EXPECT_DOUBLE_EQ(value_of(text, "vllm:e2e_request_latency_seconds_sum"), 15.0);
  EXPECT_DOUBLE_EQ(value_of(text, "vllm:request_time_per_output_token_seconds_sum"), 2.0);
  EXPECT_DOUBLE_EQ(value_of(text, "vllm:request_prompt_tokens_sum"), 7.0);
  EXPECT_DOUBLE_EQ(value_of(text, "vllm:request_generation_tokens_sum"), 8.0);
  EXPECT_DOUBLE_EQ(value_of(text, "vllm:request_max_num_generation_tokens_sum"), 5.0);
  EXPECT_DOUBLE_EQ(value_of(text, "vllm:request_params_max_tokens_sum"), 100.0);
}

TEST(ServerMetricsTest, RequestsThatWereGivenUpAreCountedButNotTimed) {
  ServerMetrics metrics("m");
  metrics.finish_request({.reason = FinishReason::kCancelled});
  const std::string text = metrics.text();
  EXPECT_EQ(value_of(text, "vllm:request_success_total", "finished_reason=\"abort\""), 1.0);
  EXPECT_EQ(value_of(text, "moed:requests_cancelled_total", "phase=\"waiting\""), 1.0);
  EXPECT_EQ(value_of(text, "moed:requests_cancelled_total", "phase=\"prefill\""), 0.0) << "there from the start";
  EXPECT_EQ(value_of(text, "vllm:e2e_request_latency_seconds_count"), 0.0);
}

}  // namespace
}  // namespace moed
