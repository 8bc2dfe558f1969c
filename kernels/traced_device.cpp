#include "kernels/traced_device.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <set>
#include <utility>

#include "base/check.h"
#include "kernels/op_ranges.h"

namespace moed {

// How the parts of a traced device write to its trace.
class Tracer {
 public:
  explicit Tracer(DeviceTrace& trace) : trace_(trace) {}

  int32_t add_lane() const { return trace_.num_lanes_++; }
  double now_us() const { return trace_.device_.now_us(); }
  // Something that the host did from begin_us until now.
  void add_host(const char* name, double begin_us) const {
    if (trace_.records()) trace_.spans_.push_back({.name = name, .begin_us = begin_us, .end_us = now_us()});
  }
  // Does it on a stream, between two events.
  void add(const char* name, int32_t lane, int64_t bytes, Stream& inner, FunctionRef<void()> enqueue) const {
    if (!trace_.records()) return enqueue();
    std::unique_ptr<Event> begin = trace_.device_.make_timed_event();
    std::unique_ptr<Event> end = trace_.device_.make_timed_event();
    inner.record(*begin);
    enqueue();
    inner.record(*end);
    trace_.spans_.push_back(
        {.name = name, .lane = lane, .bytes = bytes, .begin = std::move(begin), .end = std::move(end)});
  }

 private:
  DeviceTrace& trace_;
};

namespace {

constexpr int32_t kHostLane = 0;

class TracedEvent final : public Event {
 public:
  TracedEvent(std::unique_ptr<Event> event, Tracer tracer) : inner(std::move(event)), tracer_(tracer) {}
  bool done() const override { return inner->done(); }
  Status join() override {
    const double begin_us = tracer_.now_us();
    Status joined = inner->join();
    tracer_.add_host("wait", begin_us);
    return joined;
  }
  double us_since(const Event& earlier) const override {
    return inner->us_since(*static_cast<const TracedEvent&>(earlier).inner);
  }
  const std::unique_ptr<Event> inner;

 private:
  const Tracer tracer_;
};

class TracedStream final : public Stream {
 public:
  TracedStream(std::unique_ptr<Stream> stream, Tracer tracer)
      : inner(std::move(stream)), tracer_(tracer), lane_(tracer.add_lane()) {}
  void copy(void* target, const void* source, int64_t bytes) override {
    tracer_.add("copy", lane_, bytes, *inner, [&] { inner->copy(target, source, bytes); });
  }
  void record(Event& event) override { inner->record(*static_cast<TracedEvent&>(event).inner); }
  void wait(const Event& event) override { inner->wait(*static_cast<const TracedEvent&>(event).inner); }
  void run(OpCall& call, Ops& ops) {
    tracer_.add(op_name(call), lane_, 0, *inner, [&] { run_op(call, ops, *inner); });
  }
  const std::unique_ptr<Stream> inner;

 private:
  const Tracer tracer_;
  const int32_t lane_;
};

class TracedHostStream final : public Stream {
 public:
  TracedHostStream(Stream& inner, Tracer tracer) : inner_(inner), tracer_(tracer) {}
  void copy(void* target, const void* source, int64_t bytes) override {
    const double begin_us = tracer_.now_us();
    inner_.copy(target, source, bytes);
    tracer_.add_host("copy", begin_us);
  }
  void record(Event& event) override { inner_.record(*static_cast<TracedEvent&>(event).inner); }
  void wait(const Event& event) override { inner_.wait(*static_cast<const TracedEvent&>(event).inner); }

 private:
  Stream& inner_;
  const Tracer tracer_;
};

class TracedOps final : public QueuedOps {
 public:
  explicit TracedOps(Ops& inner) : inner_(inner) {}
  Status reserve(const OpLimits& limits) override { return inner_.reserve(limits); }

 private:
  void enqueue(OpCall call, Stream& stream) override { static_cast<TracedStream&>(stream).run(call, inner_); }
  Ops& inner_;
};

class TracedHostOps final : public QueuedOps {
 public:
  TracedHostOps(Device& inner, Tracer tracer) : inner_(inner), tracer_(tracer) {}
  Status reserve(const OpLimits& limits) override { return inner_.host_ops().reserve(limits); }

 private:
  void enqueue(OpCall call, Stream&) override {
    const double begin_us = tracer_.now_us();
    run_op(call, inner_.host_ops(), inner_.host_stream());
    tracer_.add_host(op_name(call), begin_us);
  }
  Device& inner_;
  const Tracer tracer_;
};

class TracedHostAttention final : public HostAttention {
 public:
  TracedHostAttention(std::unique_ptr<HostAttention> inner, Tracer tracer)
      : inner_(std::move(inner)), tracer_(tracer) {}
  void begin(const Attention& args) override { inner_->begin(args); }
  void run(double slice_us) override {
    const double begin_us = tracer_.now_us();
    inner_->run(slice_us);
    tracer_.add_host("attention", begin_us);
  }
  bool done() const override { return inner_->done(); }

