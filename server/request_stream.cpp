#include "server/request_stream.h"

#include <utility>

namespace moed {

void RequestStream::accept() {
  {
    MutexLock lock(mutex_);
    accepted_ = true;
  }
  wake_();
}

bool RequestStream::deliver(TokenEvent event) {
  bool was_empty = false;
  {
    MutexLock lock(mutex_);
    if (events_.size() >= events_max_) return false;
    was_empty = events_.empty();
    events_.push_back(std::move(event));
  }
  if (was_empty) wake_();
  return true;
}

void RequestStream::fail(Status status) {
  {
    MutexLock lock(mutex_);
    failure_ = std::move(status);
  }
  wake_();
}

std::vector<int32_t> RequestStream::take_ended_choices() {
  MutexLock lock(mutex_);
  return std::exchange(ended_choices_, {});
}

RequestStream::News RequestStream::take() {
  MutexLock lock(mutex_);
  return {accepted_, std::exchange(events_, {}), failure_};
}

RequestStream::Standing RequestStream::standing() const {
  MutexLock lock(mutex_);
  return {accepted_, failure_};
}

void RequestStream::cancel() {
  if (!cancelled_.exchange(true)) on_signal_();
}

void RequestStream::end_choice(int32_t choice) {
  {
    MutexLock lock(mutex_);
    ended_choices_.push_back(choice);
  }
  on_signal_();
}

}  // namespace moed
