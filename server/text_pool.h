#pragma once

#include <functional>
#include <thread>
#include <vector>

#include "base/channel.h"

namespace moed {

// A few threads for what must not run on I/O threads: templates, tokenising, grammars. Bounded: what does not fit is
// refused by the caller.
class TextPool {
 public:
  TextPool(int num_threads, size_t queue_max);
  // Runs what is queued, then joins.
  ~TextPool();
  TextPool(const TextPool&) = delete;
  TextPool& operator=(const TextPool&) = delete;

  // Any thread. False when the queue is full: the task is dropped.
  bool try_post(std::function<void()> task) { return channel_.try_send(task); }

 private:
  Channel<std::function<void()>> channel_;
  std::vector<std::thread> threads_;
};

}  // namespace moed
