#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>

#include "base/thread_annotations.h"

namespace moed {

// A bounded queue between threads: the only way by which work crosses them. Any number of senders and receivers.
template <class T>
class Channel {
 public:
  explicit Channel(size_t capacity) : capacity_(capacity) {}

  // False, and `item` untouched, when the channel is full or closed: the sender refuses the work at once.
  bool try_send(T& item) MOED_EXCLUDES(mutex_) {
    {
      MutexLock lock(mutex_);
      if (closed_ || items_.size() >= capacity_) return false;
      items_.push_back(std::move(item));
    }
    ready_.notify_one();
    return true;
  }

  // Empty when nothing waits.
  std::optional<T> try_receive() MOED_EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    return pop();
  }

  // Waits until something comes or the channel is closed and empty (then empty).
  std::optional<T> receive() MOED_EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    while (items_.empty() && !closed_) ready_.wait(lock);
    return pop();
  }

  // Waits until something comes, the channel is closed (then empty) or `timeout` has passed (then empty).
  std::optional<T> receive_for(std::chrono::microseconds timeout) MOED_EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    while (items_.empty() && !closed_) {
      if (ready_.wait_until(lock, deadline) == std::cv_status::timeout) break;
    }
    return pop();
  }

  // Later sends fail; what is queued can still be received.
  void close() MOED_EXCLUDES(mutex_) {
    {
      MutexLock lock(mutex_);
      closed_ = true;
    }
    ready_.notify_all();
  }

  size_t size() const MOED_EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    return items_.size();
  }

 private:
  std::optional<T> pop() MOED_REQUIRES(mutex_) {
    if (items_.empty()) return std::nullopt;
    std::optional<T> item(std::move(items_.front()));
    items_.pop_front();
    return item;
  }

  const size_t capacity_;
  mutable Mutex mutex_;
  std::condition_variable_any ready_;
  std::deque<T> items_ MOED_GUARDED_BY(mutex_);
  bool closed_ MOED_GUARDED_BY(mutex_) = false;
};

}  // namespace moed
