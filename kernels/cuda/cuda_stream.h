#pragma once

#include <chrono>
#include <cstdint>

#include "kernels/cuda/cuda_context.h"
#include "kernels/device.h"

namespace moed::cuda {

// A moment that both clocks know: CUDA's events count from each other, the host lane's by the steady clock.
class Epoch {
 public:
  explicit Epoch(Context& context);
  ~Epoch();
  cudaEvent_t event() const { return event_; }
  std::chrono::steady_clock::time_point at() const { return at_; }

 private:
  Context& context_;
  cudaEvent_t event_ = nullptr;
  std::chrono::steady_clock::time_point at_;
};

// Recorded by streams of the GPU or by the host lane, now this, now that.
class CudaEvent final : public Event {
 public:
  CudaEvent(Context& context, const Epoch& epoch, bool timed);
  ~CudaEvent() override;

  bool done() const override;
  Status join() override;
  double us_since(const Event& earlier) const override;

  void record_on(cudaStream_t stream);
  void record_on_host();
  // The stream goes on when the event is done.
  void hold(cudaStream_t stream) const;

 private:
  enum class Recorder : uint8_t { kNone, kStream, kHost };
  // Since the epoch.
  double at_us() const;
  double elapsed_us(cudaEvent_t earlier) const;
  void check_recorded(const char* what) const;

  Context& context_;
  const Epoch& epoch_;
  const bool timed_;
  cudaEvent_t event_ = nullptr;
  Recorder recorder_ = Recorder::kNone;
  std::chrono::steady_clock::time_point at_;  // kHost
};

class CudaStream : public Stream {
 public:
  explicit CudaStream(Context& context);
  // Waits for what is enqueued.
  ~CudaStream() override;
  void copy(void* target, const void* source, int64_t bytes) override;
  void record(Event& event) override { static_cast<CudaEvent&>(event).record_on(stream_); }
  void wait(const Event& event) override { static_cast<const CudaEvent&>(event).hold(stream_); }
  cudaStream_t handle() const { return stream_; }

 private:
  Context& context_;
  cudaStream_t stream_ = nullptr;
};

// The host lane's: what comes to it is done at once.
class HostLaneStream final : public Stream {
 public:
  void copy(void* target, const void* source, int64_t bytes) override;
  void record(Event& event) override { static_cast<CudaEvent&>(event).record_on_host(); }
  // REQUIRES: the host has joined the event.
  void wait(const Event& event) override;
};

}  // namespace moed::cuda
