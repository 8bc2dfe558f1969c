#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "kernels/machine_file.h"

namespace moed {

// Where something runs: the kernels of a device, its two copy engines, the compute threads of the host.
enum class Resource : uint8_t { kKernels, kUp, kDown, kHost };
inline constexpr int kNumResources = 4;

// What a kernel, a copy or an op of the host lane asks of the machine. It is done when the slowest of these is.
struct Work {
  double least_us = 0.0;    // whatever else it does
  double compute_us = 0.0;  // products
  int64_t device_bytes = 0;
  int64_t up_bytes = 0;    // over the link to the device
  int64_t down_bytes = 0;  // and back
  int64_t host_bytes = 0;  // of host DRAM, by the host's threads
  double host_gb_s = 0.0;  // that they reach alone; 0: all of host.dram_gb_s
};

// Since start.
struct ResourceTotals {
  double busy_us = 0.0;
  int64_t count = 0;
  int64_t device_bytes = 0;
  int64_t up_bytes = 0;
  int64_t down_bytes = 0;
  int64_t host_bytes = 0;
};

// A machine on a virtual clock: discrete events. Each resource runs one piece of work at a time; streams hold work in
// order; the caller is the host, whose time passes in spend(), run() and wait() alone. What runs at the same time
// shares the machine, and rates change whenever something begins or ends:
// - the link keeps link_left(share of DRAM that the host's threads ask for) of each direction's bandwidth; a kernel
// that
//   reads or writes host memory and a copy engine share a direction max-min fairly;
// - the host's threads and all traffic of the link share host.dram_gb_s max-min fairly.
// Times are multiplied by seeded noise. Same calls, same seed: same times. One thread.
class Timeline {
 public:
  // A moment that streams and the host wait for.
  struct Moment {
    bool reached = false;
    double at_us = 0.0;
  };
  using MomentPtr = std::shared_ptr<Moment>;

  Timeline(const MachineFile& machine, uint64_t seed);

  double now_us() const { return now_us_; }

  int32_t add_stream();
  // Work of a resource other than kHost. `begin` is called when it starts, `end` (may be empty) when it is done.
  void enqueue(int32_t stream, Resource resource, std::function<Work()> begin, std::function<void()> end);
  void enqueue_moment(int32_t stream, MomentPtr moment);
  void enqueue_wait(int32_t stream, MomentPtr moment);

  // The host's own time: a driver call, say. Others go on meanwhile.
  void spend(double us);
  // The host's threads do the work, to its end.
  void run(const Work& work);
  // The same in pieces: begin_host() says what, run_host() lets at most so much time pass; true when it is done.
  struct HostWork {
    Work work;
    double noise = 1.0;
    double left = 0.0;  // share
  };
  HostWork begin_host(const Work& work);
  bool run_host(HostWork& work, double us_max);
  // Until the moment is reached. MOED_CHECK: nothing that is enqueued would reach it.
  void wait(const Moment& moment);

  const std::array<ResourceTotals, kNumResources>& totals() const { return totals_; }

 private:
  struct TaskItem {
    Resource resource;
    std::function<Work()> begin;
    std::function<void()> end;
    double noise = 1.0;
  };
  struct MomentItem {
    MomentPtr moment;
  };
  struct WaitItem {
    MomentPtr moment;
  };
  using Item = std::variant<TaskItem, MomentItem, WaitItem>;
  struct StreamState {
    std::deque<Item> items;
    bool running = false;    // its first item is a task on its resource
    double ready_us = -1.0;  // since when its first item could start; negative: it could not yet
  };
  struct Active {
    Work work;
    double noise = 1.0;
    double left = 1.0;
    int32_t stream = -1;       // -1: of the host
    double duration_us = 0.0;  // at the present rates, from beginning to end
  };

  double draw_noise();
  double drift(Resource resource) const;
  void begin_what_can();
  bool settle_stream(StreamState& stream);
  void begin_task(Resource resource);
  void set_durations();
  void finish(Resource resource);
  // To the next event, but not beyond limit_us. True: something ended.
  bool step(double limit_us);

  const MachineFile machine_;
  double now_us_ = 0.0;
  uint64_t random_;
  std::array<double, kNumResources> phases_{};  // of drift
  std::vector<StreamState> streams_;
  std::array<std::optional<Active>, kNumResources> active_;
  std::array<ResourceTotals, kNumResources> totals_;
};

}  // namespace moed
