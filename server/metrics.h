#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "scheduler/scheduler.h"

namespace moed {

// The daemon's Prometheus series: vLLM's names, labels (model_name, engine="0") and buckets, so that its dashboards
// work unchanged. Every series is present from the start. Thread-safe; recording takes no lock that a scrape holds for
// long.
class ServerMetrics {
 public:
  explicit ServerMetrics(const std::string& model_name);
  ~ServerMetrics();

  void set_scheduler(const SchedulerStats& stats);
  void add_prompt(int64_t prompt_tokens);
  void add_generated_token();
  void add_iteration(int64_t rows);
  void observe_first_token(double seconds);
  void observe_inter_token(double seconds);
  // A request whose choices have all ended. reason: of the choice that ended last. decode_seconds: first token to last.
  void finish_request(FinishReason reason, double e2e_seconds, double decode_seconds, int64_t generated_tokens);
  // The Prometheus text format.
  std::string text() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moed
