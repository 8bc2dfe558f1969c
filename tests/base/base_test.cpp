#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "base/bf16.h"
#include "base/channel.h"
#include "base/function_ref.h"
#include "base/huge_pages.h"
#include "base/status.h"

namespace moed {
namespace {

TEST(Bf16, EveryValueSurvivesTheWayToFloatAndBack) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    Bf16 value;
    value.bits = static_cast<uint16_t>(bits);
    const float wide = static_cast<float>(value);
    if (std::isnan(wide)) {
      ASSERT_TRUE(std::isnan(static_cast<float>(Bf16(wide)))) << bits;
    } else {
      ASSERT_EQ(Bf16(wide).bits, bits);
    }
  }
}

// Against the definition: the nearest of the two neighbours, the even one when both are as near.
TEST(Bf16, RoundsToNearestEven) {
  for (uint32_t high = 0; high < 0x7f7f; high += 3) {  // all finite with a finite successor
    Bf16 below, above;
    below.bits = static_cast<uint16_t>(high);
    above.bits = static_cast<uint16_t>(high + 1);
    const double low_value = static_cast<float>(below);
    const double high_value = static_cast<float>(above);
    for (const uint32_t low : {0U, 1U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU}) {
      const float exact = std::bit_cast<float>(high << 16 | low);
      const double to_low = exact - low_value;
      const double to_high = high_value - exact;
      const bool up = to_high < to_low || (to_high == to_low && (high & 1) == 1);
      ASSERT_EQ(Bf16(exact).bits, up ? high + 1 : high) << exact;
      ASSERT_EQ(Bf16(-exact).bits, (up ? high + 1 : high) | 0x8000) << exact;
    }
  }
}

TEST(Bf16, LimitsAndNan) {
  EXPECT_EQ(Bf16(std::numeric_limits<float>::max()).bits, 0x7f80);  // beyond the largest: infinity
  EXPECT_EQ(Bf16(INFINITY).bits, 0x7f80);
  EXPECT_EQ(Bf16(-INFINITY).bits, 0xff80);
  // A NaN whose payload lies in the bits that are cut must not become infinity.
  EXPECT_TRUE(std::isnan(static_cast<float>(Bf16(std::bit_cast<float>(0x7f800001U)))));
  EXPECT_TRUE(std::isnan(static_cast<float>(Bf16(std::bit_cast<float>(0xffffffffU)))));
}

TEST(Channel, KeepsOrderAndRefusesWhenFull) {
  Channel<std::unique_ptr<int>> channel(2);
  auto a = std::make_unique<int>(1), b = std::make_unique<int>(2), c = std::make_unique<int>(3);
  EXPECT_TRUE(channel.try_send(a));
  EXPECT_TRUE(channel.try_send(b));
  EXPECT_FALSE(channel.try_send(c));
  ASSERT_NE(c, nullptr);  // refused work stays the sender's
  EXPECT_EQ(channel.size(), 2U);
  EXPECT_EQ(**channel.try_receive(), 1);
  EXPECT_TRUE(channel.try_send(c));
  EXPECT_EQ(**channel.try_receive(), 2);
  EXPECT_EQ(**channel.try_receive(), 3);
  EXPECT_FALSE(channel.try_receive().has_value());
}

TEST(Channel, CloseRefusesSendersAndDrainsReceivers) {
  Channel<int> channel(4);
  int value = 7;
  EXPECT_TRUE(channel.try_send(value));
  channel.close();
  EXPECT_FALSE(channel.try_send(value));
  EXPECT_EQ(channel.receive_for(std::chrono::seconds(10)), 7);
  EXPECT_FALSE(channel.receive_for(std::chrono::seconds(10)).has_value());  // at once: closed
}

TEST(Channel, WaitsForASenderButNotForEver) {
  Channel<int> channel(1);
  EXPECT_FALSE(channel.receive_for(std::chrono::milliseconds(5)).has_value());
  std::jthread sender([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    int value = 5;
    channel.try_send(value);
  });
  EXPECT_EQ(channel.receive_for(std::chrono::seconds(30)), 5);
}

