#include "kernels/simulated/timeline.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "base/check.h"
#include "kernels/simulated/random.h"

namespace moed {
namespace {

constexpr double kForever = std::numeric_limits<double>::infinity();
constexpr double kBytesPerUsPerGb = 1000.0;  // 1 GB/s is 1000 bytes a microsecond
// Less than this of a task is rounding.
constexpr double kShareNone = 1e-12;

constexpr int index_of(Resource resource) { return static_cast<int>(resource); }

// What each of the demands gets of the capacity, max-min fairly: nobody gets more than it asks for, and whoever gets
// less than it asks for gets at least as much as anyone.
template <size_t N>
std::array<double, N> share_fairly(const std::array<double, N>& demands, double capacity) {
  std::array<double, N> given{};
  std::array<bool, N> met{};
  size_t open = N;
  for (bool again = true; again && open > 0;) {
    again = false;
    const double fair = capacity / static_cast<double>(open);
    for (size_t i = 0; i < N; ++i) {
      if (met[i] || demands[i] > fair) continue;
      given[i] = demands[i];
      capacity -= demands[i];
      met[i] = again = true;
      --open;
    }
  }
  for (size_t i = 0; i < N; ++i) {
    if (!met[i]) given[i] = capacity / static_cast<double>(open);
  }
  return given;
}

double us_of(int64_t bytes, double bytes_per_us) {
  return bytes == 0 ? 0.0 : static_cast<double>(bytes) / bytes_per_us;
}

}  // namespace

Timeline::Timeline(const MachineFile& machine, uint64_t seed) : machine_(machine), random_(seed) {
  for (double& phase : phases_) phase = next_uniform(random_);
}

int32_t Timeline::add_stream() {
  streams_.emplace_back();
  return static_cast<int32_t>(streams_.size()) - 1;
}

double Timeline::draw_noise() { return 1.0 + machine_.noise.jitter * (2.0 * next_uniform(random_) - 1.0); }

double Timeline::drift(Resource resource) const {
  const double turns = now_us_ / (machine_.noise.drift_period_s * 1e6) + phases_[index_of(resource)];
  return 1.0 + machine_.noise.drift * std::sin(2.0 * std::numbers::pi * turns);
}

void Timeline::enqueue(int32_t stream, Resource resource, std::function<Work()> begin, std::function<void()> end) {
  MOED_CHECK(resource != Resource::kHost) << "the host's work is in no stream";
  streams_[stream].items.push_back(TaskItem{resource, std::move(begin), std::move(end), draw_noise()});
}

void Timeline::enqueue_moment(int32_t stream, MomentPtr moment) {
  streams_[stream].items.push_back(MomentItem{std::move(moment)});
}

void Timeline::enqueue_wait(int32_t stream, MomentPtr moment) {
  streams_[stream].items.push_back(WaitItem{std::move(moment)});
}

// Passes the moments and waits at the head of a stream; true when there was one to pass.
bool Timeline::settle_stream(StreamState& stream) {
  bool passed = false;
  while (!stream.items.empty()) {
    Item& item = stream.items.front();
    if (const auto* wait = std::get_if<WaitItem>(&item)) {
      if (!wait->moment->reached) return passed;
    } else if (const auto* moment = std::get_if<MomentItem>(&item)) {
      moment->moment->reached = true;
      moment->moment->at_us = now_us_;
    } else {
      if (stream.ready_us < 0.0) stream.ready_us = now_us_;
      return passed;
    }
    stream.items.pop_front();
    passed = true;
  }
  return passed;
}

void Timeline::begin_what_can() {
  // A moment that one stream reaches may let another go on.
  for (bool passed = true; passed;) {
    passed = false;
    for (StreamState& stream : streams_) {
      if (!stream.running) passed = settle_stream(stream) || passed;
    }
  }
  for (const Resource resource : {Resource::kKernels, Resource::kUp, Resource::kDown}) {
    if (!active_[index_of(resource)].has_value()) begin_task(resource);
  }
}

// Who has been ready longest comes first.
void Timeline::begin_task(Resource resource) {
  StreamState* first = nullptr;
  for (StreamState& stream : streams_) {
    if (stream.running || stream.ready_us < 0.0) continue;
    if (std::get<TaskItem>(stream.items.front()).resource != resource) continue;
    if (first == nullptr || stream.ready_us < first->ready_us) first = &stream;
  }
  if (first == nullptr) return;
  first->running = true;
  const auto& task = std::get<TaskItem>(first->items.front());
  active_[index_of(resource)] = Active{.work = task.begin(),
                                       .noise = task.noise * drift(resource),
                                       .stream = static_cast<int32_t>(first - &streams_[0])};
}

void Timeline::set_durations() {
  const auto work_of = [&](Resource resource) -> const Work* {
    const auto& active = active_[index_of(resource)];
    return active.has_value() ? &active->work : nullptr;
  };
  const Work* host = work_of(Resource::kHost);
  const Work* kernel = work_of(Resource::kKernels);
  const double dram = machine_.host.dram_gb_s * kBytesPerUsPerGb;

  double host_us = 0.0;
  double host_demand = 0.0;
  if (host != nullptr) {
    const double alone = host->host_gb_s > 0.0 ? host->host_gb_s * kBytesPerUsPerGb : dram;
    host_us = std::max({host->least_us, host->compute_us, us_of(host->host_bytes, alone)});
    host_demand = host_us > 0.0 ? static_cast<double>(host->host_bytes) / host_us : 0.0;
  }
  const double left = machine_.link_left(host_demand / dram);
  const double up = machine_.link.h2d_gb_s * kBytesPerUsPerGb * left;
  const double down = machine_.link.d2h_gb_s * kBytesPerUsPerGb * left;

  double kernel_us = 0.0;  // without the link
  std::array<double, 2> kernel_demands{};
  if (kernel != nullptr) {
    const double device = machine_.device.dram_gb_s * kBytesPerUsPerGb;
    kernel_us = std::max({kernel->least_us, kernel->compute_us, us_of(kernel->device_bytes, device)});
    const double alone = std::max({kernel_us, us_of(kernel->up_bytes, up), us_of(kernel->down_bytes, down)});
    if (alone > 0.0) {
      kernel_demands = {static_cast<double>(kernel->up_bytes) / alone, static_cast<double>(kernel->down_bytes) / alone};
    }
  }
  const bool copies_up = work_of(Resource::kUp) != nullptr;
  const bool copies_down = work_of(Resource::kDown) != nullptr;
  const auto up_shares = share_fairly<2>({kernel_demands[0], copies_up ? up : 0.0}, up);
  const auto down_shares = share_fairly<2>({kernel_demands[1], copies_down ? down : 0.0}, down);
  const std::array<double, 3> demands{host_demand, up_shares[0] + up_shares[1], down_shares[0] + down_shares[1]};
  const auto given = share_fairly(demands, dram);
  const auto part = [&](int i) { return demands[i] > 0.0 ? given[i] / demands[i] : 1.0; };

  if (host != nullptr) active_[index_of(Resource::kHost)]->duration_us = host_us / part(0);
  if (kernel != nullptr) {
    active_[index_of(Resource::kKernels)]->duration_us =
        std::max({kernel_us, us_of(kernel->up_bytes, up_shares[0] * part(1)),
                  us_of(kernel->down_bytes, down_shares[0] * part(2))});
  }
  if (copies_up) {
    Active& copy = *active_[index_of(Resource::kUp)];
    copy.duration_us = std::max(copy.work.least_us, us_of(copy.work.up_bytes, up_shares[1] * part(1)));
  }
  if (copies_down) {
    Active& copy = *active_[index_of(Resource::kDown)];
    copy.duration_us = std::max(copy.work.least_us, us_of(copy.work.down_bytes, down_shares[1] * part(2)));
  }
}

void Timeline::finish(Resource resource) {
  std::optional<Active>& active = active_[index_of(resource)];
  ResourceTotals& totals = totals_[index_of(resource)];
  ++totals.count;
  totals.device_bytes += active->work.device_bytes;
  totals.up_bytes += active->work.up_bytes;
  totals.down_bytes += active->work.down_bytes;
  totals.host_bytes += active->work.host_bytes;
  const int32_t index = active->stream;
  active.reset();
  if (index < 0) return;
  StreamState& stream = streams_[index];
  const std::function<void()> end = std::move(std::get<TaskItem>(stream.items.front()).end);
  stream.items.pop_front();
  stream.running = false;
  stream.ready_us = -1.0;
  if (end) end();
}

bool Timeline::step(double limit_us) {
  begin_what_can();
  set_durations();
  double passed = limit_us - now_us_;
  Resource next = Resource::kHost;
  bool ends = false;
  for (int i = 0; i < kNumResources; ++i) {
    if (!active_[i].has_value()) continue;
    const double us = std::max(0.0, active_[i]->left) * active_[i]->duration_us * active_[i]->noise;
    if (us > passed) continue;
    passed = us;
    next = static_cast<Resource>(i);
    ends = true;
  }
  MOED_CHECK(passed < kForever) << "the host waits for what nothing that is enqueued will do";
  for (int i = 0; i < kNumResources; ++i) {
    if (!active_[i].has_value()) continue;
    const double whole_us = active_[i]->duration_us * active_[i]->noise;
    active_[i]->left -= whole_us > 0.0 ? passed / whole_us : 1.0;
    totals_[i].busy_us += passed;
  }
  now_us_ = ends ? now_us_ + passed : limit_us;
  if (ends) finish(next);
  return ends;
}

void Timeline::spend(double us) {
  const double until_us = now_us_ + us;
  while (step(until_us)) {
  }
  begin_what_can();
}

Timeline::HostWork Timeline::begin_host(const Work& work) { return {work, draw_noise(), 1.0}; }

bool Timeline::run_host(HostWork& work, double us_max) {
  const double until_us = now_us_ + us_max;
  std::optional<Active>& active = active_[index_of(Resource::kHost)];
  active = Active{.work = work.work, .noise = work.noise * drift(Resource::kHost), .left = work.left};
  while (active.has_value() && step(until_us)) {
  }
  begin_what_can();
  work.left = active.has_value() ? std::max(active->left, kShareNone) : 0.0;
  active.reset();
  return work.left == 0.0;
}

void Timeline::run(const Work& work) {
  HostWork host = begin_host(work);
  run_host(host, kForever);
}

void Timeline::wait(const Moment& moment) {
  begin_what_can();
  while (!moment.reached) {
    step(kForever);
    begin_what_can();
  }
}

}  // namespace moed
