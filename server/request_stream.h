#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/status.h"
#include "base/thread_annotations.h"
#include "scheduler/scheduler.h"

namespace moed {

// What one request's two sides share: the serving thread puts events in, the door takes them out and says when it has
// enough. Neither ever waits for the other. A door that stops reading fills only this; past events_max the request is
// cancelled.
class RequestStream {
 public:
  // wake: called by the serving thread, outside the lock, when news comes after the door has taken everything.
  // on_signal: called by the door's thread when cancel() or end_choice() was first called: tells the serving thread to
  // look.
  RequestStream(size_t events_max, std::function<void()> wake, std::function<void()> on_signal)
      : events_max_(events_max), wake_(std::move(wake)), on_signal_(std::move(on_signal)) {}

  // Serving thread. The scheduler has taken the request.
  void accept() MOED_EXCLUDES(mutex_);
  // Serving thread. False when the door has fallen too far behind: the event is lost, the request must be cancelled.
  bool deliver(TokenEvent event) MOED_EXCLUDES(mutex_);
  // Serving thread. No event follows; what was delivered before can still be taken.
  void fail(Status status) MOED_EXCLUDES(mutex_);
  bool cancelled() const { return cancelled_.load(std::memory_order_acquire); }
  // Choices that the door has ended since the last call.
  std::vector<int32_t> take_ended_choices() MOED_EXCLUDES(mutex_);

  // Door. Events since the last call, oldest first; `failure` stays set after fail().
  struct News {
    bool accepted = false;
    std::vector<TokenEvent> events;
    Status failure;
  };
  News take() MOED_EXCLUDES(mutex_);
  // Door. Leaves the events where they are.
  struct Standing {
    bool accepted = false;
    Status failure;
  };
  Standing standing() const MOED_EXCLUDES(mutex_);
  void cancel();
  void end_choice(int32_t choice) MOED_EXCLUDES(mutex_);

 private:
  const size_t events_max_;
  const std::function<void()> wake_;
  const std::function<void()> on_signal_;
  std::atomic<bool> cancelled_{false};
  mutable Mutex mutex_;
  std::vector<TokenEvent> events_ MOED_GUARDED_BY(mutex_);
  std::vector<int32_t> ended_choices_ MOED_GUARDED_BY(mutex_);
  bool accepted_ MOED_GUARDED_BY(mutex_) = false;
  Status failure_ MOED_GUARDED_BY(mutex_);
};

}  // namespace moed
