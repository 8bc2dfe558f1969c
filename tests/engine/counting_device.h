#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/op_ranges.h"

namespace moed {

struct Copied {
  int num_copies = 0;
  int64_t bytes = 0;
};

// Counts the copies that pass through to a device's streams.
class CountingStream final : public Stream {
 public:
  CountingStream(std::unique_ptr<Stream> stream, Copied& copied) : inner(std::move(stream)), copied_(copied) {}
  void copy(void* target, const void* source, int64_t bytes) override {
    ++copied_.num_copies;
    copied_.bytes += bytes;
    inner->copy(target, source, bytes);
  }
  void record(Event& event) override { inner->record(event); }
  void wait(const Event& event) override { inner->wait(event); }
  const std::unique_ptr<Stream> inner;

 private:
  Copied& copied_;
};

// Counts the calls that pass through to a device's ops.
class CountingOps final : public QueuedOps {
 public:
  explicit CountingOps(Ops& ops) : ops_(ops) {}
  Status reserve(const OpLimits& limits) override { return ops_.reserve(limits); }
  int num_calls = 0;
  int num_expert_calls = 0;          // of these, of expert_ffn()
  int num_empty_expert_calls = 0;    // of these, with no expert to run
  std::vector<size_t> sampled_rows;  // of each call of sample()

 private:
  void enqueue(OpCall call, Stream& stream) override {
    ++num_calls;
    if (const auto* ffn = std::get_if<ExpertFfn>(&call)) {
      ++num_expert_calls;
      const auto is_null = [](const std::byte* blob) { return blob == nullptr; };
      num_empty_expert_calls += std::all_of(ffn->blobs.begin(), ffn->blobs.end(), is_null) ? 1 : 0;
    }
    if (const auto* sample = std::get_if<Sample>(&call)) sampled_rows.push_back(sample->rows.size());
    run_op(call, ops_, *static_cast<CountingStream&>(stream).inner);
  }
  Ops& ops_;
};

class CountingDevice final : public Device {
 public:
  explicit CountingDevice(std::unique_ptr<Device> device) : device_(std::move(device)), ops_(device_->ops()) {}
  std::string_view description() const override { return device_->description(); }
  bool is_host() const override { return device_->is_host(); }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override { return device_->allocate(bytes, memory); }
  std::unique_ptr<Stream> make_stream() override {
    return std::make_unique<CountingStream>(device_->make_stream(), copied);
  }
  std::unique_ptr<Event> make_event() override { return device_->make_event(); }
  std::unique_ptr<Event> make_timed_event() override { return device_->make_timed_event(); }
  Ops& ops() override { return ops_; }
  Ops& host_ops() override { return device_->host_ops(); }
  Stream& host_stream() override { return device_->host_stream(); }
  std::unique_ptr<HostAttention> make_host_attention() override { return device_->make_host_attention(); }
  Status pin(std::byte* data, int64_t bytes) override { return device_->pin(data, bytes); }
  void unpin(std::byte* data) override { device_->unpin(data); }
  void host_access(const void* data, int64_t bytes, Access access) override {
    device_->host_access(data, bytes, access);
  }
  int num_host_threads() const override { return device_->num_host_threads(); }
  void run_host(int64_t count, FunctionRef<void(int64_t, int)> fn) override { device_->run_host(count, fn); }
  CountingOps& counted() { return ops_; }
  Copied copied;

 private:
  void release(std::byte*, int64_t, Memory) override { FAIL() << "a buffer belongs to the device that made it"; }
  std::unique_ptr<Device> device_;
  CountingOps ops_;
};

}  // namespace moed
