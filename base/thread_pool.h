#pragma once

#include <cstdint>
#include <memory>

#include "base/function_ref.h"

namespace moed {

// Fork-join over a fixed set of pinned threads. The thread that calls run() is the first of them. Between calls the
// others spin briefly, then sleep. Only one thread (the owner, normally the serving thread) may call run(), and fn may
// not call it again. Never allocates after construction.
class ThreadPool {
 public:
  // num_threads counts the caller of run(): 1 makes no thread at all. pin: when there are as many threads as cores,
  // bind each helper to a core of its own (pinned_cpus()); the caller stays free, and finds the one core left.
  explicit ThreadPool(int num_threads, bool pin = true);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Calls fn(index, thread) once for each index in [0, count), thread in [0, num_threads()), indices handed out in
  // ascending order to whoever is free; returns when all are done. fn must not throw.
  void run(int64_t count, FunctionRef<void(int64_t index, int thread)> fn);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Threads this process should compute with: min(affinity mask, cgroup cpu.max rounded up, physical cores), at least 1.
int default_compute_threads();

}  // namespace moed
