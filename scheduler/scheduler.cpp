#include "scheduler/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "scheduler/state.h"

namespace moed {

Scheduler::Scheduler(const SchedulerConfig& config) : state_(std::make_unique<State>(config)) {}

Scheduler::~Scheduler() = default;

Status Scheduler::add(Request request) {
  MOED_CHECK(!state_->requests.contains(request.spec().id)) << "request " << request.spec().id << " is known already";
  MOED_RETURN_IF_ERROR(state_->check_fits(request.spec()));
  state_->enqueue(std::move(request).release());
  return Status();
}

std::vector<LiveSequence> Scheduler::finish(RequestId request) {
  std::vector<LiveSequence> live;
  const auto found = state_->requests.find(request);
  if (found == state_->requests.end()) return live;
  // From the back, so that no follower is made leader on the way. The request is gone with its last choice.
  for (int32_t choice = found->second->spec.n - 1; choice >= 0; --choice) {
    std::ranges::move(finish_choice(request, choice), std::back_inserter(live));
  }
  return live;
}

std::vector<LiveSequence> Scheduler::finish_choice(RequestId request, int32_t choice) {
  std::vector<LiveSequence> live;
  const auto found = state_->requests.find(request);
  if (found == state_->requests.end()) return live;
  const auto& sequences = found->second->sequences;
  if (choice < 0 || choice >= static_cast<int32_t>(sequences.size())) return live;
  Sequence& sequence = *sequences[choice];
  if (sequence.phase == Phase::kEnded) return live;
  if (sequence.pass) live.push_back({.id = sequence.id, .pass = *sequence.pass});
  state_->end(sequence);
  state_->erase_if_gone(*found->second);
  return live;
}

void Scheduler::dropped(SequenceId id) {
  const auto found = state_->leaving.find(id);
  if (found != state_->leaving.end()) state_->leave(*found->second);
}

std::span<const StepSequence> Scheduler::schedule(PassKind kind, const StepModel& model, int64_t now_us) {
  LivePass& pass = state_->pass(kind);
  MOED_CHECK(!pass.live) << "a pass of that kind is live";
  pass.steps.clear();
  pass.sequences.clear();
  pass.shape = {};
  state_->now_us = now_us;
  state_->pass_copies.clear();
  state_->admit();
  pass.live = kind == PassKind::kInteractive ? state_->fill_interactive() : state_->fill_bulk(model);
  if (pass.live) std::swap(state_->copies, state_->pass_copies);
  return pass.steps;
}

std::span<const BlockCopy> Scheduler::block_copies() const { return state_->pass_copies; }

StepShape Scheduler::shape(PassKind kind) const { return state_->pass(kind).shape; }

std::span<TokenEvent> Scheduler::commit(PassKind kind, const StepOutput& output) {
  LivePass& pass = state_->pass(kind);
  MOED_CHECK(pass.live) << "no pass of that kind is live";
  state_->num_events = 0;
  auto answer = output.sequences.begin();
  for (size_t i = 0; i < pass.sequences.size(); ++i) {
    state_->prefetch_step(pass, i);
    Sequence* sequence = pass.sequences[i];
    const bool answered = answer != output.sequences.end() && answer->id == pass.steps[i].id;
    if (sequence != nullptr && sequence->phase != Phase::kEnded) {
      MOED_CHECK(answered) << "the engine lost sequence " << sequence->id;
      pass.sequences[i] = nullptr;
      state_->commit_step(pass.steps[i], *sequence, *answer);
    } else if (sequence != nullptr) {
      state_->leave(*sequence);
    }
    if (answered) ++answer;
  }
  MOED_CHECK(answer == output.sequences.end())
      << "the engine answered for sequence " << answer->id << ", which has no row";
  pass.live = false;
  return std::span(state_->events).first(state_->num_events);
}

bool Scheduler::idle() const {
  return state_->requests.empty() &&
         std::ranges::none_of(state_->passes, [](const LivePass& pass) { return pass.live; });
}

SchedulerStats Scheduler::stats() const {
  const auto pool_stats = [](const BlockPool& pool) {
    return PoolStats{.blocks_used = pool.allocator.num_used(), .blocks_total = pool.allocator.num_blocks()};
  };
  return {.num_running = static_cast<int32_t>(state_->running.size()),
          .num_waiting = state_->num_waiting_requests,
          .pools = {pool_stats(state_->pools[0]), pool_stats(state_->pools[1])},
          .num_preemptions = state_->num_preemptions,
          .prefix_queries_tokens = state_->prefix_queries_tokens,
          .prefix_hits_tokens = state_->prefix_hits_tokens};
}

void Scheduler::check_invariants() const { state_->check_invariants(); }

}  // namespace moed
