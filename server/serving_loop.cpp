#include "server/serving_loop.h"

#include <algorithm>
#include <utility>

#include "base/clock.h"
#include "base/log.h"

namespace moed {
namespace {

constexpr auto kIdleWait = std::chrono::milliseconds(100);
// A waiting request that cannot be admitted yet, with nothing to run: only a cancel or a new request changes that.
constexpr auto kBlockedWait = std::chrono::milliseconds(1);

// Between two looks for requests past their time.
constexpr int64_t kDeadlineCheckUs = 100'000;

double seconds(int64_t us) { return static_cast<double>(us) * 1e-6; }

}  // namespace

ServingLoop::ServingLoop(Engine& engine, Scheduler& scheduler, const ModelConfig& model, StepModel prior,
                         ServerMetrics& metrics, ServingConfig config)
    : engine_(engine),
      scheduler_(scheduler),
      model_(model),
      metrics_(metrics),
      config_(std::move(config)),
      channel_(config_.queue_max),
      tracker_(prior) {
  publish_stats();
}

ServingLoop::~ServingLoop() { MOED_CHECK(!thread_.joinable()) << "stop() comes before the end"; }

void ServingLoop::start() {
  heartbeat_us_ = now_us();
  thread_ = std::thread([this] { run(); });
}

void ServingLoop::stop(Status reason) {
  stop_reason_ = std::move(reason);
  stop_.store(true, std::memory_order_release);
  channel_.close();
  thread_.join();
}

Status ServingLoop::submit(Submission submission) {
  num_open_.fetch_add(1, std::memory_order_acq_rel);
  if (channel_.try_send(submission)) return Status();
  num_open_.fetch_sub(1, std::memory_order_acq_rel);
  if (stop_.load(std::memory_order_acquire)) return Status(StatusCode::kUnavailable, "the server is shutting down");
  return Status(StatusCode::kResourceExhausted,
                "the queue is full: " + std::to_string(config_.queue_max) + " requests (scheduler.queue_max)");
}

SchedulerStats ServingLoop::stats() const {
  MutexLock lock(stats_mutex_);
  return stats_;
}

void ServingLoop::run() {
  while (!stopping()) {
    at_boundary();
    if (scheduler_.idle()) {
      publish_stats();  // a cancel may have emptied it between passes
      if (auto submission = channel_.receive_for(kIdleWait)) admit(std::move(*submission));
      continue;
    }
    step();
    publish_stats();
  }
  end_all();
  publish_stats();
}

// The way in is closed first: what was sent is failed here, and later senders are told at once.
void ServingLoop::end_all() {
  channel_.close();
  while (auto submission = channel_.try_receive()) give_up(*submission->stream, stop_reason_);
  while (!active_.empty()) {
    active_.begin()->second.stream->fail(stop_reason_);
    cancel(active_.begin());
  }
  for (const PassKind kind : {PassKind::kInteractive, PassKind::kBulk}) {
    if (!pass(kind).alive()) continue;
    MOED_CHECK(!engine_.advance(pass(kind))) << "a pass without sequences has layers left";
    commit(kind);
  }
}

// One interactive pass, then some layers of the bulk pass: neither starves the other.
void ServingLoop::step() {
  if (!bulk_.alive()) begin(PassKind::kBulk);
  const bool ran = begin(PassKind::kInteractive);
  if (ran) run_interactive();
  if (stopping()) return;
  if (bulk_.alive()) {
    advance_bulk();
  } else if (!ran) {
    if (auto submission = channel_.receive_for(kBlockedWait)) admit(std::move(*submission));
  }
}

bool ServingLoop::begin(PassKind kind) {
  const auto sequences = scheduler_.schedule(kind, tracker_.model(), now_us());
  if (sequences.empty()) return false;
  for (const BlockCopy& copy : scheduler_.block_copies()) engine_.copy_block(copy.pool, copy.from, copy.to);
  const StepShape shape = scheduler_.shape(kind);
  cut_short_[static_cast<size_t>(kind)] = false;
  pass(kind) = engine_.begin(sequences, plan(sequences, shape));
  metrics_.add_iteration(shape.num_rows);
  return true;
}

StepPlan ServingLoop::plan(std::span<const StepSequence> sequences, const StepShape& shape) {
  attended_tokens_.clear();
  for (const StepSequence& sequence : sequences) {
    StepShape one;
    one.add(sequence.num_cached, sequence.num_new, sequence.sampling != nullptr);
    attended_tokens_.push_back(one.attended_tokens);
  }
  const Planning& planning = config_.planning;
  return planning.policy->plan({.shape = shape,
                                .attended_tokens = attended_tokens_,
                                .config = model_,
                                .residency = planning.residency,
                                .rates = planning.rates,
                                .halves = planning.halves});
}

void ServingLoop::run_interactive() {
  while (engine_.advance(interactive_)) {
    at_boundary();
    if (stopping()) return;
  }
  commit(PassKind::kInteractive);
}

void ServingLoop::advance_bulk() {
  for (int32_t layer = 0; layer < config_.yield_layers; ++layer) {
    const bool more = engine_.advance(bulk_);
    at_boundary();
    if (!more) return commit(PassKind::kBulk);
    if (stopping()) return;
  }
}

void ServingLoop::commit(PassKind kind) {
  const StepShape shape = scheduler_.shape(kind);
  const StepOutput output = engine_.finish(std::exchange(pass(kind), Pass()));
  metrics_.add_times(output.times);
  // A pass that lost sequences on its way took less time than its shape says.
  if (!cut_short_[static_cast<size_t>(kind)]) tracker_.observe(shape, output.times.total_us);
  const int64_t now = now_us();
  for (TokenEvent& event : scheduler_.commit(kind, output)) deliver(std::move(event), now);
}

void ServingLoop::at_boundary() {
  heartbeat_us_.store(now_us(), std::memory_order_relaxed);
  while (auto submission = channel_.try_receive()) admit(std::move(*submission));
  apply_signals();
  apply_deadline();
}

void ServingLoop::admit(Submission submission) {
  const RequestSpec& spec = submission.request.spec();
  Active active;
  active.stream = std::move(submission.stream);
  active.arrival_us = spec.arrival_us;
  active.num_prompt = static_cast<int64_t>(spec.prompt.size());
  active.max_tokens = spec.max_tokens;
  active.open_choices = spec.n;
  active.choices.resize(spec.n);
  const RequestId id = spec.id;
  if (active.stream->cancelled()) return give_up(*active.stream, Status(StatusCode::kCancelled, "cancelled"));
  if (Status status = scheduler_.add(std::move(submission.request)); !status.ok()) {
    active.stream->fail(std::move(status));
    num_open_.fetch_sub(1, std::memory_order_acq_rel);
    return;
  }
  active.stream->accept();
  active_.emplace(id, std::move(active));
}

void ServingLoop::apply_signals() {
  const uint64_t signals = signals_.load(std::memory_order_acquire);
  if (signals == signals_seen_) return;
  signals_seen_ = signals;
  for (auto it = active_.begin(); it != active_.end();) {
    const auto active = it++;
    if (active->second.stream->cancelled()) {
      cancel(active);
      continue;
    }
    const RequestId id = active->first;
    for (const int32_t choice : active->second.stream->take_ended_choices()) {
      if (active->second.choices[choice].ended) continue;
      leave(scheduler_.finish_choice(id, choice));
      end_choice(active, choice, FinishReason::kStop, now_us());
      if (!active_.contains(id)) break;
    }
  }
}

void ServingLoop::apply_deadline() {
  const int64_t now = now_us();
  if (config_.request_seconds <= 0 || now - deadline_checked_us_ < kDeadlineCheckUs) return;
  deadline_checked_us_ = now;
  for (auto it = active_.begin(); it != active_.end();) {
    const auto active = it++;
    if (seconds(now - active->second.arrival_us) < config_.request_seconds) continue;
    std::string limit = std::to_string(config_.request_seconds);
    limit.erase(std::max(limit.find_last_not_of('0'), limit.find('.') + 1) + 1);
    active->second.stream->fail(
        Status(StatusCode::kDeadlineExceeded,
               "the request took longer than this server allows: " + limit + " s (limits.request_seconds)"));
    cancel(active);
  }
}

void ServingLoop::leave(const std::vector<LiveSequence>& live) {
  for (const LiveSequence& sequence : live) {
    engine_.drop(pass(sequence.pass), sequence.id);
    cut_short_[static_cast<size_t>(sequence.pass)] = true;
    scheduler_.dropped(sequence.id);
  }
}

void ServingLoop::cancel(ActiveMap::iterator active, FinishReason reason) {
  const int32_t num_waiting = scheduler_.stats().num_waiting;
  leave(scheduler_.finish(active->first));
  const bool was_waiting = scheduler_.stats().num_waiting < num_waiting;
  finish_metrics(active->second, reason, now_us(), was_waiting);
  num_open_.fetch_sub(1, std::memory_order_acq_rel);
  active_.erase(active);
}

// One that the scheduler never saw.
void ServingLoop::give_up(RequestStream& stream, Status status) {
  stream.fail(std::move(status));
  metrics_.finish_request({.reason = FinishReason::kCancelled});
  num_open_.fetch_sub(1, std::memory_order_acq_rel);
}

void ServingLoop::deliver(TokenEvent event, int64_t now) {
  const auto found = active_.find(event.request);
  if (found == active_.end()) return;
  Active& active = found->second;
  const int32_t choice = event.choice;
  const FinishReason finish = event.finish;
  if (finish == FinishReason::kError) {
    spdlog::error("request {}: its logits hold a NaN or an infinity: broken weights or a broken kernel", found->first);
    active.stream->fail(
        Status(StatusCode::kInternal, "the model gave no probabilities: its logits hold a NaN or an infinity"));
    cancel(found, finish);
    return;
  }
  if (active.scheduled_us == 0) active.scheduled_us = event.scheduled_us;
  if (active.first_token_us == 0) {
    active.first_token_us = now;
    metrics_.add_prompt(active.num_prompt);
    if (event.has_token) metrics_.observe_first_token(seconds(now - active.arrival_us));
  }
  if (event.has_token) {
    Choice& at = active.choices[choice];
    metrics_.add_generated_token();
    if (at.num_generated++ == 0) {
      at.first_token_us = now;
    } else {
      metrics_.observe_inter_token(seconds(now - at.last_token_us));
    }
    at.last_token_us = now;
  }
  if (!active.stream->deliver(std::move(event))) {
    spdlog::warn("request {}: the client reads too slowly, dropped", found->first);
    active.stream->fail(
        Status(StatusCode::kDeadlineExceeded, "the client reads too slowly", /*param=*/"", "client_too_slow"));
    cancel(found);
    return;
  }
  if (finish != FinishReason::kNone) end_choice(found, choice, finish, now);
}

void ServingLoop::finish_metrics(const Active& active, FinishReason reason, int64_t now, bool was_waiting) {
  FinishedRequest request{.reason = reason,
                          .arrival_us = active.arrival_us,
                          .scheduled_us = active.scheduled_us,
                          .first_token_us = active.first_token_us,
                          .end_us = now,
                          .prompt_tokens = active.num_prompt,
                          .max_tokens = active.max_tokens,
                          .was_waiting = was_waiting};
  for (const Choice& choice : active.choices) {
    request.generated_tokens += choice.num_generated;
    request.generated_tokens_max = std::max(request.generated_tokens_max, choice.num_generated);
    request.later_tokens += std::max<int64_t>(choice.num_generated - 1, 0);
    request.later_tokens_us += choice.last_token_us - choice.first_token_us;
  }
  metrics_.finish_request(request);
}

void ServingLoop::end_choice(ActiveMap::iterator found, int32_t choice, FinishReason reason, int64_t now) {
  Active& active = found->second;
  if (active.choices[choice].ended) return;
  active.choices[choice].ended = true;
  if (--active.open_choices > 0) return;
  finish_metrics(active, reason, now);
  num_open_.fetch_sub(1, std::memory_order_acq_rel);
  active_.erase(found);
}

void ServingLoop::publish_stats() {
  const SchedulerStats stats = scheduler_.stats();
  metrics_.set_scheduler(stats);
  metrics_.set_engine(engine_.stats());
  MutexLock lock(stats_mutex_);
  stats_ = stats;
}

}  // namespace moed