 private:
  const std::unique_ptr<HostAttention> inner_;
  const Tracer tracer_;
};

}  // namespace

// The clocks of host and events are tied together by an event on a stream that has nothing else to do.
void DeviceTrace::start() {
  spans_.clear();
  base_ = device_.make_timed_event();
  const double before_us = device_.now_us();
  clock_->record(*base_);
  const Status joined = base_->join();
  MOED_CHECK(joined.ok()) << joined.message();
  base_us_ = (before_us + device_.now_us()) / 2;
  recording_ = true;
}

Status DeviceTrace::resolve() {
  for (Span& span : spans_) {
    if (span.end == nullptr) continue;
    MOED_RETURN_IF_ERROR(span.end->join());
    span.begin_us = base_us_ + span.begin->us_since(*base_);
    span.end_us = base_us_ + span.end->us_since(*base_);
    span.begin.reset();
    span.end.reset();
  }
  return {};
}

Status DeviceTrace::write(const std::string& path) {
  MOED_RETURN_IF_ERROR(resolve());
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "w"), &std::fclose);
  if (file == nullptr) return invalid_argument(path + ": cannot write the trace there", "trace");
  std::set<int32_t> copying;  // lanes that hold nothing but copies
  for (const Span& span : spans_) copying.insert(span.lane);
  for (const Span& span : spans_) {
    if (span.bytes == 0) copying.erase(span.lane);
  }
  std::string device(device_.description());
  std::erase_if(device, [](char c) { return c == '"' || c == '\\' || static_cast<unsigned char>(c) < ' '; });
  std::fprintf(file.get(), "{\"otherData\": {\"device\": \"%s\"},\n\"displayTimeUnit\": \"ms\",\n\"traceEvents\": [\n",
               device.c_str());
  for (int32_t lane = 0; lane < num_lanes_; ++lane) {
    const char* kind = lane == kHostLane ? "host" : copying.contains(lane) ? "copies" : "stream";
    std::fprintf(
        file.get(),
        "{\"name\": \"thread_name\", \"ph\": \"M\", \"pid\": 1, \"tid\": %d, \"args\": {\"name\": \"%s %d\"}},\n", lane,
        kind, lane);
  }
  for (const Span& span : spans_) {
    std::fprintf(file.get(),
                 "{\"name\": \"%s\", \"ph\": \"X\", \"pid\": 1, \"tid\": %d, \"ts\": %.3f, \"dur\": %.3f, \"args\": "
                 "{\"bytes\": %lld}},\n",
                 span.name, span.lane, span.begin_us - base_us_, span.end_us - span.begin_us,
                 static_cast<long long>(span.bytes));
  }
  std::fprintf(file.get(),
               "{\"name\": \"process_name\", \"ph\": \"M\", \"pid\": 1, \"args\": {\"name\": \"moed\"}}\n]}\n");
  if (std::ferror(file.get()) != 0) return invalid_argument(path + ": the trace could not be written", "trace");
  return {};
}

TracedDevice::TracedDevice(std::unique_ptr<Device> inner)
    : inner_(std::move(inner)),
      trace_(*inner_),
      ops_(std::make_unique<TracedOps>(inner_->ops())),
      host_ops_(std::make_unique<TracedHostOps>(*inner_, Tracer(trace_))),
      host_stream_(std::make_unique<TracedHostStream>(inner_->host_stream(), Tracer(trace_))) {}

TracedDevice::~TracedDevice() = default;

std::unique_ptr<Stream> TracedDevice::make_stream() {
  return std::make_unique<TracedStream>(inner_->make_stream(), Tracer(trace_));
}

std::unique_ptr<Event> TracedDevice::make_event() {
  return std::make_unique<TracedEvent>(inner_->make_event(), Tracer(trace_));
}

std::unique_ptr<Event> TracedDevice::make_timed_event() {
  return std::make_unique<TracedEvent>(inner_->make_timed_event(), Tracer(trace_));
}

std::unique_ptr<HostAttention> TracedDevice::make_host_attention() {
  return std::make_unique<TracedHostAttention>(inner_->make_host_attention(), Tracer(trace_));
}

void TracedDevice::host_access(const void* data, int64_t bytes, Access access) {
  inner_->host_access(data, bytes, access);
}

void TracedDevice::run_host(int64_t count, FunctionRef<void(int64_t index, int thread)> fn) {
  const double begin_us = now_us();
  inner_->run_host(count, fn);
  Tracer(trace_).add_host("host code", begin_us);
}

}  // namespace moed
