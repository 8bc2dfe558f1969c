#include "kernels/device.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "base/huge_pages.h"
#include "kernels/ops.h"
#include "tests/support/test_device.h"

namespace moed {
namespace {

// What the engine asks of a device with memory of its own, without kernels of a model.
class GpuDevice : public testing::Test {
 protected:
  static std::unique_ptr<Device> open(double memory_gib) {
    auto device = open_device(test_device("emulated"), {.num_threads = 1, .memory_gib = memory_gib});
    EXPECT_TRUE(device.ok()) << device.status().message();
    return device.ok() ? std::move(*device) : nullptr;
  }
  void SetUp() override {
    device_ = open(1.0);
    ASSERT_NE(device_, nullptr);
    ASSERT_TRUE(device_->ops().reserve({.rows = 16, .hidden = 64, .choices = 1}).ok());
  }
  void join(Stream& stream) {
    const auto done = device_->make_event();
    stream.record(*done);
    while (!done->done()) {
    }
    const Status joined = done->join();
    ASSERT_TRUE(joined.ok()) << joined.message();
  }
  std::unique_ptr<Device> device_;
};

TEST_F(GpuDevice, MemoryIsZeroedAlignedAndCapped) {
  for (const Memory memory : {Memory::kDevice, Memory::kPinned, Memory::kMapped}) {
    const Buffer buffer = device_->allocate(4097, memory).value();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 0U);
    const Buffer back = device_->allocate(4097, Memory::kPinned).value();
    std::memset(back.data(), 1, 4097);
    const auto stream = device_->make_stream();
    stream->copy(back.data(), buffer.data(), 4097);
    join(*stream);
    EXPECT_EQ(std::count(back.data(), back.data() + 4097, std::byte{0}), 4097);
  }
  EXPECT_EQ(device_->memory_bytes(), int64_t{1} << 30);
  for (int round = 0; round < 3; ++round) {
    const Buffer most = device_->allocate(int64_t{900} << 20, Memory::kDevice).value();
    const auto more = device_->allocate(int64_t{200} << 20, Memory::kDevice);
    ASSERT_FALSE(more.ok());
    EXPECT_EQ(more.status().code(), StatusCode::kResourceExhausted);
  }
  EXPECT_FALSE(device_->allocate(-1, Memory::kDevice).ok());
  EXPECT_EQ(device_->allocate(0, Memory::kDevice).value().data(), nullptr);
}

// Each stream adds nothing of its own: a value travels through all of them only in the order that events give.
TEST_F(GpuDevice, EventsOrderStreams) {
  constexpr int kStreams = 4;
  constexpr int kHops = 200;
  constexpr int64_t kBytes = 1 << 16;
  std::vector<std::unique_ptr<Stream>> streams;
  std::vector<std::unique_ptr<Event>> events;
  std::vector<Buffer> hops;
  for (int i = 0; i < kStreams; ++i) streams.push_back(device_->make_stream());
  const Buffer from = device_->allocate(kBytes, Memory::kPinned).value();
  std::iota(from.as<uint16_t>(), from.as<uint16_t>() + kBytes / 2, uint16_t{7});
  const std::byte* last = from.data();
  for (int i = 0; i < kHops; ++i) {
    Stream& stream = *streams[i * 3 % kStreams];
    if (i > 0) stream.wait(*events.back());
    hops.push_back(device_->allocate(kBytes, Memory::kDevice).value());
    stream.copy(hops.back().data(), last, kBytes);
    last = hops.back().data();
    events.push_back(device_->make_timed_event());
    stream.record(*events.back());
  }
  const Buffer to = device_->allocate(kBytes, Memory::kPinned).value();
  streams[0]->wait(*events.back());
  streams[0]->copy(to.data(), last, kBytes);
  join(*streams[0]);
  EXPECT_EQ(std::memcmp(from.data(), to.data(), kBytes), 0);
  EXPECT_GE(events.back()->us_since(*events.front()), 0.0);
}

// Host memory that was pinned late: copied from, and read in place by a kernel.
TEST_F(GpuDevice, PinnedMemoryIsCopiedAndReadInPlace) {
  HugePages pages = HugePages::allocate(1 << 20).value();
  auto* values = reinterpret_cast<uint16_t*>(pages.data());
  std::iota(values, values + (1 << 19), uint16_t{3});
  for (int round = 0; round < 2; ++round) {
    ASSERT_TRUE(device_->pin(pages.data(), pages.size()).ok());
    const auto stream = device_->make_stream();
    const Buffer copied = device_->allocate(1 << 20, Memory::kDevice).value();
    const Buffer moved = device_->allocate(16 * 64 * 2, Memory::kMapped).value();
    stream->copy(copied.data(), pages.data(), 1 << 20);
    device_->ops().move({copied.as<Bf16>(), 16, 64}, {moved.as<Bf16>(), 16, 64}, *stream);
    join(*stream);
    EXPECT_EQ(std::memcmp(moved.data(), pages.data(), 16 * 64 * 2), 0);
    device_->ops().move({reinterpret_cast<const Bf16*>(pages.data() + 4096), 16, 64}, {moved.as<Bf16>(), 16, 64},
                        *stream);
    join(*stream);
    EXPECT_EQ(std::memcmp(moved.data(), pages.data() + 4096, 16 * 64 * 2), 0);
    device_->unpin(pages.data());
  }
}

TEST_F(GpuDevice, BothLanesShareAClock) {
  const auto stream = device_->make_stream();
  const auto first = device_->make_timed_event(), between = device_->make_timed_event(),
             last = device_->make_timed_event();
  stream->record(*first);
  ASSERT_TRUE(first->join().ok());
  device_->host_stream().record(*between);
  ASSERT_TRUE(between->done());
  stream->record(*last);
  ASSERT_TRUE(last->join().ok());
  // An event's time is the GPU's, read to half a microsecond; the two clocks were set side by side.
  constexpr double kSlackUs = 2000.0;
  EXPECT_GT(between->us_since(*first), -kSlackUs);
  EXPECT_GT(last->us_since(*between), -kSlackUs);
  EXPECT_NEAR(between->us_since(*first) + last->us_since(*between), last->us_since(*first), kSlackUs);
}

// More than a device sets workspaces aside for, one after the other and at once.
TEST_F(GpuDevice, StreamsComeAndGo) {
  const Buffer from = device_->allocate(16 * 64 * 2, Memory::kMapped).value();
  const Buffer to = device_->allocate(16 * 64 * 2, Memory::kDevice).value();
  for (int round = 0; round < 8; ++round) {
    std::vector<std::unique_ptr<Stream>> streams;
    for (int i = 0; i < 4; ++i) {
      streams.push_back(device_->make_stream());
      device_->ops().move({from.as<Bf16>(), 16, 64}, {to.as<Bf16>(), 16, 64}, *streams.back());
      join(*streams.back());
    }
  }
}

// More than any device has; an emulated one has what it is told to have.
TEST(GpuMemory, ACapAboveWhatThereIsCapsNothing) {
  const auto device = open_device(test_device("emulated"), {.num_threads = 1, .memory_gib = 2000.0});
  ASSERT_TRUE(device.ok()) << device.status().message();
  EXPECT_GT((*device)->memory_bytes(), 0);
  EXPECT_LE((*device)->memory_bytes(), int64_t{2000} << 30);
  const auto below = open_device(test_device("emulated"), {.num_threads = 1, .memory_gib = -1.0});
  ASSERT_FALSE(below.ok());
  EXPECT_EQ(below.status().param(), "device_memory_gib") << below.status().message();
}

}  // namespace
}  // namespace moed
