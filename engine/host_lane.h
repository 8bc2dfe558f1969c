#pragma once

#include <memory>

#include "base/function_ref.h"
#include "engine/step_clock.h"
#include "kernels/ops.h"
#include "offload/ring.h"

namespace moed {

class RunningPass;

// Attention of one half on the host lane: it waits until the device has written the queries, then runs in slices.
// Serving thread only.
class HalfAttention {
 public:
  explicit HalfAttention(Device& device);
  // What `stream` holds so far writes args.q and the KV that args reads. REQUIRES: !begun().
  void start(const Attention& args, Stream& stream);
  // Started, and not all computed.
  bool pending() const { return state_ == State::kAwaitsQueries || state_ == State::kRuns; }
  // Started, and its output not taken.
  bool begun() const { return state_ != State::kNone; }
  // REQUIRES: begun() and not pending().
  void taken() { state_ = State::kNone; }
  // pending(), and not seen to be ready.
  bool awaits_queries() const { return state_ == State::kAwaitsQueries; }
  // pending(), and a slice would not wait for the device.
  bool ready();
  // Waits for the queries without doing anything else.
  void await();
  // REQUIRES: ready(), or after await().
  void run_slice();
  // Takes back what has not begun, completes what has.
  void abandon();

 private:
  enum class State : uint8_t { kNone, kAwaitsQueries, kRuns, kDone };
  State state_ = State::kNone;
  Attention args_;
  std::unique_ptr<Event> queries_;
  std::unique_ptr<HostAttention> attention_;
};

// What the serving thread does while it waits for the device: packets of the ring, attention of the halves that have
// their queries. Serving thread only.
class HostLane {
 public:
  // ring: null when no expert runs on the device. Both outlive it.
  HostLane(Device& device, ExpertRing* ring) : device_(device), ring_(ring) {}
  void pump();
  // Runs ops of the host lane; `tick` comes between their pieces (Device::on_host_work()), in which the waits below
  // compute nothing.
  void compute(FunctionRef<void()> ops, FunctionRef<void()> tick);
  // Waits for the event.
  void wait(Event& event, RunningPass& pass);
  // Until the ring has got on with a packet or a reader.
  void wait_ring(RunningPass& pass);
  // Runs this half's attention to its end. REQUIRES: attention.pending().
  void complete(HalfAttention& attention, RunningPass& pass);

 private:
  // One slice of some half's attention. False: none is ready, or the host computes something else.
  bool help(RunningPass& pass);
  // Sleeps until some half has its queries. False: none waits for them.
  bool await_queries(RunningPass& pass);
  void run_slice(HalfAttention& attention, RunningPass& pass);

  Device& device_;
  ExpertRing* ring_;
  bool computes_ = false;  // within compute()
};

}  // namespace moed
