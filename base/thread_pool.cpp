#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "base/cgroup.h"
#include "base/check.h"
#include "base/cpu_places.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moed {
namespace {

// About 20 us of spinning: longer than the gap between two ops of a pass, shorter than anything a person would call
// busy waiting.
constexpr int kSpins = 2000;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

struct ThreadPool::State {
  // What one run() works on. Written by the owner before `generation` grows, read by helpers after they see it grow.
  const FunctionRef<void(int64_t, int)>* fn = nullptr;
  int64_t count = 0;
  std::atomic<int64_t> next{0};
  std::atomic<int> busy{0};
  std::atomic<uint64_t> generation{0};
  std::atomic<bool> stop{false};
  std::atomic<int> sleepers{0};
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> helpers;

  void work(int thread) {
    for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;) (*fn)(index, thread);
  }

  uint64_t await_work(uint64_t seen) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (const uint64_t now = generation.load(std::memory_order_acquire); now != seen) return now;
      relax();
    }
    std::unique_lock lock(mutex);
    sleepers.fetch_add(1);
    wake.wait(lock, [&] { return generation.load() != seen; });
    sleepers.fetch_sub(1);
    return generation.load();
  }

  void helper_loop(int thread) {
    uint64_t seen = 0;
    while (true) {
      seen = await_work(seen);
      if (stop.load(std::memory_order_acquire)) return;
      work(thread);
      busy.fetch_sub(1, std::memory_order_release);
    }
  }

  void publish() {
    generation.fetch_add(1);
    if (sleepers.load() > 0) {
      {
        std::lock_guard lock(mutex);
      }
      wake.notify_all();
    }
  }
};

ThreadPool::ThreadPool(int num_threads, bool pin) : state_(std::make_unique<State>()) {
  MOED_CHECK(num_threads >= 1);
  const std::vector<int> cpus = pin ? pinned_cpus(allowed_cpus(), num_threads) : std::vector<int>();
  for (int thread = 1; thread < num_threads; ++thread) {
    state_->helpers.emplace_back([state = state_.get(), thread] { state->helper_loop(thread); });
    if (!cpus.empty()) {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(cpus[thread], &set);
      pthread_setaffinity_np(state_->helpers.back().native_handle(), sizeof(set), &set);
    }
  }
}

ThreadPool::~ThreadPool() {
  state_->stop.store(true, std::memory_order_release);
  state_->publish();
  for (std::thread& helper : state_->helpers) helper.join();
}

int ThreadPool::num_threads() const { return static_cast<int>(state_->helpers.size()) + 1; }

void ThreadPool::run(int64_t count, FunctionRef<void(int64_t, int)> fn) {
  if (count <= 0) return;
  if (count == 1 || state_->helpers.empty()) {
    for (int64_t index = 0; index < count; ++index) fn(index, 0);
    return;
  }
  state_->fn = &fn;
  state_->count = count;
  state_->next.store(0, std::memory_order_relaxed);
  state_->busy.store(static_cast<int>(state_->helpers.size()), std::memory_order_relaxed);
  state_->publish();
  state_->work(0);
  // The others hold at most one index each: a short wait, unless the kernel took their CPU away, so yield after a
  // while.
  for (int spin = 0; state_->busy.load(std::memory_order_acquire) != 0; ++spin) {
    if (spin < kSpins) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

int default_compute_threads() {
  const auto cores = static_cast<double>(one_cpu_per_core(allowed_cpus()).size());
  return std::max(1, static_cast<int>(std::min(cores, std::ceil(cgroup_limits().cpus))));
}

}  // namespace moed
