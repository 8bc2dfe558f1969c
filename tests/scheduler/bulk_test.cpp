// Long prefills: their chunks, whom they hold up, and who rides with them.
#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <vector>

#include "tests/scheduler/expectations.h"
#include "tests/scheduler/harness.h"

namespace moed {
namespace {

TEST(SchedulerBulk, LongPromptsAreBulkAndShortOnesAreNot) {
  Harness harness(small_config());
  ASSERT_TRUE(harness.add(make_spec(1, make_prompt(8, 1), 2)).ok());
  EXPECT_TRUE(harness.begin(kBulk).empty());
  ASSERT_TRUE(harness.add(make_spec(2, make_prompt(9, 2), 2)).ok());
  const auto bulk = harness.begin(kBulk);
  ASSERT_EQ(bulk.size(), 1U);
  EXPECT_EQ(bulk[0].num_new, 9);
  const auto interactive = harness.begin(kInteractive);
  ASSERT_EQ(interactive.size(), 1U);
  EXPECT_EQ(interactive[0].num_new, 8);
}

TEST(SchedulerBulk, ChunksAreBoundedAndPacked) {
  SchedulerConfig config = small_config();
  config.pass_rows_max = 16;
  Harness harness(config);
  const RequestSpec first = make_spec(1, make_prompt(40, 1), 2);
  const RequestSpec second = make_spec(2, make_prompt(20, 2), 2);
  ASSERT_TRUE(harness.add(first).ok());
  ASSERT_TRUE(harness.add(second).ok());
  std::vector<std::vector<int32_t>> chunks;
  while (true) {
    const auto steps = harness.begin(kBulk);
    if (steps.empty()) break;
    std::vector<int32_t>& rows = chunks.emplace_back();
    for (const StepSequence& step : steps) rows.push_back(step.num_new);
    EXPECT_EQ(harness.scheduler.shape(kBulk).num_rows, std::accumulate(rows.begin(), rows.end(), 0));
    while (harness.advance(kBulk)) {
    }
    harness.commit(kBulk);
  }
  // A quarter is kept for the second. 40 = 3 * 12 + 4, 20 = 3 * 4 + 8: the rest of neither is bulk any more.
  EXPECT_EQ(chunks, (std::vector<std::vector<int32_t>>{{12, 4}, {12, 4}, {12, 4}}));
  const auto steps = harness.begin(kInteractive);
  ASSERT_EQ(steps.size(), 2U);
  EXPECT_EQ(steps[0].num_new, 4);
  EXPECT_EQ(steps[1].num_new, 8);
}

TEST(SchedulerBulk, ALongPromptDoesNotHoldUpShorterOnes) {
  SchedulerConfig config{.block_tokens = 16, .num_blocks = 4096, .pass_rows_max = 512, .bulk_rows_min = 64};
  Scheduler scheduler(config);
  RequestLimits limits = test_limits();
  limits.max_model_len = 65'536;
  const auto add = [&](RequestId id, int32_t length) {
    return scheduler.add(
        Request::make(make_spec(id, make_prompt(length, static_cast<int32_t>(id)), 2), limits).value());
  };
  std::map<RequestId, int32_t> answered_after;  // bulk passes until a request's first token
  int32_t num_passes = 0;
  const auto run_bulk = [&] {
    const auto steps = scheduler.schedule(kBulk, StepModel(0.0, 1.0, 0.0), 0);
    ASSERT_FALSE(steps.empty());
    StepOutput output;
    for (const StepSequence& step : steps) {
      SequenceOutput& answer = output.sequences.emplace_back();
      answer.id = step.id;
      if (step.sampling != nullptr) answer.sampled.emplace();
    }
    ++num_passes;
    for (const TokenEvent& event : scheduler.commit(kBulk, output)) {
      answered_after.emplace(event.request, num_passes);
    }
    scheduler.check_invariants();
  };
  ASSERT_TRUE(add(1, 32'000).ok());
  run_bulk();
  ASSERT_TRUE(add(2, 2'000).ok());
  ASSERT_TRUE(add(3, 100).ok());
  for (int i = 0; i < 18; ++i) run_bulk();
  EXPECT_EQ(answered_after[3], 2);                // the very next pass
  EXPECT_LE(answered_after[2], 3 + 2'000 / 128);  // then a quarter of each
  EXPECT_FALSE(answered_after.contains(1));
  while (!answered_after.contains(1) && num_passes < 100) {
    run_bulk();
    scheduler.finish(2);
    scheduler.finish(3);
  }
  EXPECT_LE(num_passes, 1 + (32'000 + 2'100) / 512 + 2);  // and no row is wasted
}

TEST(SchedulerBulk, DecodeRowsRideInTheBulkPassWhenTheSweepIsDear) {
  // A sweep that costs more than any number of rows: sharing costs nothing and saves a sweep.
  for (const bool dear : {true, false}) {
    Harness harness(small_config(), dear ? StepModel(1e6, 1.0, 0.0) : StepModel(1.0, 1e3, 0.0));
    const RequestSpec chat = make_spec(1, make_prompt(4, 1), 10);
    const RequestSpec longer = make_spec(2, make_prompt(40, 2), 2);
    ASSERT_TRUE(harness.add(chat).ok());
    ASSERT_TRUE(harness.run(kInteractive));
    ASSERT_TRUE(harness.add(longer).ok());
    EXPECT_EQ(harness.begin(kBulk).size(), dear ? 2U : 1U);
    EXPECT_EQ(harness.begin(kInteractive).empty(), dear);
    if (!dear) {
      while (harness.advance(kInteractive)) {
      }
      harness.commit(kInteractive);
    }
    while (harness.advance(kBulk)) {
    }
    harness.commit(kBulk);
    EXPECT_EQ(harness.of(1).tokens.size(), 2U);
    harness.run_all();
    expect_answer(harness, chat);
    expect_answer(harness, longer);
  }
}

// Else the model would never see a light pass, and a sweep that it thinks too dear would stay so.
TEST(SchedulerBulk, DecodeRowsStopRidingNowAndThen) {
  SchedulerConfig config = small_config();
  config.num_blocks = 512;
  Harness harness(config, StepModel(1e6, 1.0, 0.0));
  const RequestSpec chat = make_spec(1, make_prompt(4, 1), 80);
  const RequestSpec longer = make_spec(2, make_prompt(1200, 2), 2);
  ASSERT_TRUE(harness.add(chat).ok());
  ASSERT_TRUE(harness.run(kInteractive));
  ASSERT_TRUE(harness.add(longer).ok());
  int num_alone = 0;
  for (int pass = 0; pass < 32; ++pass) {
    const auto bulk = harness.begin(kBulk);
    ASSERT_FALSE(bulk.empty());
    num_alone += bulk.size() == 1 ? 1 : 0;
    EXPECT_EQ(harness.run(kInteractive), bulk.size() == 1);
    while (harness.advance(kBulk)) {
    }
    harness.commit(kBulk);
  }
  EXPECT_EQ(num_alone, 2);
  harness.run_all();
  expect_answer(harness, chat);
  expect_answer(harness, longer);
}

TEST(SchedulerBulk, AStreamOfShortRequestsDoesNotStarveALongOne) {
  SchedulerConfig config = small_config();
  config.pass_rows_max = 16;
  Harness harness(config);
  const RequestSpec longer = make_spec(1, make_prompt(100, 1), 2);
  ASSERT_TRUE(harness.add(longer).ok());
  RequestId next = 2;
  int32_t rounds = 0;
  while (harness.of(1).finish == FinishReason::kNone) {
    for (int i = 0; i < 2; ++i, ++next) ASSERT_TRUE(harness.add(make_spec(next, make_prompt(6, next), 2)).ok());
    harness.run(kInteractive);
    harness.run(kBulk);
    ASSERT_LT(++rounds, 20);
  }
  harness.run_all();
  expect_answer(harness, longer);
}

}  // namespace
}  // namespace moed
