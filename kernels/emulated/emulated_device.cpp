#include "kernels/emulated/emulated_device.h"

#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/emulated/emulation.h"
#include "kernels/host/host_device.h"

namespace moed {
namespace {

constexpr double kMemoryGibDefault = 4.0;
constexpr double kMemoryGibMax = 65536.0;

class EmulatedEvent final : public Event {
 public:
  EmulatedEvent(Emulation& emulation, bool timed) : emulation_(emulation), timed_(timed) {}

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
    return last.status;
  }
  double us_since(const Event& earlier) const override {
    MOED_CHECK(timed_ && static_cast<const EmulatedEvent&>(earlier).timed_) << "us_since of an event without a time";
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
  const bool timed_;
};

class EmulatedStream final : public Stream {
 public:
  explicit EmulatedStream(Emulation& emulation) : emulation_(emulation), actor_(emulation.add_stream(queue_)) {}
  ~EmulatedStream() override { emulation_.remove_stream(queue_); }

  void enqueue(OpCall call) { emulation_.enqueue(call, actor_, queue_); }
  void copy(void* target, const void* source, int64_t bytes) override {
    emulation_.enqueue_copy(target, source, bytes, actor_, queue_);
  }
  void record(Event& event) override {
    emulation_.checker.begin(actor_, "record");
    auto recording = std::make_shared<Recording>();
    recording->clock = emulation_.checker.clock(actor_);
    static_cast<EmulatedEvent&>(event).recording = recording;
    queue_.push_back(Emulation::RecordItem{std::move(recording)});
  }
  void wait(const Event& event) override {
    const auto& emulated = static_cast<const EmulatedEvent&>(event);
    emulation_.checker.join(actor_, emulated.recorded("wait").clock);
    queue_.push_back(Emulation::WaitItem{emulated.recording});
  }

 private:
  Emulation& emulation_;
  Emulation::Queue queue_;
  const int32_t actor_;
};

// The host lane's: what comes to it is done at once.
class HostLaneStream final : public Stream {
 public:
  explicit HostLaneStream(Emulation& emulation) : emulation_(emulation) {}
  void copy(void* target, const void* source, int64_t bytes) override {
    emulation_.copy_on_host(target, source, bytes);
  }
  void record(Event& event) override {
    emulation_.checker.begin(Emulation::kHost, "record");
    auto recording = std::make_shared<Recording>();
    recording->clock = emulation_.checker.clock(Emulation::kHost);
    recording->at = std::chrono::steady_clock::now();
    recording->done = true;
    static_cast<EmulatedEvent&>(event).recording = std::move(recording);
  }
  // A lane without a queue cannot wait later, and must not wait now.
  void wait(const Event& event) override {
    MOED_CHECK(emulation_.checker.host_has_seen(static_cast<const EmulatedEvent&>(event).recorded("wait").clock))
        << "the host lane waits for an event that the host has not joined";
  }

 private:
  Emulation& emulation_;
};

class EmulatedOps final : public QueuedOps {
 public:
  EmulatedOps(Emulation& emulation, const Stream& host_stream) : emulation_(emulation), host_stream_(host_stream) {}
  Status reserve(const OpLimits& limits) override { return emulation_.reserve(limits); }

 private:
  void enqueue(OpCall call, Stream& stream) override {
    MOED_CHECK(&stream != &host_stream_) << op_name(call) << ": an op of the device on the stream of the host lane";
    static_cast<EmulatedStream&>(stream).enqueue(call);
  }
  Emulation& emulation_;
  const Stream& host_stream_;
};

class HostLaneOps final : public QueuedOps {
 public:
  HostLaneOps(Emulation& emulation, const Stream& host_stream) : emulation_(emulation), host_stream_(host_stream) {}
  Status reserve(const OpLimits& limits) override { return emulation_.reserve(limits); }

 private:
  void enqueue(OpCall call, Stream& stream) override {
    MOED_CHECK(&stream == &host_stream_) << op_name(call) << ": an op of the host lane on a stream of the device";
    emulation_.run_on_host(call);
  }
  Emulation& emulation_;
  const Stream& host_stream_;
};

// Between begin() and the last slice it reads all the time, and writes.
class EmulatedHostAttention final : public HostAttention {
 public:
  explicit EmulatedHostAttention(Emulation& emulation)
      : emulation_(emulation), slices_(emulation.host().make_host_attention()) {}

