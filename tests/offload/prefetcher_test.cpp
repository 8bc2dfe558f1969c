#include "offload/prefetcher.h"

#include <algorithm>
#include <random>

#include <gtest/gtest.h>

#include "tests/offload/ring_box.h"

namespace moed {
namespace {

constexpr int32_t kExperts = 70;  // more than a word of bits

class PrefetcherTest : public testing::Test {
 protected:
  PrefetcherTest()
      : model_(RingBox::make_model({.num_layers = 2, .num_experts = kExperts})),
        index_(model_.config),
        cache_(kExperts, std::vector<int32_t>{10, 10}, std::vector<uint8_t>(2 * kExperts)),
        prefetcher_(index_, cache_) {}

  // Rows choose five experts; the lookahead named so many of those, and others.
  void visit(int num_right) {
    std::vector<int32_t> experts(kExperts);
    for (int32_t i = 0; i < kExperts; ++i) experts[i] = i;
    std::shuffle(experts.begin(), experts.end(), random_);
    std::vector<int32_t> chosen(kExperts);
    std::vector<int32_t> named(kExperts);
    for (int i = 0; i < 5; ++i) chosen[experts[i]] = 1;
    for (int i = 5 - num_right; i < 10 - num_right; ++i) named[experts[i]] = 1;
    if (prefetcher_.wants_prediction(1)) {
      ++num_asked_;
      prefetcher_.predicted(1, RowsId(), named, nothing_);
    }
    prefetcher_.routed(1, RowsId(), chosen);
    cache_.routed(1, chosen);
  }

