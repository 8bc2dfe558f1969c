#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"

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

std::vector<int> affinity_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
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
  const std::vector<int> cpus = affinity_cpus();
  for (int thread = 1; thread < num_threads; ++thread) {
    state_->helpers.emplace_back([state = state_.get(), thread] { state->helper_loop(thread); });
    if (pin && num_threads <= static_cast<int>(cpus.size())) {
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

namespace {

// cgroup v2's cpu.max ("quota period" or "max period"), as a number of CPUs; infinity when there is no limit.
double cgroup_cpus() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return INFINITY;
  return std::strtod(quota.c_str(), nullptr) / period;
}

int physical_cores(const std::vector<int>& cpus) {
  std::set<std::pair<int, int>> cores;
  for (const int cpu : cpus) {
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    int package = 0;
    int core = cpu;
    std::ifstream(topology + "physical_package_id") >> package;
    std::ifstream(topology + "core_id") >> core;
    cores.emplace(package, core);
  }
  return static_cast<int>(cores.size());
}

}  // namespace

int default_compute_threads() {
  const int cores = physical_cores(affinity_cpus());
  return std::max(1, static_cast<int>(std::min<double>(cores, std::ceil(cgroup_cpus()))));
}

}  // namespace moed
