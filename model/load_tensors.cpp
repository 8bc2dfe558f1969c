#include "model/load_tensors.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

namespace moed {
namespace {

struct Shared {
  std::mutex mutex;
  std::condition_variable changed;
  size_t next = 0;  // under mutex, like all that follows
  int64_t arrived_bytes = 0;
  int running = 0;
  Status status;
};

void read_loads(const TensorSource& source, const std::vector<TensorLoad>& loads, Shared& shared) {
  std::unique_lock lock(shared.mutex);
  while (shared.status.ok() && shared.next < loads.size()) {
    const TensorLoad& load = loads[shared.next++];
    lock.unlock();
    const size_t elements = static_cast<size_t>(load.elements);
    Status status = load.bf16 != nullptr ? source.read(load.name, std::span(load.bf16, elements))
                                         : source.read(load.name, std::span(load.fp32, elements));
    lock.lock();
    shared.arrived_bytes += load.bytes();
    if (shared.status.ok()) shared.status = std::move(status);
  }
  --shared.running;
  shared.changed.notify_one();
}

}  // namespace

Status load_tensors(const TensorSource& source, const std::vector<TensorLoad>& loads,
                    const std::function<void(int64_t)>& progress) {
  constexpr unsigned kThreadsMax = 8;
  constexpr std::chrono::milliseconds kProgressEvery(50);
  Shared shared;
  shared.running = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 2U, kThreadsMax));
  std::vector<std::jthread> readers;
  for (int i = 0, count = shared.running; i < count; ++i)
    readers.emplace_back([&] { read_loads(source, loads, shared); });
  int64_t reported_bytes = 0;
  std::unique_lock lock(shared.mutex);
  while (true) {
    const bool done = shared.changed.wait_for(lock, kProgressEvery, [&] { return shared.running == 0; });
    const int64_t news = shared.arrived_bytes - std::exchange(reported_bytes, shared.arrived_bytes);
    if (news > 0 && progress) {
      lock.unlock();
      progress(news);
      lock.lock();
    }
    if (done) return shared.status;
  }
}

}  // namespace moed
