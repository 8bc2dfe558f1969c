#include "kernels/host/host_device.h"

#include <chrono>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "base/huge_pages.h"
#include "base/thread_pool.h"
#include "kernels/host/host_ops.h"
#include "kernels/host/isa.h"

namespace moed {
namespace {

constexpr int kThreadsMax = 1024;

class HostEvent final : public Event {
 public:
  bool done() const override { return true; }
  Status join() override { return {}; }
  double us_since(const Event& earlier) const override {
    const auto gap = at_ - static_cast<const HostEvent&>(earlier).at_;
    return std::chrono::duration<double, std::micro>(gap).count();
  }
  void record() { at_ = std::chrono::steady_clock::now(); }

 private:
  std::chrono::steady_clock::time_point at_;
};

class HostStream final : public Stream {
 public:
  void copy(void* target, const void* source, int64_t bytes) override { std::memcpy(target, source, bytes); }
  void record(Event& event) override { static_cast<HostEvent&>(event).record(); }
  void wait(const Event&) override {}
};

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown processor";
}

class HostDevice final : public Device {
 public:
  HostDevice(const Isa& isa, int num_threads, bool deterministic)
      : description_("cpu: " + cpu_model() + ", " + isa.name + ", " + std::to_string(num_threads) +
                     (num_threads == 1 ? " thread" : " threads")),
        pool_(num_threads),
        ops_(isa.kernels(), pool_, isa.bf16_products && !deterministic) {}

  std::string_view description() const override { return description_; }
  bool is_host() const override { return true; }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override {
    if (bytes < 0) return invalid_argument("cannot allocate " + std::to_string(bytes) + " bytes");
    MOED_ASSIGN_OR_RETURN(HugePages pages, HugePages::allocate(bytes));
    pages.touch();
    std::byte* data = pages.data();
    if (data != nullptr) {
      std::lock_guard lock(mutex_);
      pages_.emplace(data, std::move(pages));
    }
    return Buffer(this, data, bytes, memory);
  }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<HostStream>(); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<HostEvent>(); }
  Ops& ops() override { return ops_; }
  Ops& host_ops() override { return ops_; }
  Stream& host_stream() override { return stream_; }
  void on_host_work(std::function<void()> tick) override { ops_.on_work(std::move(tick)); }
  std::unique_ptr<HostAttention> make_host_attention() override { return ops_.make_sliced_attention(); }
  int num_host_threads() const override { return pool_.num_threads(); }
  void run_host(int64_t count, FunctionRef<void(int64_t index, int thread)> fn) override { pool_.run(count, fn); }

 private:
  void release(std::byte* data, int64_t, Memory) override {
    std::lock_guard lock(mutex_);
    pages_.erase(data);
  }

  const std::string description_;
  ThreadPool pool_;
  HostOps ops_;
  HostStream stream_;
  std::mutex mutex_;
  std::map<std::byte*, HugePages> pages_;  // guarded by mutex_
};

StatusOr<const Isa*> choose_isa(std::string_view name) {
  std::string known;
  const IsaList list = isas();
  for (const Isa* isa = list.data; isa != list.data + list.count; ++isa) {
    if (name.empty() && isa->supported()) return isa;
    if (name == isa->name) {
      if (isa->supported()) return isa;
      return invalid_argument("this CPU cannot run isa \"" + std::string(name) + "\"", "isa");
    }
    known += (known.empty() ? "" : ", ") + std::string(isa->name);
  }
  return invalid_argument("unknown isa \"" + std::string(name) + "\"; this build has: " + known, "isa");
}

}  // namespace

StatusOr<std::unique_ptr<Device>> open_host_device(const DeviceOptions& options) {
  MOED_ASSIGN_OR_RETURN(const Isa* isa, choose_isa(options.isa));
  if (!options.faults.empty()) return invalid_argument("faults are for emulated devices alone", "faults");
  if (options.num_threads < 0 || options.num_threads > kThreadsMax) {
    return invalid_argument("num_threads must be between 0 and " + std::to_string(kThreadsMax) + ", not " +
                                std::to_string(options.num_threads),
                            "num_threads");
  }
  const int num_threads = options.num_threads == 0 ? default_compute_threads() : options.num_threads;
  return std::unique_ptr<Device>(std::make_unique<HostDevice>(*isa, num_threads, options.deterministic));
}

}  // namespace moed
