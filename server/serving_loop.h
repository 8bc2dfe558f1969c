#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/channel.h"
#include "base/thread_annotations.h"
#include "engine/engine.h"
#include "plan/policies.h"
#include "plan/step_model.h"
#include "scheduler/scheduler.h"
#include "server/metrics.h"
#include "server/request_stream.h"

namespace moed {

struct ServingConfig {
  int32_t queue_max = 1024;    // submissions on their way to the scheduler
  int32_t yield_layers = 1;    // layers of a bulk pass between interactive passes
  double request_seconds = 0;  // a request older than that fails with kDeadlineExceeded; 0: no limit
  Planning planning;
};

// One request on its way in.
struct Submission {
  Request request;
  std::shared_ptr<RequestStream> stream;
};

// The serving thread: takes requests in, runs passes, hands tokens out. It alone touches the scheduler and the engine.
// At each layer boundary of each pass it looks for new requests and for clients that left.
class ServingLoop {
 public:
  // All must outlive the loop. The tracker starts from `prior`.
  ServingLoop(Engine& engine, Scheduler& scheduler, const ModelConfig& model, StepModel prior, ServerMetrics& metrics,
              ServingConfig config);
  // stop() first, when it runs.
  ~ServingLoop();

  void start();
  // Fails what still runs with `reason` and ends the thread, within a layer. Any thread, once.
  void stop(Status reason);

  // Any thread. kResourceExhausted when the way in is full. What happens next arrives at the stream: accept(), or
  // fail().
  Status submit(Submission submission);
  // What streams call when their door cancels. Any thread.
  void signal() { signals_.fetch_add(1, std::memory_order_release); }

  // Any thread.
  SchedulerStats stats() const MOED_EXCLUDES(stats_mutex_);
  int64_t heartbeat_us() const { return heartbeat_us_.load(std::memory_order_relaxed); }
  // Requests that were submitted and have not ended.
  int64_t num_open() const { return num_open_.load(std::memory_order_acquire); }
  // What measured passes have taught. After stop().
  const StepModel& step_model() const { return tracker_.model(); }

 private:
  struct Choice {
    int64_t first_token_us = 0;
    int64_t last_token_us = 0;
    int64_t num_generated = 0;
    bool ended = false;
  };
  struct Active {
    std::shared_ptr<RequestStream> stream;
    int64_t arrival_us = 0;
    int64_t scheduled_us = 0;
    int64_t first_token_us = 0;
    int64_t num_prompt = 0;
    int64_t max_tokens = 0;
    int32_t open_choices = 0;
    std::vector<Choice> choices;
  };
  using ActiveMap = std::unordered_map<RequestId, Active>;

  void run();
  void step();
  bool begin(PassKind kind);
  StepPlan plan(std::span<const StepSequence> sequences, const StepShape& shape);
  void run_interactive();
  void advance_bulk();
  void end_all();
  bool stopping() const { return stop_.load(std::memory_order_acquire); }
  void commit(PassKind kind);
  void at_boundary();
  void admit(Submission submission);
  void apply_signals();
  void apply_deadline();
  void leave(const std::vector<LiveSequence>& live);
  void cancel(ActiveMap::iterator active, FinishReason reason = FinishReason::kCancelled);
  void give_up(RequestStream& stream, Status status);
  void deliver(TokenEvent event, int64_t now);
  void finish_metrics(const Active& active, FinishReason reason, int64_t now, bool was_waiting = false);
  void end_choice(ActiveMap::iterator active, int32_t choice, FinishReason reason, int64_t now);
  void publish_stats();
  Pass& pass(PassKind kind) { return kind == PassKind::kBulk ? bulk_ : interactive_; }

  Engine& engine_;
  Scheduler& scheduler_;
  const ModelConfig& model_;
  ServerMetrics& metrics_;
  const ServingConfig config_;
  Channel<Submission> channel_;
  std::atomic<uint64_t> signals_{0};
  std::atomic<int64_t> heartbeat_us_{0};
  std::atomic<int64_t> num_open_{0};
  std::atomic<bool> stop_{false};
  Status stop_reason_;  // written before stop_ is set
  mutable Mutex stats_mutex_;
  SchedulerStats stats_ MOED_GUARDED_BY(stats_mutex_);

  // Serving thread only.
  Tracker tracker_;
  std::vector<int64_t> attended_tokens_;  // of the pass being planned
  ActiveMap active_;
  Pass interactive_;
  Pass bulk_;
  std::array<bool, 2> cut_short_{};  // a PassKind: a sequence was dropped from the live pass
  uint64_t signals_seen_ = 0;
  int64_t deadline_checked_us_ = 0;

  std::thread thread_;
};

}  // namespace moed
