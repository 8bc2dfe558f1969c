#include "kernels/simulated/timeline.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace moed {
namespace {

// 10,000 bytes a microsecond over the link, 20,000 of host DRAM; the link keeps half when the host takes all of that.
MachineFile round_machine() {
  MachineFile machine;
  machine.device = {.memory_gib = 1.0, .bf16_tflops = 1.0, .dram_gb_s = 100.0, .kernel_us = 1.0, .tile_rows = 1.0};
  machine.link = {.h2d_gb_s = 10.0, .d2h_gb_s = 5.0};
  machine.host.dram_gb_s = 20.0;
  machine.interference = {{0.0, 1.0}, {1.0, 0.5}};
  return machine;
}

constexpr double kTiny = 1e-6;

Timeline::MomentPtr mark(Timeline& timeline, int32_t stream) {
  auto moment = std::make_shared<Timeline::Moment>();
  timeline.enqueue_moment(stream, moment);
  return moment;
}

void add(Timeline& timeline, int32_t stream, Resource resource, const Work& work) {
  timeline.enqueue(stream, resource, [work] { return work; }, {});
}

constexpr Work kernel_of(double us) { return {.compute_us = us}; }
constexpr Work up_of(int64_t bytes) { return {.up_bytes = bytes}; }

TEST(Timeline, ACopyOverlapsAKernel) {
  Timeline timeline(round_machine(), 0);
  const int32_t compute = timeline.add_stream();
  const int32_t copies = timeline.add_stream();
  add(timeline, compute, Resource::kKernels, kernel_of(80.0));
  add(timeline, copies, Resource::kUp, up_of(1'000'000));
  const auto computed = mark(timeline, compute);
  const auto copied = mark(timeline, copies);
  timeline.wait(*copied);
  EXPECT_NEAR(computed->at_us, 80.0, kTiny);
  EXPECT_NEAR(copied->at_us, 100.0, kTiny);
  EXPECT_NEAR(timeline.now_us(), 100.0, kTiny);
}

TEST(Timeline, AKernelWaitsForItsCopy) {
  Timeline timeline(round_machine(), 0);
  const int32_t compute = timeline.add_stream();
  const int32_t copies = timeline.add_stream();
  add(timeline, copies, Resource::kUp, up_of(1'000'000));
  timeline.enqueue_wait(compute, mark(timeline, copies));
  add(timeline, compute, Resource::kKernels, kernel_of(50.0));
  const auto computed = mark(timeline, compute);
  timeline.spend(120.0);  // the host does something else meanwhile
  EXPECT_FALSE(computed->reached);
  timeline.wait(*computed);
  EXPECT_NEAR(computed->at_us, 150.0, kTiny);
}

TEST(Timeline, KernelsOfTwoStreamsTakeTurnsAsTheyCome) {
  Timeline timeline(round_machine(), 0);
  const int32_t one = timeline.add_stream();
  const int32_t other = timeline.add_stream();
  add(timeline, other, Resource::kKernels, kernel_of(10.0));
  timeline.spend(1.0);
  add(timeline, one, Resource::kKernels, kernel_of(20.0));
  const auto one_done = mark(timeline, one);
  timeline.spend(1.0);
  add(timeline, other, Resource::kKernels, kernel_of(40.0));  // ready at 10, after the 20 of `one`, ready at 1
  const auto other_done = mark(timeline, other);
  timeline.wait(*other_done);
  EXPECT_NEAR(one_done->at_us, 30.0, kTiny);
  EXPECT_NEAR(other_done->at_us, 70.0, kTiny);
}

// The host asks for all of DRAM, so the link keeps 5,000 bytes a microsecond; the host gets the 15,000 that are left.
TEST(Timeline, TheHostAndACopyShareDram) {
  Timeline timeline(round_machine(), 0);
  const int32_t copies = timeline.add_stream();
  add(timeline, copies, Resource::kUp, up_of(1'000'000));
  const auto copied = mark(timeline, copies);
  timeline.run({.host_bytes = 1'000'000});
  EXPECT_NEAR(timeline.now_us(), 1e6 / 15'000, kTiny);
  timeline.wait(*copied);  // a third is there; the rest comes at 10,000
  EXPECT_NEAR(copied->at_us, 1e6 / 15'000 + (1e6 - 5'000 * 1e6 / 15'000) / 10'000, kTiny);
}

// Half of DRAM: the curve says 0.75.
TEST(Timeline, TheCurveIsReadAtTheHostsShare) {
  Timeline timeline(round_machine(), 0);
  const int32_t copies = timeline.add_stream();
  add(timeline, copies, Resource::kUp, up_of(750'000));
  const auto copied = mark(timeline, copies);
  timeline.run({.host_bytes = 2'000'000, .host_gb_s = 10.0});
  EXPECT_NEAR(timeline.now_us(), 200.0, kTiny);  // 17,500 of 20,000: nobody is short of DRAM
  EXPECT_NEAR(copied->at_us, 100.0, kTiny);
}

TEST(Timeline, AHostThatOnlyComputesLeavesTheLinkAlone) {
  Timeline timeline(round_machine(), 0);
  const int32_t copies = timeline.add_stream();
  add(timeline, copies, Resource::kUp, up_of(1'000'000));
  const auto copied = mark(timeline, copies);
  timeline.run({.compute_us = 300.0});
  EXPECT_NEAR(timeline.now_us(), 300.0, kTiny);
  EXPECT_NEAR(copied->at_us, 100.0, kTiny);
}

TEST(Timeline, AKernelThatReadsHostMemorySharesTheLink) {
  Timeline timeline(round_machine(), 0);
  const int32_t compute = timeline.add_stream();
  const int32_t copies = timeline.add_stream();
  add(timeline, compute, Resource::kKernels, {.least_us = 10.0, .up_bytes = 500'000});
  add(timeline, copies, Resource::kUp, up_of(1'000'000));
  const auto computed = mark(timeline, compute);
  const auto copied = mark(timeline, copies);
  timeline.wait(*copied);
  EXPECT_NEAR(computed->at_us, 100.0, kTiny);
  EXPECT_NEAR(copied->at_us, 150.0, kTiny);
}

TEST(Timeline, AKernelThatReadsLittleTakesLittleOfTheLink) {
  Timeline timeline(round_machine(), 0);
  const int32_t compute = timeline.add_stream();
  const int32_t copies = timeline.add_stream();
  add(timeline, compute, Resource::kKernels, {.compute_us = 100.0, .up_bytes = 100'000});
  add(timeline, copies, Resource::kUp, up_of(1'000'000));
  const auto computed = mark(timeline, compute);
  const auto copied = mark(timeline, copies);
  timeline.wait(*copied);
  EXPECT_NEAR(computed->at_us, 100.0, kTiny);
  EXPECT_NEAR(copied->at_us, 110.0, kTiny);
}

TEST(Timeline, BothDirectionsOfTheLinkRunAtOnce) {
  Timeline timeline(round_machine(), 0);
  const int32_t ups = timeline.add_stream();
  const int32_t downs = timeline.add_stream();
  add(timeline, ups, Resource::kUp, up_of(1'000'000));
  add(timeline, downs, Resource::kDown, {.down_bytes = 1'000'000});
  const auto up = mark(timeline, ups);
  const auto down = mark(timeline, downs);
  timeline.wait(*down);
  EXPECT_NEAR(up->at_us, 100.0, kTiny);
  EXPECT_NEAR(down->at_us, 200.0, kTiny);
}

TEST(Timeline, SlicesOfTheHostAddUpToTheWhole) {
  for (const double slice_us : {1.0, 7.0, 1000.0}) {
    Timeline timeline(round_machine(), 0);
    const int32_t copies = timeline.add_stream();
    add(timeline, copies, Resource::kUp, up_of(1'000'000));
    auto work = timeline.begin_host({.host_bytes = 1'000'000});
    while (!timeline.run_host(work, slice_us)) {
    }
    EXPECT_NEAR(timeline.now_us(), 1e6 / 15'000, 1e-3) << slice_us;
  }
}

TEST(Timeline, CountsWhatItDid) {
  Timeline timeline(round_machine(), 0);
  const int32_t stream = timeline.add_stream();
  add(timeline, stream, Resource::kUp, up_of(100'000));
  add(timeline, stream, Resource::kKernels, {.compute_us = 5.0, .device_bytes = 77, .up_bytes = 11, .down_bytes = 22});
  add(timeline, stream, Resource::kDown, {.down_bytes = 50'000});
  timeline.wait(*mark(timeline, stream));
  timeline.run({.host_bytes = 33});
  const auto& kernels = timeline.totals()[static_cast<int>(Resource::kKernels)];
  EXPECT_EQ(kernels.count, 1);
  EXPECT_EQ(kernels.device_bytes, 77);
  EXPECT_EQ(kernels.up_bytes, 11);
  EXPECT_EQ(kernels.down_bytes, 22);
  EXPECT_NEAR(kernels.busy_us, 5.0, kTiny);
  EXPECT_EQ(timeline.totals()[static_cast<int>(Resource::kUp)].up_bytes, 100'000);
  EXPECT_NEAR(timeline.totals()[static_cast<int>(Resource::kUp)].busy_us, 10.0, kTiny);
  EXPECT_EQ(timeline.totals()[static_cast<int>(Resource::kDown)].down_bytes, 50'000);
  EXPECT_EQ(timeline.totals()[static_cast<int>(Resource::kHost)].host_bytes, 33);
}

std::vector<double> kernel_times(MachineFile machine, uint64_t seed, int count) {
  Timeline timeline(machine, seed);
  const int32_t stream = timeline.add_stream();
  std::vector<double> times;
  for (double before = 0.0; static_cast<int>(times.size()) < count;) {
    add(timeline, stream, Resource::kKernels, kernel_of(10.0));
    timeline.wait(*mark(timeline, stream));
    times.push_back(timeline.now_us() - before);
    before = timeline.now_us();
  }
  return times;
}

TEST(Timeline, JitterStaysWithinItsBoundsAndFollowsTheSeed) {
  MachineFile machine = round_machine();
  machine.noise.jitter = 0.1;
  const std::vector<double> times = kernel_times(machine, 1, 2000);
  const auto [least, most] = std::minmax_element(times.begin(), times.end());
  EXPECT_GE(*least, 9.0 - kTiny);
  EXPECT_LE(*most, 11.0 + kTiny);
  EXPECT_LT(*least, 9.05);
  EXPECT_GT(*most, 10.95);
  double sum = 0.0;
  for (const double time : times) sum += time;
  EXPECT_NEAR(sum / 2000.0, 10.0, 0.05);  // the deviation of the mean is 0.013
  EXPECT_EQ(times, kernel_times(machine, 1, 2000));
  EXPECT_NE(times, kernel_times(machine, 2, 2000));
}

TEST(Timeline, DriftSwingsOnceAPeriod) {
  MachineFile machine = round_machine();
  machine.noise.drift = 0.2;
  machine.noise.drift_period_s = 0.001;
  const std::vector<double> times = kernel_times(machine, 1, 1000);
  const auto [least, most] = std::minmax_element(times.begin(), times.end());
  EXPECT_NEAR(*least, 8.0, 0.01);
  EXPECT_NEAR(*most, 12.0, 0.01);
  int crossings = 0;
  double now_us = 0.0;
  for (size_t i = 1; i < times.size(); ++i) crossings += (times[i - 1] < 10.0) != (times[i] < 10.0) ? 1 : 0;
  for (const double time : times) now_us += time;
  EXPECT_NEAR(crossings, 2.0 * now_us / 1000.0, 2.0);
}

TEST(TimelineDeathTest, AWaitForWhatNobodyDoesDies) {
  Timeline timeline(round_machine(), 0);
  const int32_t stream = timeline.add_stream();
  timeline.enqueue_wait(stream, std::make_shared<Timeline::Moment>());
  const auto never = mark(timeline, stream);
  EXPECT_DEATH(timeline.wait(*never), "nothing that is enqueued");
}

}  // namespace
}  // namespace moed
