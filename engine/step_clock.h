#pragma once

#include <memory>
#include <vector>

#include "engine/step.h"
#include "kernels/device.h"

namespace moed {

// A failed copy or launch ends the process: nothing that came after it can be trusted.
void check_device(const Status& status);

// What a stretch of a pass's stream was spent on. kIdle: the pass rested while another ran.
enum class Lane : uint8_t { kIdle, kAttention, kExperts, kDense, kSample };

// Measures a pass by events in its stream, so that it says the same on devices that run behind the host; the host
// lane's work, which has been done when it returns, by the device's clock. Serving thread only.
class StepClock {
 public:
  StepClock(Device& device, Stream& stream) : device_(&device), stream_(&stream) {}
  // Begins anew; events are kept.
  void reset();
  // The stretch since the last mark belonged to `lane`.
  void mark(Lane lane);
  // The host lane was at it since `begin_us`, of Device::now_us().
  void add_host_attention(double begin_us) { host_.host_attention_us += device_->now_us() - begin_us; }
  void add_host_experts(double begin_us) { host_.host_experts_us += device_->now_us() - begin_us; }
  void add_ring_wait(double begin_us) { host_.ring_wait_us += device_->now_us() - begin_us; }
  // Waits for the last mark; at once when there is none. A failed device ends the process here.
  void join() const;
  // Waits for the last mark. A failed device ends the process here.
  StepTimes times();

 private:
  struct Mark {
    Event* event = nullptr;
    Lane lane = Lane::kIdle;
  };
  Device* device_;
  Stream* stream_;
  std::vector<std::unique_ptr<Event>> events_;
  std::vector<Mark> marks_;
  StepTimes host_;  // the host lane's alone
};

}  // namespace moed
