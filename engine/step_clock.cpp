#include "engine/step_clock.h"

#include <utility>

#include "base/check.h"

namespace moed {
namespace {

double StepTimes::*lane_us(Lane lane) {
  switch (lane) {
    case Lane::kAttention:
      return &StepTimes::attention_us;
    case Lane::kExperts:
      return &StepTimes::experts_us;
    case Lane::kSample:
      return &StepTimes::sample_us;
    case Lane::kDense:
    case Lane::kIdle:
      break;
  }
  return &StepTimes::dense_us;
}

}  // namespace

void check_device(const Status& status) { MOED_CHECK(status.ok()) << "device: " << status.message(); }

void StepClock::reset(bool measures_lanes) {
  marks_.clear();
  host_ = {};
  measures_lanes_ = measures_lanes;
  if (turn_->running == this) turn_->running = nullptr;
}

void StepClock::resume() {
  StepClock* const other = std::exchange(turn_->running, this);
  if (other == this) return;
  // Where the other pass rests; its last mark stands there already if it marks its lanes.
  if (other != nullptr && !other->measures_lanes_) other->record(Lane::kDense);
  record(Lane::kIdle);
}

void StepClock::record(Lane lane) {
  if (marks_.size() == events_.size()) events_.push_back(device_->make_timed_event());
  Event* event = events_[marks_.size()].get();
  stream_->record(*event);
  marks_.push_back({event, lane});
}

void StepClock::join() {
  stream_->record(*last_);
  check_device(last_->join());
}

StepTimes StepClock::times() {
  if (!measures_lanes_) record(Lane::kDense);
  turn_->running = nullptr;
  StepTimes times = host_;
  times.lanes_measured = measures_lanes_;
  if (!marks_.empty()) check_device(marks_.back().event->join());
  for (size_t i = 1; i < marks_.size(); ++i) {
    if (marks_[i].lane == Lane::kIdle) continue;
    const double us = marks_[i].event->us_since(*marks_[i - 1].event);
    times.total_us += us;
    if (measures_lanes_) times.*lane_us(marks_[i].lane) += us;
  }
  return times;
}

}  // namespace moed
