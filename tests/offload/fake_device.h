#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "base/check.h"
#include "kernels/device.h"
#include "kernels/ops.h"

namespace moed {

// A device whose memory is the host's, whose events take as many looks until they are done as it is told, and which may
// refuse to pin or copy nothing: to see the ring itself. Not for ops.
class FakeDevice final : public Device {
 public:
  struct Options {
    bool copies = true;
    int looks = 0;            // at an event until it is done; join() waits
    int64_t pins_max = 1000;  // calls of pin() that are granted
  };
  FakeDevice(const Options& options, std::unique_ptr<Device> host) : options_(options), host_(std::move(host)) {}
  ~FakeDevice() override { MOED_CHECK(pins_.empty()) << "memory is still pinned"; }

  std::string_view description() const override { return "fake"; }
  bool is_host() const override { return false; }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override {
    pinned_bytes_ += memory == Memory::kPinned ? bytes : 0;
    return Buffer(this, new std::byte[static_cast<size_t>(bytes)]{}, bytes, memory);
  }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<FakeStream>(*this); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<FakeEvent>(options_.looks); }
  Ops& ops() override { return host_->ops(); }
  Ops& host_ops() override { return host_->ops(); }
  Stream& host_stream() override { return host_->host_stream(); }
  std::unique_ptr<HostAttention> make_host_attention() override { return host_->make_host_attention(); }
  Status pin(std::byte* data, int64_t bytes) override {
    if (static_cast<int64_t>(pins_.size()) >= options_.pins_max) {
      return Status(StatusCode::kResourceExhausted, "the limit on locked memory is reached");
    }
    pins_.push_back({data, bytes});
    return {};
  }
  void unpin(std::byte* data) override {
    MOED_CHECK(std::erase_if(pins_, [&](const Pin& pin) { return pin.data == data; }) == 1) << "unpin";
  }

  struct Pin {
    std::byte* data;
    int64_t bytes;
  };
  const std::vector<Pin>& pins() const { return pins_; }
  // That were allocated as pinned memory.
  int64_t pinned_bytes() const { return pinned_bytes_; }
  // Copies whose source is neither pinned nor in the memory that was allocated as pinned.
  int64_t copies_max_bytes() const { return copies_max_bytes_; }

 private:
  class FakeEvent final : public Event {
   public:
    explicit FakeEvent(int looks) : looks_(looks) {}
    bool done() const override { return left_ == 0 || --left_ == 0; }
    Status join() override {
      left_ = 0;
      return {};
    }
    double us_since(const Event&) const override { return 0.0; }
    void record() { left_ = looks_; }

   private:
    const int looks_;
    mutable int left_ = 0;
  };
  class FakeStream final : public Stream {
   public:
    explicit FakeStream(FakeDevice& device) : device_(device) {}
    void copy(void* target, const void* source, int64_t bytes) override {
      device_.copies_max_bytes_ = std::max(device_.copies_max_bytes_, bytes);
      if (device_.options_.copies) std::memcpy(target, source, static_cast<size_t>(bytes));
    }
    void record(Event& event) override { static_cast<FakeEvent&>(event).record(); }
    void wait(const Event&) override {}

   private:
    FakeDevice& device_;
  };
  void release(std::byte* data, int64_t, Memory) override { delete[] data; }

  const Options options_;
  const std::unique_ptr<Device> host_;
  std::vector<Pin> pins_;
  int64_t pinned_bytes_ = 0;
  int64_t copies_max_bytes_ = 0;
};

}  // namespace moed
