#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "scheduler/block_allocator.h"
#include "scheduler/prefix_cache.h"

namespace moed {
namespace {

TEST(BlockAllocator, HandsOutEachBlockOnce) {
  BlockAllocator allocator(3);
  std::vector<bool> seen(3, false);
  for (int i = 0; i < 3; ++i) {
    const auto taken = allocator.take();
    ASSERT_TRUE(taken.has_value());
    EXPECT_FALSE(taken->was_cached);
    EXPECT_FALSE(seen[taken->block]);
    seen[taken->block] = true;
  }
  EXPECT_FALSE(allocator.take().has_value());
  EXPECT_EQ(allocator.num_used(), 3);
  allocator.check_invariants();
}

TEST(BlockAllocator, CachedBlocksGoLastAndOldestFirst) {
  BlockAllocator allocator(4);
  for (int i = 0; i < 4; ++i) allocator.take();
  allocator.release(2, true);
  allocator.release(0, true);
  allocator.release(3, false);
  allocator.release(1, true);
  allocator.share(2);  // in use again, then released: the youngest now
  allocator.release(2, true);
  EXPECT_EQ(allocator.num_free(), 4);
  for (const auto& [ahead, block] : {std::pair{0, 0}, {1, 1}, {2, 2}, {3, -1}, {9, -1}}) {
    EXPECT_EQ(allocator.coming(ahead), block) << ahead;  // 3 is blank
  }
  std::vector<int32_t> order;
  while (const auto taken = allocator.take()) order.push_back(taken->block);
  EXPECT_EQ(order, (std::vector<int32_t>{3, 0, 1, 2}));
}

TEST(BlockAllocator, SharedBlocksStayUntilTheLastLetsGo) {
  BlockAllocator allocator(1);
  allocator.take();
  allocator.share(0);
  allocator.release(0, false);
  EXPECT_EQ(allocator.num_free(), 0);
  allocator.release(0, false);
  EXPECT_EQ(allocator.num_free(), 1);
}

TEST(BlockAllocatorDeathTest, ABlockIsNotFreedTwice) {
  BlockAllocator allocator(1);
  allocator.take();
  allocator.release(0, false);
  EXPECT_DEATH(allocator.release(0, false), "free already");
  EXPECT_DEATH(allocator.share(0), "blank");
}

TEST(BlockAllocator, RandomUseKeepsItsInvariants) {
  std::mt19937 random(7);
  BlockAllocator allocator(20);
  std::vector<int32_t> held;
  for (int i = 0; i < 20'000; ++i) {
    const auto roll = random() % 3;
    if (roll == 0 || held.empty()) {
      if (const auto taken = allocator.take()) held.push_back(taken->block);
    } else if (roll == 1) {
      held.push_back(held[random() % held.size()]);
      allocator.share(held.back());
    } else {
      std::swap(held[random() % held.size()], held.back());
      allocator.release(held.back(), random() % 2 == 0);
      held.pop_back();
    }
    if (i % 16 == 0) allocator.check_invariants();
  }
}

TEST(PrefixCache, AnEntryStandsForAllTokensBeforeItToo) {
  PrefixCache cache(8, 2);
  const std::vector<int32_t> a{1, 2}, b{3, 4}, c{5, 6};
  const auto entry_a = cache.insert(PrefixCache::kRoot, a, 0);
  const auto entry_b = cache.insert(PrefixCache::kRoot, b, 1);
  cache.insert(entry_a, c, 2);
  EXPECT_EQ(cache.find(PrefixCache::kRoot, a), 0);
  EXPECT_EQ(cache.find(entry_a, c), 2);
  EXPECT_EQ(cache.find(entry_b, c), PrefixCache::kNoBlock);
  EXPECT_EQ(cache.find(PrefixCache::kRoot, c), PrefixCache::kNoBlock);
}

TEST(PrefixCache, TheFirstHolderStays) {
  PrefixCache cache(8, 2);
  const std::vector<int32_t> a{1, 2};
  const auto entry = cache.insert(PrefixCache::kRoot, a, 3);
  EXPECT_EQ(cache.insert(PrefixCache::kRoot, a, 5), entry);
  EXPECT_TRUE(cache.contains(3));
  EXPECT_FALSE(cache.contains(5));
}

TEST(PrefixCache, WhatStoodBehindAnErasedEntryIsNotFoundUnderItsSuccessor) {
  PrefixCache cache(8, 2);
  const std::vector<int32_t> a{1, 2}, b{3, 4};
  const auto old = cache.insert(PrefixCache::kRoot, a, 0);
  cache.insert(old, b, 1);
  cache.erase(0);
  EXPECT_EQ(cache.find(PrefixCache::kRoot, a), PrefixCache::kNoBlock);
  const auto renewed = cache.insert(PrefixCache::kRoot, a, 2);
  EXPECT_NE(renewed, old);
  EXPECT_EQ(cache.find(renewed, b), PrefixCache::kNoBlock);
  EXPECT_EQ(cache.find(old, b), 1);
}

// Few buckets' worth of blocks and tokens from a tiny alphabet: chains are long and are cut anywhere.
TEST(PrefixCache, AgreesWithALinearSearch) {
  constexpr int32_t kBlocks = 32;
  std::mt19937 random(11);
  PrefixCache cache(kBlocks, 1);
  struct Known {
    PrefixCache::EntryId before;
    int32_t token;
    int32_t block;
  };
  std::vector<Known> known;
  for (int i = 0; i < 20'000; ++i) {
    const PrefixCache::EntryId before = random() % 5;
    const std::vector<int32_t> token{static_cast<int32_t>(random() % 6)};
    const auto held =
        std::ranges::find_if(known, [&](const Known& k) { return k.before == before && k.token == token[0]; });
    EXPECT_EQ(cache.find(before, token), held == known.end() ? PrefixCache::kNoBlock : held->block);
    const auto block = static_cast<int32_t>(random() % kBlocks);
    if (cache.contains(block)) {
      cache.erase(block);
      std::erase_if(known, [&](const Known& k) { return k.block == block; });
    } else {
      cache.insert(before, token, block);
      if (held == known.end()) known.push_back({before, token[0], block});
    }
  }
}

}  // namespace
}  // namespace moed