TEST(Channel, ManySendersAndReceiversLoseNothing) {
  Channel<int> channel(8);
  constexpr int kEach = 2000;
  std::array<std::set<int>, 2> received;
  {
    std::vector<std::jthread> senders;
    std::vector<std::jthread> receivers;
    for (std::set<int>& mine : received) {
      receivers.emplace_back([&] {
        while (const std::optional<int> value = channel.receive_for(std::chrono::seconds(30))) mine.insert(*value);
      });
    }
    for (int s = 0; s < 3; ++s) {
      senders.emplace_back([&, s] {
        for (int i = 0; i < kEach; ++i) {
          int value = s * kEach + i;
          while (!channel.try_send(value)) std::this_thread::yield();
        }
      });
    }
    senders.clear();
    channel.close();
  }
  EXPECT_EQ(received[0].size() + received[1].size(), 3U * kEach);
  received[0].merge(received[1]);
  EXPECT_EQ(received[0].size(), 3U * kEach);
}

StatusOr<int> half(int value) {
  if (value % 2 != 0) return invalid_argument("odd", "value");
  return value / 2;
}

StatusOr<int> quarter(int value) {
  MOED_ASSIGN_OR_RETURN(const int once, half(value));
  MOED_ASSIGN_OR_RETURN(const int twice, half(once));
  return twice;
}

Status divisible_by_four(int value) {
  MOED_RETURN_IF_ERROR(quarter(value).status());
  return Status();
}

TEST(Status, MacrosPassErrorsOn) {
  EXPECT_EQ(*quarter(12), 3);
  const StatusOr<int> bad = quarter(6);
  ASSERT_FALSE(bad.ok());
  EXPECT_EQ(bad.status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(bad.status().message(), "odd");
  EXPECT_EQ(bad.status().param(), "value");
  EXPECT_TRUE(divisible_by_four(8).ok());
  EXPECT_FALSE(divisible_by_four(9).ok());
}

TEST(Status, ValuesMayBeMoveOnly) {
  StatusOr<std::unique_ptr<int>> owner = std::make_unique<int>(4);
  const std::unique_ptr<int> taken = std::move(owner).value();
  EXPECT_EQ(*taken, 4);
}

TEST(StatusDeathTest, ValueOfAnErrorIsABug) {
  const StatusOr<int> bad = half(1);
  EXPECT_DEATH((void)bad.value(), "odd");
  EXPECT_DEATH((void)Status(StatusCode::kOk, "nothing wrong"), "an error needs an error code");
}

TEST(FunctionRef, CallsWhatItRefersTo) {
  int calls = 0;
  auto add = [&](int by) { return calls += by; };
  const FunctionRef<int(int)> ref = add;
  EXPECT_EQ(ref(2), 2);
  EXPECT_EQ(ref(3), 5);
  EXPECT_EQ(calls, 5);
}

TEST(HugePages, AreZeroedAlignedAndWritable) {
  for (const int64_t bytes : {int64_t{1}, int64_t{4096}, int64_t{2} << 20, (int64_t{5} << 20) + 1}) {
    StatusOr<HugePages> pages = HugePages::allocate(bytes);
    ASSERT_TRUE(pages.ok());
    EXPECT_GE(pages->size(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(pages->data()) % (2 << 20), 0U);
    for (int64_t i = 0; i < pages->size(); i += 4096) ASSERT_EQ(pages->data()[i], std::byte{0});
    std::memset(pages->data(), 0x5a, static_cast<size_t>(pages->size()));
    EXPECT_EQ(pages->data()[pages->size() - 1], std::byte{0x5a});
  }
}

TEST(HugePages, MovesItsOwnership) {
  StatusOr<HugePages> first = HugePages::allocate(100);
  ASSERT_TRUE(first.ok());
  std::byte* const data = first->data();
  HugePages second = std::move(first).value();
  EXPECT_EQ(second.data(), data);
  HugePages third;
  third = std::move(second);
  EXPECT_EQ(third.data(), data);
  third.data()[0] = std::byte{1};
}

// More than this box has: only what is written costs memory.
// No more than ThreadSanitizer leaves in one piece.
TEST(HugePages, ReservesAddresses) {
  StatusOr<HugePages> pages = HugePages::reserve(int64_t{1} << 40);
  ASSERT_TRUE(pages.ok()) << pages.status().message();
  EXPECT_EQ(pages->size(), int64_t{1} << 40);
  pages->data()[int64_t{3} << 38] = std::byte{7};
  EXPECT_EQ(pages->data()[(int64_t{3} << 38) + 1], std::byte{0});
}

TEST(HugePages, NothingAndTooMuch) {
  EXPECT_EQ(HugePages::allocate(0)->size(), 0);
  const StatusOr<HugePages> huge = HugePages::allocate(int64_t{1} << 60);
  ASSERT_FALSE(huge.ok());
  EXPECT_EQ(huge.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(huge.status().message().find("1152921504606846976 bytes"), std::string::npos);
}

}  // namespace
}  // namespace moed
