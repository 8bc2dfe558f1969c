#pragma once

#include <memory>
#include <vector>

#include "engine/step.h"
#include "kernels/device.h"

namespace moed {

// What a stretch of a pass's stream was spent on. kIdle: the pass rested while another ran.
enum class Lane : uint8_t { kIdle, kAttention, kExperts, kDense, kSample };

// Measures a pass by events in its stream, so that it says the same on devices that run behind the host. Serving thread
// only.
class StepClock {
 public:
  StepClock(Device& device, Stream& stream) : device_(&device), stream_(&stream) {}
  // Begins anew; events are kept.
  void reset() { marks_.clear(); }
  // The stretch since the last mark belonged to `lane`.
  void mark(Lane lane);
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
};

}  // namespace moed
