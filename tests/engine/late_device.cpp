#include "tests/engine/late_device.h"

#include <deque>
#include <functional>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/op_ranges.h"

namespace moed {
namespace {

// All streams of a device in one row: what waits for what is then right by itself.
struct Queue {
  std::deque<std::function<void()>> work;
  int64_t num_pushed = 0;
  int64_t num_run = 0;

  int64_t push(std::function<void()> item) {
    work.push_back(std::move(item));
    return ++num_pushed;
  }
  void run_to(int64_t end) {
    for (; num_run < end; ++num_run) {
      work.front()();
      work.pop_front();
    }
  }
};

class LateEvent final : public Event {
 public:
  LateEvent(Queue& queue, std::shared_ptr<Event> inner) : queue_(queue), inner_(std::move(inner)) {}
  // Who looks again and again gets there.
  bool done() const override {
    if (queue_.num_run < at_) queue_.run_to(queue_.num_run + 1);
    return queue_.num_run >= at_;
  }
  Status join() override {
    queue_.run_to(at_);
    return inner_->join();
  }
  double us_since(const Event& earlier) const override {
    return inner_->us_since(*static_cast<const LateEvent&>(earlier).inner_);
  }
  void record(Stream& host) {
    at_ = queue_.push([inner = inner_, &host] { host.record(*inner); });
  }

 private:
  Queue& queue_;
  std::shared_ptr<Event> inner_;  // outlives a queued record()
  int64_t at_ = 0;
};

class LateStream final : public Stream {
 public:
  LateStream(Queue& queue, Stream& host) : queue_(queue), host_(host) {}
  void copy(void* target, const void* source, int64_t bytes) override {
    queue_.push([this, target, source, bytes] { host_.copy(target, source, bytes); });
  }
  void record(Event& event) override { static_cast<LateEvent&>(event).record(host_); }
  void wait(const Event&) override {}

 private:
  Queue& queue_;
  Stream& host_;
};

class LateOps final : public QueuedOps {
 public:
  LateOps(Queue& queue, Ops& ops, Stream& host) : queue_(queue), ops_(ops), host_(host) {}
  Status reserve(const OpLimits& limits) override { return ops_.reserve(limits); }

 private:
  void enqueue(OpCall call, Stream&) override {
    queue_.push([this, late = std::move(call)]() mutable { run_op(late, ops_, host_); });
  }
  Queue& queue_;
  Ops& ops_;
  Stream& host_;
};

// Its memory is the host's; the host lane runs at once.
class LateDevice final : public Device {
 public:
  LateDevice(std::unique_ptr<Device> host, std::unique_ptr<Device> lane)
      : host_(std::move(host)),
        lane_(std::move(lane)),
        stream_(host_->make_stream()),
        ops_(queue_, host_->ops(), *stream_) {}
  std::string_view description() const override { return host_->description(); }
  bool is_host() const override { return false; }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override { return host_->allocate(bytes, memory); }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<LateStream>(queue_, *stream_); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<LateEvent>(queue_, host_->make_event()); }
  Ops& ops() override { return ops_; }
  Ops& host_ops() override { return lane().host_ops(); }
  void on_host_work(std::function<void()> tick) override {
    if (lane_ != nullptr) lane_->on_host_work(std::move(tick));
  }
  Stream& host_stream() override { return host_->host_stream(); }
  std::unique_ptr<HostAttention> make_host_attention() override { return lane().make_host_attention(); }

 private:
  // Buffers are the host device's and go back to it.
  void release(std::byte*, int64_t, Memory) override { MOED_CHECK(false) << "not from here"; }

  Device& lane() const { return lane_ != nullptr ? *lane_ : *host_; }

  Queue queue_;
  std::unique_ptr<Device> host_;
  std::unique_ptr<Device> lane_;
  std::unique_ptr<Stream> stream_;
  LateOps ops_;
};

}  // namespace

std::unique_ptr<Device> late_device(std::unique_ptr<Device> host, std::unique_ptr<Device> lane) {
  return std::make_unique<LateDevice>(std::move(host), std::move(lane));
}

}  // namespace moed
