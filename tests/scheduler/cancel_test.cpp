#include <gtest/gtest.h>

#include <algorithm>

#include "tests/scheduler/expectations.h"
#include "tests/scheduler/harness.h"

namespace moed {
namespace {

TEST(Scheduler, CancelInTheQueue) {
  SchedulerConfig config = small_config();
  config.sequences_max = 1;
  Harness harness(config);
  ASSERT_TRUE(harness.add(make_spec(1, make_prompt(4, 1), 4)).ok());
  ASSERT_TRUE(harness.run(kInteractive));
  ASSERT_TRUE(harness.add(make_spec(2, make_prompt(4, 2), 4)).ok());
  EXPECT_EQ(harness.scheduler.stats().num_waiting, 1);
  EXPECT_TRUE(harness.scheduler.finish(2).empty());
  EXPECT_EQ(harness.scheduler.stats().num_waiting, 0);
  harness.run_all();
  EXPECT_EQ(harness.of(2).num_events, 0);
  expect_clean(harness);
}

TEST(Scheduler, CancelInALivePassHoldsTheBlocksUntilDropped) {
  for (const PassKind kind : {kInteractive, kBulk}) {
    Harness harness(small_config());
    ASSERT_TRUE(harness.add(make_spec(1, make_prompt(kind == kBulk ? 20 : 6, 1), 4)).ok());
    ASSERT_EQ(harness.begin(kind).size(), 1U);
    const int64_t used = harness.scheduler.stats().blocks_used();
    const std::vector<LiveSequence> live = harness.scheduler.finish(1);
    ASSERT_EQ(live.size(), 1U);
    EXPECT_EQ(live[0].pass, kind);
    EXPECT_EQ(harness.scheduler.stats().blocks_used(), used);
    EXPECT_FALSE(harness.scheduler.idle());
    EXPECT_TRUE(harness.scheduler.finish(1).empty());  // not twice
    harness.leave(live);
    EXPECT_EQ(harness.scheduler.stats().blocks_used(), 0);
    EXPECT_FALSE(harness.advance(kind));
    harness.commit(kind);
    EXPECT_EQ(harness.of(1).num_events, 0);
    expect_clean(harness);
  }
}

TEST(Scheduler, CommitFreesWhatWasNotDropped) {
  Harness harness(small_config());
  const RequestSpec other = make_spec(2, make_prompt(5, 2), 4);
  ASSERT_TRUE(harness.add(make_spec(1, make_prompt(6, 1), 4)).ok());
  ASSERT_TRUE(harness.add(other).ok());
  ASSERT_EQ(harness.begin(kInteractive).size(), 2U);
  EXPECT_EQ(harness.scheduler.finish(1).size(), 1U);
  while (harness.advance(kInteractive)) {
  }
  harness.commit(kInteractive);
  EXPECT_EQ(harness.of(1).num_events, 0);
  EXPECT_EQ(harness.scheduler.stats().blocks_used(), 2);
  harness.run_all();
  expect_answer(harness, other);
  expect_clean(harness);
}

TEST(Scheduler, CancelOneChoiceOfSeveral) {
  Harness harness(small_config());
  RequestSpec spec = make_spec(1, make_prompt(6, 1), 10);
  spec.n = 3;
  ASSERT_TRUE(harness.add(spec).ok());
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(harness.run(kInteractive));
  const size_t before = harness.of(1, 1).tokens.size();
  EXPECT_TRUE(harness.scheduler.finish_choice(1, 1).empty());
  harness.run_all();
  EXPECT_EQ(harness.of(1, 1).tokens.size(), before);
  expect_answer(harness, spec, 0);
  expect_answer(harness, spec, 2);
  expect_clean(harness);
}

TEST(Scheduler, UnknownIdsAreIgnored) {
  Harness harness(small_config());
  EXPECT_TRUE(harness.scheduler.finish(7).empty());
  EXPECT_TRUE(harness.scheduler.finish_choice(7, 3).empty());
  harness.scheduler.dropped(123);
  ASSERT_TRUE(harness.add(make_spec(1, make_prompt(4, 1), 2)).ok());
  EXPECT_TRUE(harness.scheduler.finish_choice(1, 5).empty());
  EXPECT_TRUE(harness.scheduler.finish_choice(1, -1).empty());
  harness.run_all();
  expect_clean(harness);
}

// Both choices of one request, in the first chunk of a prompt or with its last; nobody else suffers, and the prefix
// cache knows nothing of it.
TEST(Scheduler, ABrokenAnswerEndsItsSequence) {
  constexpr int32_t kBroken = 3;
  for (const int32_t at : {2, 39}) {
    Harness harness(small_config(), StepModel(0.0, 1.0, 0.0), 2, kBroken);
    std::vector<int32_t> prompt = make_prompt(40, 1);
    std::ranges::replace(prompt, kBroken, kBroken + 1);
    const RequestSpec other = make_spec(2, prompt, 1);
    prompt[at] = kBroken;
    RequestSpec broken = make_spec(1, prompt, 6);
    broken.n = 2;
    ASSERT_TRUE(harness.add(broken).ok());
    ASSERT_TRUE(harness.add(other).ok());
    harness.run_all();
    for (int32_t choice = 0; choice < 2; ++choice) {
      EXPECT_EQ(harness.of(1, choice).finish, FinishReason::kError);
      EXPECT_TRUE(harness.of(1, choice).tokens.empty());
    }
    expect_answer(harness, other);
    ASSERT_TRUE(harness.add(make_spec(3, prompt, 6)).ok());
    harness.run_all();
    EXPECT_EQ(harness.of(3).num_cached_tokens, at == 2 ? 0 : 36) << "what it shares with the other's";
    expect_clean(harness);
  }
}

}  // namespace
}  // namespace moed
