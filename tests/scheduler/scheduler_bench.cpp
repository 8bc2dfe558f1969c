// What the scheduler itself costs a step: 4,096 decoding sequences, one in a hundred replaced at each step. Prints the
// median and the 99th percentile of schedule() + commit() in microseconds. Not a test: run it by hand on a quiet
// machine.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "scheduler/scheduler.h"

namespace {

using moed::PassKind;

constexpr int32_t kSequences = 4096;
constexpr int32_t kNewTokens = 100;  // so one in a hundred ends at each step
constexpr int32_t kVocab = 50'000;
constexpr int32_t kWarmUpSteps = 400;
constexpr int32_t kSteps = 2000;

// CPU time of this thread: what other processes take from the machine does not count.
double cpu_us() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) * 1e-3;
}

void add_requests(moed::Scheduler& scheduler, int32_t num_running, std::mt19937& random, int64_t& last_id) {
  const moed::RequestLimits limits{.vocab_size = kVocab, .max_model_len = 4096, .n_max = 1, .new_tokens_max = 4096};
  for (; num_running < kSequences; ++num_running) {
    moed::RequestSpec spec;
    spec.id = ++last_id;
    spec.arrival_us = spec.id;
    spec.prompt.resize(20 + random() % 40);
    for (int32_t& token : spec.prompt) token = static_cast<int32_t>(random() % kVocab);
    // The first ones get lengths from the whole range, so that their ends spread.
    spec.max_tokens = last_id <= kSequences ? 1 + static_cast<int32_t>(random() % kNewTokens) : kNewTokens;
    MOED_CHECK(scheduler.add(moed::Request::make(std::move(spec), limits).value()).ok()) << "the queue is full";
  }
}

}  // namespace

int main() {
  moed::Scheduler scheduler({.block_tokens = 16,
                             .num_blocks = 65'536,
                             .pass_rows_max = 8192,
                             .sequences_max = kSequences,
                             .queue_max = kSequences,
                             .bulk_rows_min = 64});
  const moed::StepModel model(1.0, 1.0, 0.0);
  std::mt19937 random(1);
  int64_t last_id = 0;
  std::vector<double> step_us, schedule_us;
  int64_t num_rows = 0;
  for (int32_t step = 0; step < kWarmUpSteps + kSteps; ++step) {
    add_requests(scheduler, scheduler.stats().num_running, random, last_id);
    double begin_us = cpu_us();
    MOED_CHECK(scheduler.schedule(PassKind::kBulk, model, 0).empty()) << "no prompt is long";
    const auto steps = scheduler.schedule(PassKind::kInteractive, model, 0);
    const double scheduled_us = cpu_us() - begin_us;
    moed::StepOutput output;
    output.sequences.resize(steps.size());
    for (size_t i = 0; i < steps.size(); ++i) {
      output.sequences[i].id = steps[i].id;
      if (steps[i].sampling != nullptr)
        output.sequences[i].sampled.emplace().token = static_cast<int32_t>(random() % kVocab);
    }
    begin_us = cpu_us();
    scheduler.commit(PassKind::kInteractive, output);
    const double total_us = scheduled_us + cpu_us() - begin_us;
    if (step < kWarmUpSteps) continue;
    schedule_us.push_back(scheduled_us);
    step_us.push_back(total_us);
    num_rows += static_cast<int64_t>(steps.size());
  }
  std::ranges::sort(step_us);
  std::ranges::sort(schedule_us);
  const auto rank = [](const std::vector<double>& sorted, double q) {
    return sorted[static_cast<size_t>(q * (sorted.size() - 1))];
  };
  std::printf(
      "%.0f sequences a step; schedule + commit us: median %.1f, p99 %.1f; schedule alone: median %.1f, p99 %.1f\n",
      static_cast<double>(num_rows) / kSteps, rank(step_us, 0.5), rank(step_us, 0.99), rank(schedule_us, 0.5),
      rank(schedule_us, 0.99));
  return 0;
}