  const Model model_;
  const ExpertIndex index_;
  ExpertCache cache_;
  Prefetcher prefetcher_;
  const ExpertBits nothing_ = ExpertBits(num_words(kExperts));
  std::mt19937_64 random_{5};
  int num_asked_ = 0;
};

TEST_F(PrefetcherTest, TrustsTheLookaheadWhileItWins) {
  EXPECT_FALSE(prefetcher_.trusts(1));
  for (int i = 0; i < 40; ++i) visit(4);
  EXPECT_TRUE(prefetcher_.trusts(1));
  EXPECT_FALSE(prefetcher_.trusts(0));
  for (int i = 0; i < 60; ++i) visit(1);
  EXPECT_FALSE(prefetcher_.trusts(1));
  // It is asked again now and then, and may win again.
  num_asked_ = 0;
  for (int i = 0; i < 320; ++i) visit(1);
  EXPECT_EQ(num_asked_, 10);
  for (int i = 0; i < 2000; ++i) visit(5);
  EXPECT_TRUE(prefetcher_.trusts(1));
}

TEST_F(PrefetcherTest, WhatIsPopularAnywayNeedsNoLookahead) {
  std::vector<int32_t> chosen(kExperts);
  for (int32_t expert = 20; expert < 25; ++expert) chosen[expert] = 1;
  cache_.routed(1, chosen);
  for (int i = 0; i < 100; ++i) {
    if (prefetcher_.wants_prediction(1)) prefetcher_.predicted(1, RowsId(), chosen, nothing_);
    prefetcher_.routed(1, RowsId(), chosen);
    cache_.routed(1, chosen);
    EXPECT_FALSE(prefetcher_.trusts(1));
  }
}

// Two halves of one pass and one of another, each foreseen rightly, that take turns in a layer in another order than
// they were foreseen in.
TEST_F(PrefetcherTest, WhatWasForeseenIsComparedWithWhatTheSameRowsChose) {
  const RowsId ids[] = {{0, 0}, {1, 0}, {0, 1}};
  for (int i = 0; i < 40; ++i) {
    std::vector<std::vector<int32_t>> chosen(3, std::vector<int32_t>(kExperts));
    for (auto& counts : chosen) counts[random_() % kExperts] = 1;
    for (const int k : {0, 1, 2}) prefetcher_.predicted(1, ids[k], chosen[k], nothing_);
    for (const int k : {2, 0, 1}) {
      prefetcher_.routed(1, ids[k], chosen[k]);
      cache_.routed(1, chosen[k]);
    }
  }
  EXPECT_TRUE(prefetcher_.trusts(1));
}

TEST_F(PrefetcherTest, LookaheadThenListThenPopularity) {
  for (int i = 0; i < 40; ++i) visit(5);
  ASSERT_TRUE(prefetcher_.trusts(1));
  std::vector<int32_t> named(kExperts);
  named[66] = 2;
  named[3] = 1;
  named[4] = 7;
  named[5] = 9;
  ExpertBits present = nothing_;
  set_bit(present, 5);
  prefetcher_.predicted(1, RowsId(), named, present);
  const std::vector<ExpertId> wanted = {{0, 9}, {1, 4}, {0, 2}};
  prefetcher_.list(wanted);
  prefetcher_.streamed();
  std::vector<int32_t> taken;
  const auto absent = [&](int32_t expert) { return std::find(taken.begin(), taken.end(), expert) == taken.end(); };
  for (int i = 0; i < 5; ++i) taken.push_back(prefetcher_.next(absent));
  EXPECT_EQ(taken, (std::vector<int32_t>{kExperts + 4, kExperts + 66, kExperts + 3, 9, 2}));
  EXPECT_TRUE(prefetcher_.named(9));
  EXPECT_TRUE(prefetcher_.named(kExperts + 66));
  EXPECT_FALSE(prefetcher_.named(kExperts + 5));
  // The rest is what the cache would keep: of layer 1 alone, since nobody ever chose one of layer 0.
  prefetcher_.routed(0, RowsId(), std::vector<int32_t>(kExperts));
  prefetcher_.list({});
  for (int32_t next = prefetcher_.next(absent); next >= 0; next = prefetcher_.next(absent)) {
    EXPECT_GE(next, kExperts);
    EXPECT_TRUE(cache_.keeps(1, next - kExperts));
    taken.push_back(next);
    ASSERT_LE(taken.size(), 20U);
  }
  EXPECT_GT(taken.size(), 8U);
}

// Against a sort.
TEST(TopExperts, AreTheBestOfThoseAllowed) {
  std::mt19937_64 random(9);
  for (int round = 0; round < 4000; ++round) {
    const auto below = [&](int32_t n) { return static_cast<int32_t>(random() % static_cast<uint64_t>(n)); };
    const int32_t num_experts = 1 + below(130);
    const int32_t count = below(num_experts + 1);
    std::vector<float> scores(num_experts);
    ExpertBits excluded(num_words(num_experts));
    ExpertBits preferred(num_words(num_experts));
    std::vector<int32_t> order;
    for (int32_t expert = 0; expert < num_experts; ++expert) {
      scores[expert] = static_cast<float>(below(6)) * 0.37F;
      if (below(5) == 0) set_bit(excluded, expert);
      if (below(3) == 0) set_bit(preferred, expert);
      if (!has_bit(excluded, expert)) order.push_back(expert);
    }
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      if (scores[a] != scores[b]) return scores[a] > scores[b];
      return has_bit(preferred, a) && !has_bit(preferred, b);
    });
    order.resize(std::min(order.size(), static_cast<size_t>(count)));
    ExpertBits wanted(num_words(num_experts));
    for (const int32_t expert : order) set_bit(wanted, expert);
    TopExperts top(num_experts);
    // Guesses: none, right, wrong by a few, anything.
    ExpertBits guess = round % 4 == 1 || round % 4 == 2 ? wanted : ExpertBits(num_words(num_experts));
    const int32_t num_wrong = round % 4 == 2 ? 2 : round % 4 == 3 ? num_experts : 0;
    for (int32_t i = 0; i < num_wrong; ++i) guess[below(num_experts) / 64] ^= uint64_t{1} << below(num_experts) % 64;
    top.choose(scores, excluded, preferred, count, guess);
    ASSERT_EQ(guess, wanted) << "round " << round;
    // One that goes for one that comes leaves their number as it was.
    const auto swapped = [&](bool holds) {
      for (int32_t expert = below(num_experts), left = num_experts; left > 0;
           --left, expert = (expert + 1) % num_experts)
        if (has_bit(wanted, expert) == holds) return expert;
      return -1;
    };
    for (const bool holds : {true, false}) {
      if (const int32_t expert = swapped(holds); expert >= 0) guess[expert / 64] ^= uint64_t{1} << expert % 64;
    }
    top.choose(scores, excluded, preferred, count, guess);
    ASSERT_EQ(guess, wanted) << "round " << round;
  }
}

}  // namespace
}  // namespace moed
