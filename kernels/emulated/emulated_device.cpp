#include "kernels/emulated/emulated_device.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/check.h"
#include "kernels/emulated/emulated_memory.h"
#include "kernels/emulated/race_checker.h"
#include "kernels/host/host_device.h"
#include "kernels/op_ranges.h"

namespace moed {
namespace {

constexpr int32_t kHost = 0;
constexpr double kMemoryGibDefault = 4.0;
constexpr double kMemoryGibMax = 65536.0;

// What an event stands for since it was last recorded.
struct Recording {
  bool done = false;
  VectorClock clock;
  std::chrono::steady_clock::time_point at;
};

// A row table as it was when its op was enqueued.
struct TableCopy {
  const std::byte* data = nullptr;
  std::vector<std::byte> bytes;
  int32_t actor = 0;
  uint64_t time = 0;
  const char* op = nullptr;
  const char* name = nullptr;

  void check() const {
    MOED_CHECK(std::memcmp(data, bytes.data(), bytes.size()) == 0)
        << op << ": its table of " << name << " was changed before the host had waited for the op on stream " << actor;
  }
};

struct OpItem {
  OpCall call;
  std::vector<TableCopy> tables;
};
struct CopyItem {
  void* target;
  const void* source;
  int64_t bytes;
};
struct RecordItem {
  std::shared_ptr<Recording> recording;
};
struct WaitItem {
  std::shared_ptr<Recording> recording;
};
using Item = std::variant<OpItem, CopyItem, RecordItem, WaitItem>;
using Queue = std::deque<Item>;

// Checks what a call touches and copies its tables.
class EnqueueVisitor : public RangeVisitor {
 public:
  EnqueueVisitor(const EmulatedMemory& memory, RaceChecker& checker, const TableCopy& about)
      : memory_(memory), checker_(checker), about_(about) {}

  void range(const char* name, Access access, const void*& base, Runs runs) override {
    runs([&](int64_t offset, int64_t bytes) {
      const std::byte* data = base == nullptr ? nullptr : static_cast<const std::byte*>(base) + offset;
      memory_.check_range(data, bytes, about_.op, name);
      checker_.access(access, data, bytes, name);
    });
  }

  void table(const char* name, const void*& data, int64_t bytes) override {
    if (bytes == 0) return;
    MOED_CHECK(memory_.is_mapped(data, bytes)) << about_.op << ": its table of " << name << " is not in mapped memory";
    checker_.access(Access::kRead, data, bytes, name);
    const auto* begin = static_cast<const std::byte*>(data);
    TableCopy& copy = tables.emplace_back(about_);
    copy.data = begin;
    copy.bytes.assign(begin, begin + bytes);
    copy.name = name;
  }

  std::vector<TableCopy> tables;

 private:
  const EmulatedMemory& memory_;
  RaceChecker& checker_;
  const TableCopy about_;
};

// Puts the addresses that kernels see in place of the engine's.
class TranslateVisitor : public RangeVisitor {
 public:
  explicit TranslateVisitor(const EmulatedMemory& memory) : memory_(memory) {}
  void range(const char*, Access, const void*& base, Runs) override { base = memory_.translate(base); }
  void table(const char*, const void*&, int64_t) override {}

 private:
  const EmulatedMemory& memory_;
};

// The queues of all streams, and what runs them.
class Emulation {
 public:
  Emulation(std::unique_ptr<EmulatedMemory> device_memory, std::unique_ptr<Device> host, uint64_t seed)
      : memory(std::move(device_memory)),
        checker(*memory),
        host_(std::move(host)),
        host_stream_(host_->make_stream()),
        random_(seed) {}

  int32_t add_stream(Queue& queue) {
    queues_.push_back(&queue);
    return checker.add_stream();
  }
  // Runs what the stream still holds.
  void remove_stream(Queue& queue) {
    while (!queue.empty()) step();
    std::erase(queues_, &queue);
  }