  void begin(const Attention& args) override {
    call_ = args;
    tables_ = emulation_.touch_on_host(call_);
    slices_->begin(args);
  }
  void run(double slice_us) override {
    for (const TableCopy& table : tables_) table.check();
    slices_->run(slice_us);
    emulation_.touch_on_host(call_);
  }
  bool done() const override { return slices_->done(); }

 private:
  Emulation& emulation_;
  const std::unique_ptr<HostAttention> slices_;
  OpCall call_;
  std::vector<TableCopy> tables_;
};

class EmulatedDevice final : public Device {
 public:
  EmulatedDevice(std::unique_ptr<EmulatedMemory> memory, std::unique_ptr<Device> host, const Faults& faults,
                 uint64_t seed)
      : emulation_(std::move(memory), std::move(host), faults, seed),
        host_stream_(emulation_),
        ops_(emulation_, host_stream_),
        host_ops_(emulation_, host_stream_) {
    char gib[32];
    std::snprintf(gib, sizeof(gib), "%.2f", static_cast<double>(emulation_.memory->capacity_bytes()) / (1 << 30));
    description_ = "emulated: " + std::string(gib) + " GiB, " + std::string(emulation_.host().description());
  }

  std::string_view description() const override { return description_; }
  bool is_host() const override { return false; }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override {
    if (emulation_.faults.hit(Faults::Kind::kMemory)) {
      return Status(StatusCode::kResourceExhausted,
                    "the emulated device was told not to give these " + std::to_string(bytes) + " bytes");
    }
    MOED_ASSIGN_OR_RETURN(std::byte * data, emulation_.memory->allocate(bytes, memory));
    return Buffer(this, data, bytes, memory);
  }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<EmulatedStream>(emulation_); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<EmulatedEvent>(emulation_, /*timed=*/false); }
  std::unique_ptr<Event> make_timed_event() override {
    return std::make_unique<EmulatedEvent>(emulation_, /*timed=*/true);
  }
  Ops& ops() override { return ops_; }
  Ops& host_ops() override { return host_ops_; }
  Stream& host_stream() override { return host_stream_; }
  std::unique_ptr<HostAttention> make_host_attention() override {
    return std::make_unique<EmulatedHostAttention>(emulation_);
  }
  int64_t memory_bytes() const override { return emulation_.memory->capacity_bytes(); }
  bool memory_is_host() const override { return true; }
  Status pin(std::byte* data, int64_t bytes) override {
    emulation_.memory->pin(data, bytes);
    return {};
  }
  void unpin(std::byte* data) override { emulation_.memory->unpin(data); }
  int num_host_threads() const override { return emulation_.host().num_host_threads(); }
  void run_host(int64_t count, FunctionRef<void(int64_t index, int thread)> fn) override {
    emulation_.host().run_host(count, fn);
  }
  void host_access(const void* data, int64_t bytes, Access access) override {
    if (bytes == 0) return;
    emulation_.memory->check_range(data, bytes, "host code", "memory");
    MOED_CHECK(!emulation_.memory->is_device(data)) << "host code touches device memory";
    emulation_.checker.begin(Emulation::kHost, "host code");
    emulation_.checker.access(access, data, bytes, "memory");
  }

 private:
  void release(std::byte* data, int64_t size, Memory) override {
    emulation_.checker.begin(Emulation::kHost, "release");
    emulation_.checker.forget(data, size);
    emulation_.memory->release(data);
  }

  Emulation emulation_;
  HostLaneStream host_stream_;
  EmulatedOps ops_;
  HostLaneOps host_ops_;
  std::string description_;
};

}  // namespace

StatusOr<std::unique_ptr<Device>> open_emulated_device(const DeviceOptions& options) {
  const double gib = options.memory_gib == 0.0 ? kMemoryGibDefault : options.memory_gib;
  if (!(gib > 0.0 && gib <= kMemoryGibMax)) {
    return invalid_argument("the device's memory must be above 0 and at most 65536 GiB, not " + std::to_string(gib),
                            "device_memory_gib");
  }
  MOED_ASSIGN_OR_RETURN(const Faults faults, Faults::parse(options.faults));
  DeviceOptions host_options = options;
  host_options.faults = {};
  MOED_ASSIGN_OR_RETURN(auto host, open_host_device(host_options));
  MOED_ASSIGN_OR_RETURN(auto memory, EmulatedMemory::make(std::llround(gib * (1 << 30))));
  return std::unique_ptr<Device>(
      std::make_unique<EmulatedDevice>(std::move(memory), std::move(host), faults, options.seed));
}

}  // namespace moed
