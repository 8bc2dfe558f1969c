#include "engine/host_lane.h"

#include "base/check.h"
#include "engine/running_pass.h"

namespace moed {
namespace {

// Between slices copies are fed and routed experts overtake: short against a packet's 0.3 ms.
constexpr double kSliceUs = 200.0;

}  // namespace

HalfAttention::HalfAttention(Device& device)
    : queries_(device.make_event()), attention_(device.make_host_attention()) {}

void HalfAttention::start(const Attention& args, Stream& stream) {
  MOED_CHECK(!begun()) << "attention of a half is begun twice";
  args_ = args;
  stream.record(*queries_);
  state_ = State::kAwaitsQueries;
}

bool HalfAttention::ready() {
  if (state_ == State::kAwaitsQueries && queries_->done()) await();
  return state_ == State::kRuns;
}

void HalfAttention::await() {
  if (state_ != State::kAwaitsQueries) return;
  check_device(queries_->join());
  attention_->begin(args_);
  state_ = attention_->done() ? State::kDone : State::kRuns;
}

void HalfAttention::run_slice() {
  attention_->run(kSliceUs);
  if (attention_->done()) state_ = State::kDone;
}

void HalfAttention::abandon() {
  while (state_ == State::kRuns) run_slice();
  state_ = State::kNone;
}

void HostLane::pump() {
  if (ring_ != nullptr) ring_->pump();
}

void HostLane::run_slice(HalfAttention& attention, RunningPass& pass) {
  const double begin_us = device_.now_us();
  attention.run_slice();
  pass.clock().add_host_attention(begin_us);
}

void HostLane::compute(FunctionRef<void()> ops, FunctionRef<void()> tick) {
  MOED_CHECK(!computes_) << "the host lane computes while it computes";
  computes_ = true;
  device_.on_host_work([&tick] { tick(); });
  ops();
  device_.on_host_work({});
  computes_ = false;
}

bool HostLane::help(RunningPass& pass) {
  if (computes_) return false;
  for (const Half& half : pass.halves()) {
    HalfAttention* attention = pass.attention(half);
    if (attention == nullptr || !attention->ready()) continue;
    run_slice(*attention, pass);
    return true;
  }
  return false;
}

bool HostLane::await_queries(RunningPass& pass) {
  if (computes_) return false;
  for (const Half& half : pass.halves()) {
    HalfAttention* attention = pass.attention(half);
    if (attention == nullptr || !attention->awaits_queries()) continue;
    attention->await();
    return true;
  }
  return false;
}

void HostLane::wait(Event& event, RunningPass& pass) {
  while (!event.done()) {
    pump();
    // With copies to feed the host looks again and again; else it may sleep, but not while there may be attention to
    // compute: queries that are awaited were enqueued before what the event is of.
    if (!help(pass) && ring_ == nullptr && !await_queries(pass)) break;
  }
  check_device(event.join());
}

void HostLane::wait_ring(RunningPass& pass) {
  if (help(pass)) {
    ring_->pump();
    return;
  }
  const double begin_us = device_.now_us();
  ring_->wait();
  pass.clock().add_ring_wait(begin_us);
}

void HostLane::complete(HalfAttention& attention, RunningPass& pass) {
  while (attention.pending()) {
    pump();
    if (attention.ready()) {
      run_slice(attention, pass);
    } else if (!help(pass) && ring_ == nullptr) {
      attention.await();
    }
  }
}

}  // namespace moed