  void enqueue(OpCall call, int32_t actor, Queue& queue) {
    TableCopy about;
    about.op = op_name(call);
    about.actor = actor;
    about.time = checker.begin(actor, about.op);
    EnqueueVisitor visitor(*memory, checker, about);
    visit_ranges(call, visitor);
    queue.push_back(OpItem{std::move(call), std::move(visitor.tables)});
  }

  void enqueue(const CopyItem& copy, int32_t actor, Queue& queue) {
    if (copy.bytes == 0) return;
    checker.begin(actor, "copy");
    memory->check_range(copy.source, copy.bytes, "copy", "source");
    memory->check_range(copy.target, copy.bytes, "copy", "target");
    checker.access(Access::kRead, copy.source, copy.bytes, "source");
    checker.access(Access::kWrite, copy.target, copy.bytes, "target");
    queue.push_back(copy);
  }

  // One step of a stream that can make one. False: none can.
  bool try_step() {
    std::vector<Queue*>& ready = ready_;
    ready.clear();
    for (Queue* queue : queues_) {
      if (queue->empty()) continue;
      const auto* wait = std::get_if<WaitItem>(&queue->front());
      if (wait == nullptr || wait->recording->done) ready.push_back(queue);
    }
    if (ready.empty()) return false;
    Queue& queue = *ready[random_() % ready.size()];
    Item item = std::move(queue.front());
    queue.pop_front();
    std::visit([&](auto& one) { run(one); }, item);
    return true;
  }
  void step() { MOED_CHECK(try_step()) << "the emulated device waits for what no stream will do"; }

  // The host has waited for all that came before the recording.
  void joined(const Recording& recording) {
    checker.join(kHost, recording.clock);
    std::erase_if(tables_, [&](const TableCopy& table) {
      if (!checker.host_has_seen(table.actor, table.time)) return false;
      table.check();
      return true;
    });
  }

  Device& host() const { return *host_; }

  const std::unique_ptr<EmulatedMemory> memory;
  RaceChecker checker;

 private:
  void run(OpItem& item) {
    for (TableCopy& table : item.tables) {
      table.check();
      tables_.push_back(std::move(table));
    }
    TranslateVisitor visitor(*memory);
    visit_ranges(item.call, visitor);
    run_op(item.call, host_->ops(), *host_stream_);
  }
  void run(const CopyItem& item) {
    std::memcpy(memory->translate(item.target), memory->translate(item.source), item.bytes);
  }
  void run(RecordItem& item) {
    item.recording->at = std::chrono::steady_clock::now();
    item.recording->done = true;
  }
  void run(const WaitItem&) {}

  const std::unique_ptr<Device> host_;
  const std::unique_ptr<Stream> host_stream_;
  std::mt19937_64 random_;
  std::vector<Queue*> queues_;
  std::vector<Queue*> ready_;
  std::vector<TableCopy> tables_;  // of ops that have run and for which the host has not waited
};

class EmulatedEvent final : public Event {
 public:
  explicit EmulatedEvent(Emulation& emulation) : emulation_(emulation) {}

  bool done() const override {
    const Recording& last = recorded("done");
    if (!last.done) emulation_.step();
    if (last.done) emulation_.joined(last);
    return last.done;
  }
  Status join() override {
    const Recording& last = recorded("join");
    while (!last.done) emulation_.step();
    emulation_.joined(last);
    return {};
  }
  double us_since(const Event& earlier) const override {
    const Recording& begin = static_cast<const EmulatedEvent&>(earlier).recorded("us_since");
    const Recording& end = recorded("us_since");
    MOED_CHECK(begin.done && end.done) << "us_since of an event that is not done";
    return std::chrono::duration<double, std::micro>(end.at - begin.at).count();
  }

  std::shared_ptr<Recording> recording;  // null: never recorded
  const Recording& recorded(const char* what) const {
    MOED_CHECK(recording != nullptr) << what << ": the event was never recorded";
    return *recording;
  }

 private:
  Emulation& emulation_;
};

class EmulatedStream final : public Stream {
 public:
  explicit EmulatedStream(Emulation& emulation) : emulation_(emulation), actor_(emulation.add_stream(queue_)) {}
  ~EmulatedStream() override { emulation_.remove_stream(queue_); }

