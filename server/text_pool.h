#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "base/channel.h"
#include "base/status.h"

namespace moed {

// A few threads for what must not run on I/O threads: templates, tokenising, grammars. Bounded in tasks and in the
// bytes of text they hold.
class TextPool {
 public:
  TextPool(int num_threads, size_t queue_max, int64_t bytes_max);
  // Runs what is queued, then joins.
  ~TextPool();
  TextPool(const TextPool&) = delete;
  TextPool& operator=(const TextPool&) = delete;

  // Any thread. kResourceExhausted, the task dropped, when the queue is full or the tasks that wait or run would hold
  // more than bytes_max; a task alone is never too large. `bytes`: what the task holds.
  Status try_post(std::function<void()> task, int64_t bytes);

  // What the tasks that wait or run hold.
  int64_t bytes() const { return bytes_; }

 private:
  // A share of bytes_, given back when it dies.
  class Hold {
   public:
    Hold(std::atomic<int64_t>& total, int64_t bytes) : total_(&total), bytes_(bytes) {}
    ~Hold() {
      if (total_ != nullptr) *total_ -= bytes_;
    }
    Hold(Hold&& other) noexcept : total_(std::exchange(other.total_, nullptr)), bytes_(other.bytes_) {}
    Hold& operator=(Hold&&) = delete;

   private:
    std::atomic<int64_t>* total_;
    int64_t bytes_;
  };
  struct Task {
    Hold hold;  // dies after `run`, which owns the bytes
    std::function<void()> run;
  };

  const int64_t bytes_max_;
  std::atomic<int64_t> bytes_{0};
  Channel<Task> channel_;
  std::vector<std::thread> threads_;
};

}  // namespace moed
