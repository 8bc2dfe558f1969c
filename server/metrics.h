#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "engine/engine.h"
#include "scheduler/scheduler.h"

namespace moed {

// A request whose choices have all ended, or that was given up. Times 0: it did not come so far.
struct FinishedRequest {
  FinishReason reason = FinishReason::kNone;  // of the choice that ended last
  int64_t arrival_us = 0;
  int64_t scheduled_us = 0;  // its first pass
  int64_t first_token_us = 0;
  int64_t end_us = 0;
  int64_t prompt_tokens = 0;
  int64_t generated_tokens = 0;      // of all choices
  int64_t generated_tokens_max = 0;  // of the longest choice
  int64_t max_tokens = 0;
  bool was_waiting = true;  // kCancelled: it was not among the running
  // Sums over its choices: first token to last, and the tokens after the first.
  int64_t later_tokens_us = 0;
  int64_t later_tokens = 0;
};

// The daemon's Prometheus series: vLLM's names, labels (model_name, engine="0") and buckets, so that its dashboards
// work unchanged; and, named moed:, what only this engine has: experts and two KV pools. Every series is present from
// the start, but for those of set_cache() and set_plan(). Thread-safe; recording takes no lock that a scrape
// holds for long.
class ServerMetrics {
 public:
  explicit ServerMetrics(const std::string& model_name);
  ~ServerMetrics();

  // At most once.
  void set_cache(int32_t block_tokens, int64_t host_blocks, int64_t device_blocks, bool prefix_cache);
  // At most once.
  void set_plan(const std::string& policy, const std::string& kv, int32_t halves);
  void set_scheduler(const SchedulerStats& stats);
  void set_engine(const EngineStats& stats);
  void add_prompt(int64_t prompt_tokens);
  void add_generated_token();
  void add_iteration(int64_t rows);
  void add_times(const StepTimes& times);
  void observe_first_token(double seconds);
  void observe_inter_token(double seconds);
  // Requests that were cancelled or failed are counted, their times are not.
  void finish_request(const FinishedRequest& request);
  // The Prometheus text format.
  std::string text() const;

 private:
  struct State;
  void add_own_series();
  std::unique_ptr<State> state_;
};

}  // namespace moed
