#include "tests/engine/late_device.h"

#include <deque>
#include <functional>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/ops.h"

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
  bool done() const override { return queue_.num_run >= at_; }
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

class LateOps final : public Ops {
 public:
  LateOps(Queue& queue, Ops& ops, Stream& host) : queue_(queue), ops_(ops), host_(host) {}
  Status reserve(const OpLimits& limits) override { return ops_.reserve(limits); }
  void embed(std::span<const int32_t> tokens, Matrix<const Bf16> table, Matrix<float> out, Stream&) override {
    queue_.push([=, this] { ops_.embed(tokens, table, out, host_); });
  }
  void rms_norm(Matrix<const float> x, std::span<const int32_t> rows, const float* weight, float eps, Matrix<Bf16> out,
                Stream&) override {
    queue_.push([=, this] { ops_.rms_norm(x, rows, weight, eps, out, host_); });
  }
  void linear(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y, Stream&) override {
    queue_.push([=, this] { ops_.linear(x, weights, accumulate, y, host_); });
  }
  void rope_append(const RopeAppend& args, Stream&) override {
    queue_.push([=, this] { ops_.rope_append(args, host_); });
  }
  void attention(const Attention& args, Stream&) override {
    queue_.push([=, this] { ops_.attention(args, host_); });
  }
  void route(const Route& args, Stream&) override {
    queue_.push([=, this] { ops_.route(args, host_); });
  }
  // The list of works is the caller's alone during the call; the pairs that they name are mapped.
  void expert_ffn(const ExpertFfn& args, Stream&) override {
    queue_.push([this, args, works = std::vector<ExpertWork>(args.works.begin(), args.works.end())] {
      ExpertFfn late = args;
      late.works = works;
      ops_.expert_ffn(late, host_);
    });
  }
  void combine(const Combine& args, Stream&) override {
    queue_.push([=, this] { ops_.combine(args, host_); });
  }

 private:
  Queue& queue_;
  Ops& ops_;
  Stream& host_;
};

class LateDevice final : public Device {
 public:
  explicit LateDevice(std::unique_ptr<Device> host)
      : host_(std::move(host)), stream_(host_->make_stream()), ops_(queue_, host_->ops(), *stream_) {}
  std::string_view description() const override { return host_->description(); }
  bool is_host() const override { return false; }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override { return host_->allocate(bytes, memory); }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<LateStream>(queue_, *stream_); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<LateEvent>(queue_, host_->make_event()); }
  Ops& ops() override { return ops_; }

 private:
  // Buffers are the host device's and go back to it.
  void release(std::byte*, int64_t, Memory) override { MOED_CHECK(false) << "not from here"; }

  Queue queue_;
  std::unique_ptr<Device> host_;
  std::unique_ptr<Stream> stream_;
  LateOps ops_;
};

}  // namespace

std::unique_ptr<Device> late_device(std::unique_ptr<Device> host) {
  return std::make_unique<LateDevice>(std::move(host));
}

}  // namespace moed
