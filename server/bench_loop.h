#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "engine/open_engine.h"
#include "model/config.h"
#include "plan/policies.h"
#include "plan/step_model.h"
#include "scheduler/scheduler.h"

namespace moed {

// Clients in a closed loop: each sends a request, waits for its last token and sends the next, all of the same lengths.
struct BenchWorkload {
  int32_t clients = 8;
  int32_t requests = 0;  // of all clients together; 0: one each
  int32_t prompt_tokens = 512;
  int32_t new_tokens = 64;
  // One more request, which asks for one token, comes when every client has long_after of its own; 0: none.
  int32_t long_prompt_tokens = 0;
  int32_t long_after_tokens = 8;
  uint64_t seed = 0;  // of prompts and sampling
};

// What happened in a stretch of time, on the device's clock. Grows only.
struct BenchCounts {
  double at_us = 0.0;
  int64_t prompt_tokens = 0;  // of requests whose first token came
  int64_t new_tokens = 0;
  std::array<int64_t, 2> passes{};  // by PassKind
  int64_t rows = 0;
  StepTimes lanes;
  double bound_us = 0.0;                   // closed_form_bound() of each pass, added up; simulated machines only
  std::array<double, 3> part_bounds_us{};  // the same of link, host and device alone
  std::optional<DeviceTotals> device;      // empty: it does not count
  EngineStats engine;
};

struct BenchLatency {
  double mean_ms = 0.0;
  double median_ms = 0.0;
  double worst_ms = 0.0;
};

struct BenchResult {
  BenchCounts begin;  // of the run
  BenchCounts end;
  // From the moment when every client has a first token until the first has nothing more to send: nothing of a ramp.
  // Equal where there is no such stretch.
  BenchCounts steady_begin;
  BenchCounts steady_end;
  BenchLatency first_token;        // of the clients' requests
  BenchLatency token;              // mean time between tokens of a request, over requests
  BenchLatency token_beside_long;  // between tokens, while the long prompt ran at least in part; zeroes without one
  double long_prompt_ms = 0.0;     // from its arrival to its token
  int64_t preemptions = 0;
};

// What a run needs; all of it outlives the call.
struct BenchInputs {
  OpenedEngine& opened;
  const ModelConfig& model;
  const Planning& planning;
  const SchedulerConfig& scheduler;
  StepModel prior;
  int32_t yield_layers = 1;
  // Called after each pass, with whether the steady stretch has begun; may be empty.
  std::function<void(bool steady)> passed;
};

// Drives scheduler and engine as the serving loop does, on the device's clock, until every request has ended. Errors:
// kInvalidArgument naming the field of a workload that the model or the scheduler cannot take.
StatusOr<BenchResult> run_bench(const BenchInputs& inputs, const BenchWorkload& workload);

}  // namespace moed
