#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
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
    auto* data = new std::byte[static_cast<size_t>(bytes)]{};
    (memory == Memory::kDevice ? device_memory_ : pinned_).push_back({data, bytes});
    if (memory == Memory::kPinned && packet_max_bytes_ == 0) bounce_bytes_ += bytes;
    return Buffer(this, data, bytes, memory);
  }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<FakeStream>(*this); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<FakeEvent>(*this); }
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
    MOED_CHECK(std::erase_if(pins_, [&](const Piece& piece) { return piece.data == data; }) == 1) << "unpin";
  }

  struct Piece {
    std::byte* data;
    int64_t bytes;
  };
  const std::vector<Piece>& pins() const { return pins_; }
  // Allocated as pinned memory before the first copy.
  int64_t bounce_bytes() const { return bounce_bytes_; }
  // Of copies to the device's memory: the largest, and the most in flight at once.
  int64_t packet_max_bytes() const { return packet_max_bytes_; }
  int packets_max() const { return packets_max_; }

 private:
  class FakeEvent final : public Event {
   public:
    explicit FakeEvent(FakeDevice& device) : device_(device) {}
    bool done() const override {
      if (left_ > 0 && --left_ == 0) end();
      return left_ == 0;
    }
    Status join() override {
      if (std::exchange(left_, 0) > 0) end();
      return {};
    }
    double us_since(const Event&) const override { return 0.0; }
    void record(bool packet) {
      packet_ = packet;
      left_ = device_.options_.looks;
      if (packet_) device_.packets_max_ = std::max(device_.packets_max_, ++device_.packets_);
      if (left_ == 0) end();
    }

   private:
    void end() const {
      if (packet_) --device_.packets_;
    }
    FakeDevice& device_;
    bool packet_ = false;
    mutable int left_ = 0;
  };
  class FakeStream final : public Stream {
   public:
    explicit FakeStream(FakeDevice& device) : device_(device) {}
    void copy(void* target, const void* source, int64_t bytes) override {
      if (!device_.options_.copies) return;
      if (covers(device_.device_memory_, target, bytes)) {
        packet_ = true;
        device_.packet_max_bytes_ = std::max(device_.packet_max_bytes_, bytes);
        MOED_CHECK(covers(device_.pins_, source, bytes) || covers(device_.pinned_, source, bytes)) << "not pinned";
      }
      std::memcpy(target, source, static_cast<size_t>(bytes));
    }
    void record(Event& event) override { static_cast<FakeEvent&>(event).record(std::exchange(packet_, false)); }
    void wait(const Event&) override {}

   private:
    FakeDevice& device_;
    bool packet_ = false;
  };

  static bool covers(const std::vector<Piece>& pieces, const void* data, int64_t bytes) {
    const auto* begin = static_cast<const std::byte*>(data);
    return std::any_of(pieces.begin(), pieces.end(), [&](const Piece& piece) {
      return begin >= piece.data && begin + bytes <= piece.data + piece.bytes;
    });
  }
  void release(std::byte* data, int64_t, Memory) override {
    for (auto* pieces : {&device_memory_, &pinned_}) {
      std::erase_if(*pieces, [&](const Piece& piece) { return piece.data == data; });
    }
    delete[] data;
  }

  const Options options_;
  const std::unique_ptr<Device> host_;
  std::vector<Piece> pins_;
  std::vector<Piece> device_memory_;
  std::vector<Piece> pinned_;  // allocated so
  int64_t bounce_bytes_ = 0;
  int64_t packet_max_bytes_ = 0;
  int packets_ = 0;  // in flight
  int packets_max_ = 0;
};

}  // namespace moed
