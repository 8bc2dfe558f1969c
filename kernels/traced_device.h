#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/device.h"

namespace moed {

// What a device's streams and the host lane did and when, by the device's clock. Serving thread only.
class DeviceTrace {
 public:
  explicit DeviceTrace(Device& device) : device_(device), clock_(device.make_stream()) {}

  // Records from here on, up to kSpansMax spans; what was recorded before is forgotten.
  void start();
  void stop() { recording_ = false; }
  // Chrome's trace format (Perfetto and chrome://tracing open it): a thread a lane, lane 0 the host. Waits for what is
  // recorded. Errors: kInvalidArgument naming the file.
  Status write(const std::string& path);

  static constexpr size_t kSpansMax = 500'000;

 private:
  friend class Tracer;
  struct Span {
    const char* name = nullptr;
    int32_t lane = 0;
    int64_t bytes = 0;      // of a copy
    double begin_us = 0.0;  // of the host
    double end_us = 0.0;
    std::unique_ptr<Event> begin;  // of a stream
    std::unique_ptr<Event> end;
  };
  bool records() const { return recording_ && spans_.size() < kSpansMax; }
  Status resolve();

  Device& device_;
  std::unique_ptr<Stream> clock_;
  std::unique_ptr<Event> base_;  // at base_us_
  double base_us_ = 0.0;
  bool recording_ = false;
  int32_t num_lanes_ = 1;
  std::vector<Span> spans_;
};

// A device that does what the inner one does and keeps a trace of it. While it records, an op or a copy comes with two
// more events.
class TracedDevice final : public Device {
 public:
  explicit TracedDevice(std::unique_ptr<Device> inner);
  ~TracedDevice() override;
  DeviceTrace& trace() { return trace_; }

  std::string_view description() const override { return inner_->description(); }
  bool is_host() const override { return inner_->is_host(); }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override { return inner_->allocate(bytes, memory); }
  std::unique_ptr<Stream> make_stream() override;
  std::unique_ptr<Event> make_event() override;
  std::unique_ptr<Event> make_timed_event() override;
  // Few beside those of the trace.
  bool events_are_free() const override { return true; }
  Ops& ops() override { return *ops_; }
  Ops& host_ops() override { return *host_ops_; }
  Stream& host_stream() override { return *host_stream_; }
  void on_host_work(std::function<void()> tick) override { inner_->on_host_work(std::move(tick)); }
  std::unique_ptr<HostAttention> make_host_attention() override;
  int64_t memory_bytes() const override { return inner_->memory_bytes(); }
  bool memory_is_host() const override { return inner_->memory_is_host(); }
  Status pin(std::byte* data, int64_t bytes) override { return inner_->pin(data, bytes); }
  void unpin(std::byte* data) override { inner_->unpin(data); }
  double now_us() const override { return inner_->now_us(); }
  const MachineFile* machine() const override { return inner_->machine(); }
  std::optional<DeviceTotals> totals() const override { return inner_->totals(); }
  void host_access(const void* data, int64_t bytes, Access access) override;
  int num_host_threads() const override { return inner_->num_host_threads(); }
  void run_host(int64_t count, FunctionRef<void(int64_t index, int thread)> fn) override;

 private:
  // Buffers belong to the inner device.
  void release(std::byte*, int64_t, Memory) override {}

  const std::unique_ptr<Device> inner_;
  DeviceTrace trace_;
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<Ops> host_ops_;
  std::unique_ptr<Stream> host_stream_;
};

}  // namespace moed
