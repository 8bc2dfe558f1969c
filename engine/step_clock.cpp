#include "engine/step_clock.h"

#include "base/check.h"

namespace moed {

void check_device(const Status& status) { MOED_CHECK(status.ok()) << "device: " << status.message(); }

void StepClock::reset() {
  marks_.clear();
  host_ = {};
}

void StepClock::mark(Lane lane) {
  if (marks_.size() == events_.size()) events_.push_back(device_->make_event());
  Event* event = events_[marks_.size()].get();
  stream_->record(*event);
  marks_.push_back({event, lane});
}

void StepClock::join() const {
  if (marks_.empty()) return;
  check_device(marks_.back().event->join());
}

StepTimes StepClock::times() {
  StepTimes times = host_;
  join();
  for (size_t i = 1; i < marks_.size(); ++i) {
    const double us = marks_[i].event->us_since(*marks_[i - 1].event);
    switch (marks_[i].lane) {
      case Lane::kIdle:
        continue;
      case Lane::kAttention:
        times.attention_us += us;
        break;
      case Lane::kExperts:
        times.experts_us += us;
        break;
      case Lane::kDense:
        times.dense_us += us;
        break;
      case Lane::kSample:
        times.sample_us += us;
        break;
    }
    times.total_us += us;
  }
  return times;
}

}  // namespace moed
