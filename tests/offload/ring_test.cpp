#include "offload/ring.h"

#include <random>

#include <gtest/gtest.h>

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
          ring->routed(id.layer, counts);
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

INSTANTIATE_TEST_SUITE_P(Devices, RingOn, testing::Values("cpu", "emulated"));

}  // namespace
}  // namespace moed
