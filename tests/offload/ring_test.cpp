#include "offload/ring.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <random>

#include <gtest/gtest.h>

#include "tests/offload/fake_device.h"
#include "tests/offload/ring_box.h"

namespace moed {
namespace {

class RingOn : public testing::TestWithParam<const char*> {};

// Acquires the expert, waiting as long as it takes.
Lease must_acquire(ExpertRing& ring, ExpertId id) {
  std::optional<Lease> lease = ring.acquire(id);
  while (!lease.has_value()) {
    ring.wait();
    lease = ring.acquire(id);
  }
  ring.pump();
  while (!ring.submitted(*lease)) ring.wait();
  return std::move(*lease);
}

void read_and_retire(ExpertRing& ring, Reader& reader, ExpertId id) {
  std::vector<Lease> leases;
  leases.push_back(must_acquire(ring, id));
  reader.read(ring, leases.back());
  ring.retire(leases, reader.stream());
  EXPECT_TRUE(leases.empty());
}

TEST_P(RingOn, EveryExpertComesThroughTheSmallestRing) {
  RingBox box({}, GetParam());
  for (const int64_t packet_bytes : {256, 1000, 1 << 20}) {
    const auto ring = box.ring({.num_slots = 1, .staging_slots = 1, .resident = {}, .packet_bytes = packet_bytes});
    Reader reader(box);
    for (int pass = 0; pass < 2; ++pass) {
      for (int32_t layer = 0; layer < 3; ++layer) {
        for (int32_t expert = 0; expert < 5; ++expert) read_and_retire(*ring, reader, {layer, expert});
      }
    }
    EXPECT_EQ(reader.check(), "");
    EXPECT_EQ(ring->stats().misses, 30);
    EXPECT_EQ(ring->stats().hits, 0);
    EXPECT_EQ(ring->stats().bytes_copied, 30 * box.store.shape().bytes());
  }
}

TEST_P(RingOn, AScanLeavesTheCacheInPlace) {
  RingBox box({}, GetParam());
  const auto ring = box.ring({.num_slots = 9, .staging_slots = 2, .resident = {{1, 4}}});
  Reader reader(box);
  for (int pass = 0; pass < 10; ++pass) {
    for (int32_t layer = 0; layer < 3; ++layer) {
      for (int32_t expert = 0; expert < 5; ++expert) read_and_retire(*ring, reader, {layer, expert});
    }
  }
  EXPECT_EQ(reader.check(), "");
  // 8 experts pass through two slots, the resident one and six others are there: all that can be.
  EXPECT_GE(ring->stats().hits, 10 + 9 * 6);
}

TEST_P(RingOn, RandomLeasesOfTwoReaders) {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    RingBox box({.num_layers = 4, .num_experts = 4, .dense_layers = "2"}, GetParam(), seed);
    std::mt19937_64 random(seed);
    const auto below = [&](int32_t n) { return static_cast<int32_t>(random() % static_cast<uint64_t>(n)); };
    RingConfig config;
    config.staging_slots = 2 + below(3);
    if (below(2) == 0) config.resident = {{0, 1}, {3, 3}};
    config.num_slots = std::min(12, config.staging_slots + static_cast<int32_t>(config.resident.size()) + below(7));
    config.cache = below(4) != 0;
    config.packet_bytes = 256 + below(2000);
    const auto ring = box.ring(config);
    std::vector<Reader> readers;
    readers.emplace_back(box);
    readers.emplace_back(box);
    std::array<std::vector<Lease>, 2> held;
    std::vector<ExpertId> wanted;
    std::vector<int32_t> counts(4);
    int64_t reads = 0;
    for (int step = 0; step < 400; ++step) {
      const ExpertId id = {std::array{0, 1, 3}[below(3)], below(4)};
      const int user = below(2);
      Reader& reader = readers[user];
      std::vector<Lease>& leases = held[user];
      switch (below(8)) {
        case 0:
          wanted.resize(below(10));
          for (ExpertId& each : wanted) each = {std::array{0, 1, 3}[below(3)], below(4)};
          ring->prefetch(wanted);
          break;
        case 1:
          for (int32_t& count : counts) count = std::max(0, below(6) - 3);
          ring->routed(id.layer, RowsId(), counts);
          break;
        case 2:
          ring->retire(leases, reader.stream());
          break;
        case 3: {
          const size_t before = leases.size();
          ring->acquire_present(id.layer, leases);
          for (size_t i = before; i < leases.size(); ++i) reader.read(*ring, leases[i]), ++reads;
          break;
        }
        case 4:
          ring->pump();
          break;
        case 5:
          if (std::optional<Lease> lease = ring->acquire(id)) {
            if (ring->submitted(*lease)) reader.read(*ring, *lease), ++reads;
            leases.push_back(std::move(*lease));
          }
          break;
        default:
          for (int i = 0; i < 2; ++i) ring->retire(held[i], readers[i].stream());
          read_and_retire(*ring, reader, id);
          ++reads;
      }
      if (step % 16 == 15) {
        for (Reader& each : readers) ASSERT_EQ(each.check(), "") << "seed " << seed << ", step " << step;
      }
    }
    for (int i = 0; i < 2; ++i) ring->retire(held[i], readers[i].stream());
    EXPECT_GT(reads, 100);
  }
}

TEST_P(RingOn, PrefetchedExpertsAreThereBeforeTheyAreAskedFor) {
  RingBox box({}, GetParam());
  const auto ring = box.ring({.num_slots = 4, .staging_slots = 4, .resident = {}, .packet_bytes = 500});
  Reader reader(box);
  const std::vector<ExpertId> wanted = {{2, 1}, {2, 3}};
  ring->prefetch(wanted);
  std::vector<Lease> leases;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (leases.size() < 2 && std::chrono::steady_clock::now() < end) {
    ring->retire(leases, reader.stream());
    ring->pump();
    ring->acquire_present(2, leases);
  }
  ASSERT_EQ(leases.size(), 2U);
  for (const Lease& lease : leases) reader.read(*ring, lease);
  ring->routed(2, RowsId(), std::vector<int32_t>{0, 1, 0, 0, 0});
  ring->retire(leases, reader.stream());
  EXPECT_EQ(reader.check(), "");
  EXPECT_EQ(ring->stats().prefetched, 2);
  EXPECT_EQ(ring->stats().hits, 1);
  EXPECT_EQ(ring->stats().misses, 0);
  // The other is overwritten before any row has wanted it.
  for (int32_t expert = 0; expert < 5; ++expert) read_and_retire(*ring, reader, {0, expert});
  EXPECT_EQ(ring->stats().prefetched_unused, 1);
  EXPECT_EQ(reader.check(), "");
}

TEST_P(RingOn, RoutedMissesComeBeforePrefetches) {
  RingBox box({}, GetParam());
  const auto ring = box.ring({.num_slots = 6, .staging_slots = 6, .resident = {}, .packet_bytes = 256});
  Reader reader(box);
  const std::vector<ExpertId> wanted = {{2, 0}, {2, 1}, {2, 2}, {2, 3}};
  ring->prefetch(wanted);
  ring->pump();
  std::vector<Lease> leases;
  leases.push_back(*ring->acquire({0, 4}));
  const int64_t before = ring->stats().bytes_copied;
  while (!ring->submitted(leases.back())) ring->wait();
  // Two packets may have set out before.
  EXPECT_LE(ring->stats().bytes_copied - before, box.store.shape().bytes() + 256);
  reader.read(*ring, leases.back());
  ring->retire(leases, reader.stream());
  EXPECT_EQ(reader.check(), "");
}

TEST_P(RingOn, WithoutACacheItIsARing) {
  RingBox box({}, GetParam());
  const auto ring = box.ring({.num_slots = 6, .staging_slots = 2, .resident = {}, .cache = false});
  Reader reader(box);
  for (int pass = 0; pass < 4; ++pass) {
    for (int32_t layer = 0; layer < 3; ++layer) {
      for (int32_t expert = 0; expert < 5; ++expert) read_and_retire(*ring, reader, {layer, expert});
    }
  }
  EXPECT_EQ(reader.check(), "");
  EXPECT_EQ(ring->stats().hits, 0);
  EXPECT_EQ(ring->stats().bytes_copied, 60 * box.store.shape().bytes());
}

TEST_P(RingOn, LeasesHoldAndGoBack) {
  RingBox box({}, GetParam());
  const auto ring = box.ring({.num_slots = 2, .staging_slots = 2, .resident = {}});
  Reader reader(box);
  std::vector<Lease> leases;
  leases.push_back(*ring->acquire({0, 0}));
  leases.push_back(*ring->acquire({0, 1}));
  EXPECT_FALSE(ring->acquire({0, 2}).has_value());
  // The same expert has room.
  leases.push_back(*ring->acquire({0, 1}));
  EXPECT_EQ(leases[1].slot(), leases[2].slot());
  // Nothing was copied yet: a cancelled lease costs nothing.
  ring->retire(leases, reader.stream());
  ring->pump();
  EXPECT_EQ(ring->stats().bytes_copied, 0);
  read_and_retire(*ring, reader, {0, 2});
  EXPECT_EQ(reader.check(), "");
}

INSTANTIATE_TEST_SUITE_P(Devices, RingOn, testing::Values("cpu", "emulated"));

TEST(Ring, NeverReadsOrCopiesMoreThanItMay) {
  RingBox box({.num_layers = 2, .num_experts = 8});
  auto owned = std::make_unique<FakeDevice>(FakeDevice::Options{.looks = 7}, std::move(box.device));
  const FakeDevice& device = *owned;
  box.device = std::move(owned);
  box.reader = box.device->make_stream();
  {
    const auto ring = box.ring({.num_slots = 4, .staging_slots = 2, .resident = {}, .packet_bytes = 300});
    Reader reader(box);
    for (int32_t i = 0; i < 64; ++i) read_and_retire(*ring, reader, {i / 3 % 2, i * 5 % 8});
    EXPECT_EQ(reader.check(), "");
    EXPECT_LE(device.packet_max_bytes(), 300);
    EXPECT_LE(device.packets_max(), 2);
    EXPECT_EQ(device.pins().size(), 1U);
    EXPECT_EQ(device.bounce_bytes(), 0);
  }
  box.reader.reset();
  EXPECT_TRUE(device.pins().empty());
}

TEST(Ring, WherePinningIsRefusedPacketsBounce) {
  RingBox box({.num_layers = 2, .num_experts = 8});
  auto owned = std::make_unique<FakeDevice>(FakeDevice::Options{.looks = 3, .pins_max = 2}, std::move(box.device));
  const FakeDevice& device = *owned;
  box.device = std::move(owned);
  box.reader = box.device->make_stream();
  const int64_t blob_bytes = box.store.shape().bytes();
  HostPins pins(*box.device, 6 * (blob_bytes + 63));
  box.store.pin(pins);
  EXPECT_EQ(pins.bytes(), box.store.blobs_bytes() / 16 * 12);
  {
    const auto ring =
        box.ring({.num_slots = 3, .staging_slots = 2, .resident = {}, .packet_bytes = 1000, .pins = &pins});
    EXPECT_EQ(device.bounce_bytes(), 2000);
    EXPECT_NE(ring->description().find("limit on locked memory"), std::string::npos) << ring->description();
    Reader reader(box);
    for (int32_t i = 0; i < 48; ++i) read_and_retire(*ring, reader, {i / 8 % 2, i % 8});
    EXPECT_EQ(reader.check(), "");
  }
  box.reader.reset();
}

TEST(Ring, LookaheadIsTrustedWhileItWins) {
  RingBox box({.num_layers = 4, .num_experts = 32}, "cpu");
  const auto ring = box.ring({.num_slots = 32, .staging_slots = 8, .resident = {}});
  Reader reader(box);
  std::mt19937_64 random(3);
  const auto play = [&](int num_passes, bool right) {
    for (int pass = 0; pass < num_passes; ++pass) {
      for (int32_t layer = 0; layer < 4; ++layer) {
        std::vector<int32_t> counts(32);
        std::vector<int32_t> said(32);
        for (int i = 0; i < 4; ++i) counts[random() % 32] = 1;
        for (int i = 0; i < 4; ++i) said[random() % 32] = 1;
        if (ring->wants_prediction(layer)) ring->predicted(layer, RowsId(), right ? counts : said);
        for (int i = 0; i < 20; ++i) ring->pump();
        std::vector<Lease> leases;
        ring->acquire_present(layer, leases);
        for (const Lease& lease : leases) counts[lease.id().expert] *= 2;
        ring->retire(leases, reader.stream());
        ring->routed(layer, RowsId(), counts);
        for (int32_t expert = 0; expert < 32; ++expert) {
          if (counts[expert] == 1) read_and_retire(*ring, reader, {layer, expert});
        }
        EXPECT_EQ(reader.check(), "");
      }
    }
  };
  play(100, true);
  const RingStats trusted = ring->stats();
  EXPECT_GT(trusted.hits, 3 * trusted.misses);
  play(40, false);
  // Popular experts may still be fetched.
  const int64_t prefetched = ring->stats().prefetched;
  play(100, false);
  EXPECT_LT(ring->stats().prefetched - prefetched, trusted.prefetched / 4);
}

TEST(Ring, TellsWhatIsWrongWithItsConfiguration) {
  const RingBox::Shape shape = {.num_layers = 3, .num_experts = 5, .dense_layers = "1"};
  RingBox box(shape);
  const auto message = [&](const RingConfig& config) {
    const auto ring = box.make(config);
    return ring.ok() ? std::string() : ring.status().message();
  };
  EXPECT_EQ(message({.num_slots = 0}), "ring: num_slots must be between 2 and 10, not 0");
  EXPECT_EQ(message({.num_slots = -1}), "ring: num_slots must be between 2 and 10, not -1");
  EXPECT_EQ(message({.num_slots = 11}), "ring: num_slots must be between 2 and 10, not 11");
  EXPECT_EQ(message({.num_slots = 3, .resident = {{0, 0}, {2, 4}}}), "ring: num_slots must be between 4 and 10, not 3");
  EXPECT_EQ(message({.num_slots = 4, .staging_slots = 0}), "ring: staging_slots must be between 1 and 10, not 0");
  EXPECT_EQ(message({.num_slots = 4, .resident = {{0, 5}}}), "ring: resident: the model has no layer 0, expert 5");
  EXPECT_EQ(message({.num_slots = 4, .resident = {{1, 0}}}), "ring: resident: the model has no layer 1, expert 0");
  EXPECT_EQ(message({.num_slots = 4, .resident = {{-1, 0}}}), "ring: resident: the model has no layer -1, expert 0");
  EXPECT_EQ(message({.num_slots = 6, .resident = {{0, 1}, {0, 1}}}),
            "ring: resident: layer 0, expert 1 is named twice");
  EXPECT_EQ(message({.num_slots = 4, .packet_bytes = 1}),
            "ring: packet_bytes must be between 256 and 1073741824, not 1");
  EXPECT_EQ(message({.num_slots = 10}), "");
}

TEST(Ring, LargerThanTheDeviceIsRefusedWithTheArithmetic) {
  RingBox box({.num_layers = 2, .num_experts = 8, .hidden = 512, .intermediate = 512}, "emulated", 0, 0.01);
  const auto ring = box.make({.num_slots = 16});
  ASSERT_FALSE(ring.ok());
  EXPECT_EQ(ring.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(ring.status().message().find("16 slots of 1572864 bytes, 25165824 in all"), std::string::npos)
      << ring.status().message();
}

TEST(RingDeathTest, WhatMustNotHappen) {
  RingBox box({});
  const auto ring = box.ring({.num_slots = 4, .resident = {}});
  EXPECT_DEATH(ring->acquire({0, 5}), "layer 0, expert 5");
  EXPECT_DEATH({ const std::optional<Lease> lease = ring->acquire({0, 1}); }, "layer 0, expert 1 was not retired");
  EXPECT_DEATH(ring->wait(), "nothing is under way");
  EXPECT_DEATH(ring->routed(0, RowsId(), std::vector<int32_t>(4)), "layer 0, 4 counts");
}

}  // namespace
}  // namespace moed
