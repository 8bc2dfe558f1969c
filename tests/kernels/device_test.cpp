#include "kernels/device.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <string>

namespace moed {
namespace {

TEST(Device, UnknownDeviceNamesTheKnown) {
  const auto device = open_device("tpu", {});
  ASSERT_FALSE(device.ok());
  EXPECT_EQ(device.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(device.status().message().find("cpu"), std::string::npos) << device.status().message();
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
  const auto begin = device->make_event();
  const auto end = device->make_event();
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

}  // namespace
}  // namespace moed
