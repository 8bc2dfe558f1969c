#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>

#include "base/function_ref.h"
#include "base/status.h"

namespace moed {

class Device;
class HostAttention;
struct MachineFile;
class Ops;

// Where a buffer lies. kDevice: the device's own memory. kPinned: host memory that DMA reads and writes. kMapped: host
// memory that kernels read and write in place (small things: row tables, flags, activations that cross). The host
// device knows no difference.
enum class Memory : uint8_t { kDevice, kPinned, kMapped };

// What is done with a piece of memory. kUpdate: read, then written.
enum class Access : uint8_t { kRead, kWrite, kUpdate };

// Owns memory of a device. Move-only; must die before its device.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Device* device, std::byte* data, int64_t size, Memory memory)
      : device_(device), data_(data), size_(size), memory_(memory) {}
  ~Buffer();
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }

  // An address that ops and copies take; the host may dereference it unless the memory is kDevice of another device
  // than the host.
  std::byte* data() const { return data_; }
  int64_t size() const { return size_; }
  Memory memory() const { return memory_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(memory_, other.memory_);
  }
  Device* device_ = nullptr;
  std::byte* data_ = nullptr;
  int64_t size_ = 0;
  Memory memory_ = Memory::kDevice;
};

// A point in a stream. Serving thread only.
class Event {
 public:
  virtual ~Event() = default;
  virtual bool done() const = 0;
  // Blocks until done. A copy or launch that failed before it surfaces here.
  virtual Status join() = 0;
  // REQUIRES: both made by make_timed_event(), recorded and done.
  virtual double us_since(const Event& earlier) const = 0;
};

// Work in order. Serving thread only. Enqueueing does not wait; errors surface at Event::join().
class Stream {
 public:
  virtual ~Stream() = default;
  // From and to memory of any kind; slower where the host's is neither pinned nor mapped.
  virtual void copy(void* target, const void* source, int64_t bytes) = 0;
  virtual void record(Event& event) = 0;
  // Later work waits for the event. REQUIRES: event recorded.
  virtual void wait(const Event& event) = 0;
};

// What the parts of a device did since it was opened: the time that each was busy, and bytes.
struct DeviceTotals {
  double kernels_us = 0.0;
  double up_us = 0.0;    // copies to the device
  double down_us = 0.0;  // and back
  double host_us = 0.0;  // ops of the host lane
  int64_t device_bytes = 0;
  int64_t up_bytes = 0;  // over the link, by copies and kernels
  int64_t down_bytes = 0;
  int64_t host_bytes = 0;  // of host DRAM, by the host lane
};

// A place that computes: its memory, its streams, its kernels. Serving thread only, but for allocate(), which belongs
// to start-up.
class Device {
 public:
  virtual ~Device() = default;
  // "cpu: AMD EPYC 9R14, avx512_bf16, 2 threads": for the log and /info.
  virtual std::string_view description() const = 0;
  // True when host code may read device memory and ops run on the calling thread.
  virtual bool is_host() const = 0;
  // Zeroed, 64-byte aligned. Errors: kResourceExhausted with the bytes asked for.
  virtual StatusOr<Buffer> allocate(int64_t bytes, Memory memory) = 0;
  virtual std::unique_ptr<Stream> make_stream() = 0;
  virtual std::unique_ptr<Event> make_event() = 0;
  // One with a time, which costs a device more to record; nothing else differs.
  virtual std::unique_ptr<Event> make_timed_event() { return make_event(); }
  // Whether to record one costs next to nothing.
  virtual bool events_are_free() const { return is_host(); }
  virtual Ops& ops() = 0;
  // The host lane: ops on the compute threads of the host, over host and mapped memory. They have run when they return,
  // and come after all that the host has joined; `stream` must be host_stream(), whose events are of the host lane. On
  // the host device these are ops() and a stream like any other.
  virtual Ops& host_ops() = 0;
  virtual Stream& host_stream() = 0;
  // From now on the serving thread calls `tick` about every 100 us (of now_us(), between pieces of work) while an op of
  // the host lane computes, so that streams are fed meanwhile; empty: no more. tick may do all that the serving thread
  // may but compute: no op of the host lane, no slice of attention, no run_host(). A device whose work is done when
  // somebody asks for it never calls it.
  virtual void on_host_work(std::function<void()> /*tick*/) {}  // NOLINT(performance-unnecessary-value-param)
  // Attention of the host lane in slices.
  virtual std::unique_ptr<HostAttention> make_host_attention() = 0;
  // What allocate(kDevice) may give out in all, the device's cap (DeviceOptions::memory_gib) considered; 0: the device
  // has no memory of its own.
  virtual int64_t memory_bytes() const { return 0; }
  // Whether that is taken out of the host's memory, so that both must fit there.
  virtual bool memory_is_host() const { return false; }
  // Makes host memory fit for copies at full speed and for reads and writes by kernels, until unpin() of the same
  // address. Costs about 0.1 s/GB. Errors: kResourceExhausted where the system refuses: copies of it go through pinned
  // memory then (CopyQueue). Start-up; any thread.
  virtual Status pin(std::byte* /*data*/, int64_t /*bytes*/) { return Status(); }
  virtual void unpin(std::byte* /*data*/) {}
  // Microseconds on the clock that the device's work is measured by: the steady clock, or a simulated one.
  virtual double now_us() const;
  // The machine that is simulated; null: this one is real.
  virtual const MachineFile* machine() const { return nullptr; }
  // Empty where it does not count.
  virtual std::optional<DeviceTotals> totals() const { return std::nullopt; }
  // Host code is about to read or write memory that the device's work touches too: a device that looks for races
  // checks it, others do nothing.
  virtual void host_access(const void*, int64_t /*bytes*/, Access) {}
  // Host code on the device's compute threads of the host, the calling one among them: fn(index, thread) for each index
  // in [0, count), thread in [0, num_host_threads()). Returns when all are done; fn may neither enqueue ops nor call
  // it.
  virtual int num_host_threads() const { return 1; }
  virtual void run_host(int64_t count, FunctionRef<void(int64_t index, int thread)> fn) {
    for (int64_t index = 0; index < count; ++index) fn(index, 0);
  }

 private:
  friend class Buffer;
  virtual void release(std::byte* data, int64_t size, Memory memory) = 0;
};

inline Buffer::~Buffer() {
  if (data_ != nullptr) device_->release(data_, size_, memory_);
}

struct DeviceOptions {
  int num_threads = 0;         // compute threads of the host, the serving thread counted; 0: default_compute_threads()
  bool deterministic = false;  // one kernel family with one K order for every number of rows
  std::string_view isa;        // "": the best the CPU has; else "avx512_bf16", "avx512", "avx2" or "portable"
  double memory_gib = 0.0;     // cap on the device's own memory; 0: none. The host device has none of its own
  uint64_t seed = 0;           // of what an emulated device leaves to chance
  std::string_view router;     // what a simulated device's router answers: "zipf:1.0" (RouterSource); "": uniform
  std::string_view faults;     // for tests: what goes wrong on an emulated device, "copy:17,memory:5" (Faults)
};

// spec: "auto", "cpu", "emulated", "emulated:FILE", "simulated:FILE", "cuda" or "cuda:N", as far as this build has
// them; FILE describes a machine (deploy/machines). Errors: kInvalidArgument listing the devices of this build, or
// naming file and field.
StatusOr<std::unique_ptr<Device>> open_device(std::string_view spec, const DeviceOptions& options);

}  // namespace moed
