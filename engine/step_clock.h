#pragma once

#include <memory>
#include <vector>

#include "engine/step.h"
#include "kernels/device.h"

namespace moed {

// A failed copy or launch ends the process: nothing that came after it can be trusted.
void check_device(const Status& status);

// What a stretch of a pass's stream was spent on. kIdle: the pass had not begun, or rested while another ran.
enum class Lane : uint8_t { kIdle, kAttention, kExperts, kDense, kSample };

// Measures a pass by events in its stream, so that it says the same on devices that run behind the host; the host
// lane's work, which has been done when it returns, by the device's clock. An event is a driver call, and a layer would
// take about five a half: but in passes whose lanes are measured only begin, rests and end are marked. Serving thread
// only.
class StepClock {
 public:
  // Which of the passes that share a stream it is at. Null: none.
  struct Turn {
    StepClock* running = nullptr;
  };
  // All of it outlives the clock.
  StepClock(Device& device, Stream& stream, Turn& turn)
      : device_(&device), stream_(&stream), turn_(&turn), last_(device.make_event()) {}
  // A pass is to begin; events are kept.
  void reset(bool measures_lanes);
  // The pass begins, or goes on.
  void resume();
  // The stretch since the last mark belonged to `lane`.
  void mark(Lane lane) {
    if (measures_lanes_) record(lane);
  }
  // The host lane was at it since `begin_us`, of Device::now_us().
  void add_host_attention(double begin_us) { host_.host_attention_us += device_->now_us() - begin_us; }
  void add_host_experts(double begin_us) { host_.host_experts_us += device_->now_us() - begin_us; }
  void add_ring_wait(double begin_us) { host_.ring_wait_us += device_->now_us() - begin_us; }
  // Waits for what the stream holds. A failed device ends the process here.
  void join();
  // The pass has ended: waits as join().
  StepTimes times();

 private:
  struct Mark {
    Event* event = nullptr;
    Lane lane = Lane::kIdle;
  };
  void record(Lane lane);

  Device* device_;
  Stream* stream_;
  Turn* turn_;
  bool measures_lanes_ = true;
  std::unique_ptr<Event> last_;  // join()'s
  std::vector<std::unique_ptr<Event>> events_;
  std::vector<Mark> marks_;
  StepTimes host_;  // the host lane's alone
};

}  // namespace moed
