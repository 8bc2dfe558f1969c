#include "kernels/device.h"

#include <gtest/gtest.h>
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/ops.h"

namespace moed {
namespace {

TEST(Device, UnknownDeviceNamesTheKnown) {
  const auto device = open_device("tpu", {});
  ASSERT_FALSE(device.ok());
  EXPECT_EQ(device.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(device.status().message().find("cpu"), std::string::npos) << device.status().message();
}

TEST(Device, AutoIsTheHostWhereThereIsNoGpu) {
  const bool has_gpu = open_device("cuda", {}).ok();
  EXPECT_EQ(open_device("auto", {.num_threads = 1}).value()->is_host(), !has_gpu);
  EXPECT_EQ(open_device("auto:0", {}).status().param(), "device");
}

TEST(Device, UnknownIsaNamesTheKnown) {
  const auto device = open_device("cpu", {.num_threads = 1, .deterministic = false, .isa = "mmx"});
  ASSERT_FALSE(device.ok());
  EXPECT_NE(device.status().message().find("portable"), std::string::npos) << device.status().message();
}

TEST(Device, RefusesOddThreadCounts) {
  for (const int threads : {-1, 100000}) {
    const auto device = open_device("cpu", {.num_threads = threads, .deterministic = false, .isa = ""});
    ASSERT_FALSE(device.ok());
    EXPECT_EQ(device.status().param(), "num_threads");
  }
}

TEST(Device, DescribesItself) {
  const auto device = open_device("cpu", {.num_threads = 2, .deterministic = false, .isa = "portable"});
  ASSERT_TRUE(device.ok());
  EXPECT_NE((*device)->description().find("portable, 2 threads"), std::string_view::npos) << (*device)->description();
  EXPECT_TRUE((*device)->is_host());
}

TEST(Device, BuffersAreAlignedZeroedAndMovable) {
  auto device = open_device("cpu", {.num_threads = 1, .deterministic = false, .isa = ""}).value();
  Buffer kept;
  {
    Buffer buffer = device->allocate(1000, Memory::kPinned).value();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 0U);
    EXPECT_EQ(buffer.size(), 1000);
    for (int i = 0; i < 1000; ++i) ASSERT_EQ(buffer.as<char>()[i], 0);
    buffer.as<char>()[7] = 'x';
    kept = std::move(buffer);
  }
  EXPECT_EQ(kept.as<char>()[7], 'x');
  EXPECT_EQ(device->allocate(0, Memory::kDevice).value().data(), nullptr);
  EXPECT_FALSE(device->allocate(-1, Memory::kDevice).ok());
  const auto huge = device->allocate(int64_t{1} << 60, Memory::kDevice);
  ASSERT_FALSE(huge.ok());
  EXPECT_EQ(huge.status().code(), StatusCode::kResourceExhausted);
}

int64_t resident_bytes() {
  int64_t total_pages = 0;
  int64_t resident_pages = 0;
  std::ifstream("/proc/self/statm") >> total_pages >> resident_pages;
  return resident_pages * sysconf(_SC_PAGESIZE);
}

// What is not there is noticed at start.
TEST(Device, BuffersAreBackedAtOnce) {
  constexpr int64_t kBytes = int64_t{64} << 20;
  auto device = open_device("cpu", {.num_threads = 1, .deterministic = false, .isa = ""}).value();
  const int64_t before = resident_bytes();
  const Buffer buffer = device->allocate(kBytes, Memory::kDevice).value();
  EXPECT_GE(resident_bytes() - before, kBytes / 10 * 9);
}

TEST(Device, StreamsRunInOrderAndEventsMeasure) {
  auto device = open_device("cpu", {.num_threads = 1, .deterministic = false, .isa = ""}).value();
  const auto stream = device->make_stream();
  const auto begin = device->make_timed_event();
  const auto end = device->make_timed_event();
  const char source[] = "expert";
  char target[sizeof(source)] = {};
  stream->record(*begin);
  stream->copy(target, source, sizeof(source));
  stream->record(*end);
  stream->wait(*end);
  EXPECT_TRUE(end->done());
  EXPECT_TRUE(end->join().ok());
  EXPECT_STREQ(target, "expert");
  EXPECT_GE(end->us_since(*begin), 0.0);
}

using Clock = std::chrono::steady_clock;

// What this thread has had of a processor: a busy machine does not count.
double thread_cpu_us() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) / 1e3;
}

// An expert as large as Mixtral's and few rows, as in a decode step: tens of milliseconds in one call.
TEST(Device, TimedLongOpsLetTheServingThreadLookAround) {
  auto device = open_device("cpu", {.num_threads = 2}).value();
  constexpr int32_t kRows = 3;
  constexpr BlobShape kShape{.hidden = 4096, .intermediate = 14336};
  OpLimits limits;
  limits.rows = kRows;
  limits.choices = 1;
  limits.num_experts = 1;
  limits.hidden = kShape.hidden;
  limits.intermediate = kShape.intermediate;
  ASSERT_TRUE(device->host_ops().reserve(limits).ok());
  const Buffer memory = device->allocate(kShape.bytes() + (4 << 20), Memory::kDevice).value();
  const std::byte* const blob = memory.data();
  std::byte* rest = memory.data() + kShape.bytes();
  const std::vector<int32_t> offsets{0, kRows};
  const std::vector<int32_t> pairs{0, 1, 2};
  ExpertFfn ffn;
  ffn.x = {reinterpret_cast<const Bf16*>(rest), kRows, kShape.hidden};
  ffn.shape = kShape;
  ffn.blobs = {&blob, 1};
  ffn.offsets = offsets.data();
  ffn.pairs = pairs.data();
  ffn.pairs_max = kRows;
  ffn.scratch = {reinterpret_cast<Bf16*>(rest + (1 << 20)), kRows, kShape.intermediate};
  ffn.y = {reinterpret_cast<float*>(rest + (2 << 20)), kRows, kShape.hidden};

  const std::thread::id caller = std::this_thread::get_id();
  std::vector<Clock::time_point> ticks;
  device->on_host_work([&] {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    ticks.push_back(Clock::now());
  });
  // A busy machine keeps the thread from its turns: in the best of some runs a quarter of them is what it has to get.
  double turns_had = 0.0;
  for (int run = 0; run < 10 && turns_had < 0.25; ++run) {
    ticks.clear();
    const double begin_us = thread_cpu_us();
    device->host_ops().expert_ffn(ffn, device->host_stream());
    turns_had = static_cast<double>(ticks.size()) * 100.0 / (thread_cpu_us() - begin_us);
    for (size_t i = 1; i < ticks.size(); ++i) EXPECT_GE(ticks[i] - ticks[i - 1], std::chrono::microseconds(90));
  }
  EXPECT_GE(turns_had, 0.25);

  const size_t num_ticks = ticks.size();
  device->on_host_work({});
  device->host_ops().expert_ffn(ffn, device->host_stream());
  EXPECT_EQ(ticks.size(), num_ticks);
}

}  // namespace
}  // namespace moed