  void enqueue(OpCall call) { emulation_.enqueue(std::move(call), actor_, queue_); }
  void copy(void* target, const void* source, int64_t bytes) override {
    emulation_.enqueue({target, source, bytes}, actor_, queue_);
  }
  void record(Event& event) override {
    emulation_.checker.begin(actor_, "record");
    auto recording = std::make_shared<Recording>();
    recording->clock = emulation_.checker.clock(actor_);
    static_cast<EmulatedEvent&>(event).recording = recording;
    queue_.push_back(RecordItem{std::move(recording)});
  }
  void wait(const Event& event) override {
    const auto& emulated = static_cast<const EmulatedEvent&>(event);
    emulation_.checker.join(actor_, emulated.recorded("wait").clock);
    queue_.push_back(WaitItem{emulated.recording});
  }

 private:
  Emulation& emulation_;
  Queue queue_;
  const int32_t actor_;
};

class EmulatedOps final : public QueuedOps {
 public:
  explicit EmulatedOps(Emulation& emulation) : emulation_(emulation) {}
  Status reserve(const OpLimits& limits) override { return emulation_.host().ops().reserve(limits); }

 private:
  void enqueue(OpCall call, Stream& stream) override { static_cast<EmulatedStream&>(stream).enqueue(std::move(call)); }
  Emulation& emulation_;
};

class EmulatedDevice final : public Device {
 public:
  EmulatedDevice(std::unique_ptr<EmulatedMemory> memory, std::unique_ptr<Device> host, uint64_t seed)
      : emulation_(std::move(memory), std::move(host), seed), ops_(emulation_) {
    char gib[32];
    std::snprintf(gib, sizeof(gib), "%.2f", static_cast<double>(emulation_.memory->capacity_bytes()) / (1 << 30));
    description_ = "emulated: " + std::string(gib) + " GiB, " + std::string(emulation_.host().description());
  }

  std::string_view description() const override { return description_; }
  bool is_host() const override { return false; }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override {
    MOED_ASSIGN_OR_RETURN(std::byte * data, emulation_.memory->allocate(bytes, memory));
    return Buffer(this, data, bytes, memory);
  }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<EmulatedStream>(emulation_); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<EmulatedEvent>(emulation_); }
  Ops& ops() override { return ops_; }
  int num_host_threads() const override { return emulation_.host().num_host_threads(); }
  void run_host(int64_t count, FunctionRef<void(int64_t index, int thread)> fn) override {
    emulation_.host().run_host(count, fn);
  }
  void host_access(const void* data, int64_t bytes, Access access) override {
    if (bytes == 0) return;
    emulation_.memory->check_range(data, bytes, "host code", "memory");
    MOED_CHECK(!emulation_.memory->is_device(data)) << "host code touches device memory";
    emulation_.checker.begin(kHost, "host code");
    emulation_.checker.access(access, data, bytes, "memory");
  }

 private:
  void release(std::byte* data, int64_t size, Memory) override {
    emulation_.checker.begin(kHost, "release");
    emulation_.checker.forget(data, size);
    emulation_.memory->release(data);
  }

  Emulation emulation_;
  EmulatedOps ops_;
  std::string description_;
};

}  // namespace

StatusOr<std::unique_ptr<Device>> open_emulated_device(const DeviceOptions& options) {
  const double gib = options.memory_gib == 0.0 ? kMemoryGibDefault : options.memory_gib;
  if (!(gib > 0.0 && gib <= kMemoryGibMax)) {
    return invalid_argument("the device's memory must be above 0 and at most 65536 GiB, not " + std::to_string(gib),
                            "device_memory_gib");
  }
  MOED_ASSIGN_OR_RETURN(auto host, open_host_device(options));
  MOED_ASSIGN_OR_RETURN(auto memory, EmulatedMemory::make(std::llround(gib * (1 << 30))));
  return std::unique_ptr<Device>(std::make_unique<EmulatedDevice>(std::move(memory), std::move(host), options.seed));
}

}  // namespace moed
