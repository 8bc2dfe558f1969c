#include <gtest/gtest.h>

#include <algorithm>
#include <tuple>

#include "tests/scheduler/expectations.h"
#include "tests/scheduler/harness.h"

namespace moed {
namespace {

TEST(Scheduler, OneRequestRunsToItsLength) {
  Harness harness(small_config());
  const RequestSpec spec = make_spec(1, make_prompt(5, 1), 7);
  ASSERT_TRUE(harness.add(spec).ok());
  harness.run_all();
  expect_answer(harness, spec);
  EXPECT_EQ(harness.of(1).finish, FinishReason::kLength);
  EXPECT_EQ(harness.of(1).num_events, 7);
  expect_clean(harness);
}

TEST(Scheduler, SixteenChatsWithRoomForTwoFullContextsAllRunAtOnce) {
  // Contexts of 128 tokens, KV for two of them; each chat may fill its whole context, none gets near it.
  constexpr int32_t kContext = 128;
  SchedulerConfig config = small_config();
  config.num_blocks = 2 * kContext / config.block_tokens;
  Harness harness(config);
  std::vector<RequestSpec> specs;
  for (int32_t id = 1; id <= 16; ++id) {
    specs.push_back(make_spec(id, make_prompt(6, id), kContext - 6));
    ASSERT_TRUE(harness.add(specs.back()).ok());
  }
  ASSERT_TRUE(harness.run(kInteractive));
  while (harness.scheduler.stats().num_waiting > 0) ASSERT_TRUE(harness.run(kInteractive));
  EXPECT_EQ(harness.scheduler.stats().num_running, 16);
  EXPECT_EQ(harness.scheduler.stats().num_preemptions, 0);
  // Then they grow past what there is, and still each gets its own answer.
  harness.run_all();
  EXPECT_GT(harness.scheduler.stats().num_preemptions, 0);
  for (const RequestSpec& spec : specs) expect_answer(harness, spec);
  expect_clean(harness);
}

TEST(Scheduler, AdmissionNeedsThePromptsBlocksAndTheReserve) {
  SchedulerConfig config = small_config();
  config.num_blocks = 5;
  config.reserve_blocks = 1;
  Harness harness(config);
  // Two blocks and one of reserve each: the second does not fit beside the first, though its prompt alone would.
  ASSERT_TRUE(harness.add(make_spec(1, make_prompt(8, 1), 8)).ok());
  ASSERT_TRUE(harness.add(make_spec(2, make_prompt(12, 2), 8)).ok());
  harness.begin(kInteractive);
  EXPECT_EQ(harness.scheduler.stats().num_running, 1);
  EXPECT_EQ(harness.scheduler.stats().blocks_used(), 2);
}

TEST(Scheduler, ReserveIsNotAskedOfASequenceThatNeverGrows) {
  SchedulerConfig config = small_config();
  config.num_blocks = 2;
  Harness harness(config);
  const RequestSpec spec = make_spec(1, make_prompt(7, 1), 2);  // KV of 8 tokens in all
  ASSERT_TRUE(harness.add(spec).ok());
  harness.run_all();
  expect_answer(harness, spec);
}

TEST(Scheduler, RefusesWhatCanNeverFit) {
  SchedulerConfig config = small_config();
  config.num_blocks = 2;
  Harness harness(config);
  const Status status = harness.add(make_spec(1, make_prompt(7, 1), 3));
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("need 3 KV blocks of 4 tokens; the server has 2"), std::string::npos)
      << status.message();
  expect_clean(harness);
}

TEST(Scheduler, RefusesWhenTheQueueIsFull) {
  SchedulerConfig config = small_config();
  config.queue_max = 2;
  config.sequences_max = 1;
  Harness harness(config);
  ASSERT_TRUE(harness.add(make_spec(1, make_prompt(3, 1), 3)).ok());
  ASSERT_TRUE(harness.run(kInteractive));  // 1 runs: it does not wait any more
  ASSERT_TRUE(harness.add(make_spec(2, make_prompt(3, 2), 3)).ok());
  ASSERT_TRUE(harness.add(make_spec(3, make_prompt(3, 3), 3)).ok());
  EXPECT_EQ(harness.add(make_spec(4, make_prompt(3, 4), 3)).code(), StatusCode::kResourceExhausted);
  harness.scheduler.finish(2);
  EXPECT_TRUE(harness.add(make_spec(5, make_prompt(3, 5), 3)).ok());
  harness.run_all();
  expect_clean(harness);
}

TEST(Scheduler, RefusesWhenTooManyPromptTokensWait) {
  SchedulerConfig config = small_config();
  config.queue_tokens_max = 10;
  Harness harness(config);
  ASSERT_TRUE(harness.add(make_spec(1, make_prompt(8, 1), 3)).ok());
  const Status status = harness.add(make_spec(2, make_prompt(3, 2), 3));
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("queue_tokens_max 10"), std::string::npos) << status.message();
}

TEST(Scheduler, EachChoiceOfAWaitingRequestCountsItsPrompt) {
  SchedulerConfig config = small_config();
  config.queue_tokens_max = 30;
  Harness harness(config);
  RequestSpec many = make_spec(1, make_prompt(8, 1), 3);
  many.n = 3;
  ASSERT_TRUE(harness.add(many).ok());
  EXPECT_EQ(harness.add(make_spec(2, make_prompt(7, 2), 3)).code(), StatusCode::kResourceExhausted);
  ASSERT_TRUE(harness.add(make_spec(3, make_prompt(6, 3), 3)).ok());
  harness.scheduler.finish(1);
  RequestSpec more = make_spec(4, make_prompt(7, 4), 3);
  more.n = 4;
  const Status status = harness.add(more);
  EXPECT_NE(status.message().find("6 prompt tokens wait, 28 more would pass queue_tokens_max 30"), std::string::npos)
      << status.message();
  ASSERT_TRUE(harness.run(kInteractive));  // 3 waits no more
  ASSERT_TRUE(harness.add(more).ok());
  harness.run_all();
  expect_clean(harness);
}

TEST(Scheduler, ABlockedHeadStartsWhenItsPrefixHasBeenComputed) {
  SchedulerConfig config = small_config();
  config.num_blocks = 15;
  config.reserve_blocks = 0;
  Harness harness(config);
  // Twice the same ten blocks of prompt: the second fits only when it shares the first one's.
  ASSERT_TRUE(harness.add(make_spec(1, make_prompt(40, 1), 4)).ok());
  ASSERT_TRUE(harness.add(make_spec(2, make_prompt(40, 1), 4)).ok());
  ASSERT_TRUE(harness.run(kBulk));
  EXPECT_EQ(harness.scheduler.stats().num_running, 1);
  ASSERT_TRUE(harness.run(kInteractive));
  EXPECT_EQ(harness.scheduler.stats().num_running, 2);
  harness.run_all();
  EXPECT_EQ(harness.of(2).num_cached_tokens, 32);
  expect_answer(harness, make_spec(1, make_prompt(40, 1), 4));
  expect_answer(harness, make_spec(2, make_prompt(40, 1), 4));
  expect_clean(harness);
}

TEST(Scheduler, PriorityThenArrival) {
  SchedulerConfig config = small_config();
  config.sequences_max = 1;
  Harness harness(config);
  std::vector<RequestId> order;
  for (const auto& [id, priority, arrival] : {std::tuple{1, 1, 10}, {2, 0, 30}, {3, 0, 20}, {4, -5, 40}}) {
    RequestSpec spec = make_spec(id, make_prompt(3, id), 1);
    spec.priority = priority;
    spec.arrival_us = arrival;
    ASSERT_TRUE(harness.add(spec).ok());
  }
  while (!harness.scheduler.idle()) {
    ASSERT_TRUE(harness.run(kInteractive));
    for (RequestId id = 1; id <= 4; ++id) {
      if (harness.of(id).num_events > 0 && std::ranges::find(order, id) == order.end()) order.push_back(id);
    }
  }
  EXPECT_EQ(order, (std::vector<RequestId>{4, 3, 2, 1}));
}

TEST(Scheduler, GrowthPreemptsTheLastInOrderAndLosesNothing) {
  SchedulerConfig config = small_config();
  config.num_blocks = 8;
  config.prefix_cache = false;
  Harness harness(config);
  RequestSpec first = make_spec(1, make_prompt(4, 1), 20);
  RequestSpec second = make_spec(2, make_prompt(4, 2), 20);
  RequestSpec urgent = make_spec(3, make_prompt(4, 3), 20);
  urgent.priority = -1;
  for (const RequestSpec& spec : {first, second, urgent}) ASSERT_TRUE(harness.add(spec).ok());
  ASSERT_TRUE(harness.run(kInteractive));
  EXPECT_EQ(harness.scheduler.stats().num_running, 3);
  while (harness.scheduler.stats().num_preemptions == 0) ASSERT_TRUE(harness.run(kInteractive));
  // The victim stands still, the others go on.
  const size_t before = harness.of(2).tokens.size();
  ASSERT_TRUE(harness.run(kInteractive));
  EXPECT_EQ(harness.of(2).tokens.size(), before);
  EXPECT_GT(harness.of(1).tokens.size(), before);
  EXPECT_GT(harness.of(3).tokens.size(), before);
  harness.run_all();
  for (const RequestSpec& spec : {first, second, urgent}) expect_answer(harness, spec);
  expect_clean(harness);
}

TEST(Scheduler, PreemptionSparesALivePass) {
  SchedulerConfig config = small_config();
  config.num_blocks = 9;
  config.prefix_cache = false;
  Harness harness(config);
  const RequestSpec chat = make_spec(1, make_prompt(4, 1), 12);
  const RequestSpec longer = make_spec(2, make_prompt(22, 2), 3);
  ASSERT_TRUE(harness.add(chat).ok());
  ASSERT_TRUE(harness.run(kInteractive));
  ASSERT_TRUE(harness.add(longer).ok());
  ASSERT_EQ(harness.begin(kBulk).size(), 1U);  // 6 of 9 blocks, live
  // The chat runs dry: it may not take the live prefill's blocks, and it waits instead of giving up its own.
  while (harness.run(kInteractive)) {
  }
  EXPECT_EQ(harness.scheduler.stats().num_preemptions, 0);
  EXPECT_EQ(harness.scheduler.stats().num_running, 2);
  const size_t stalled_at = harness.of(1).tokens.size();
  EXPECT_LT(stalled_at, 12U);
  while (harness.advance(kBulk)) {
  }
  harness.commit(kBulk);
  ASSERT_TRUE(harness.run(kInteractive));
  EXPECT_EQ(harness.scheduler.stats().num_preemptions, 1);  // now the younger one makes room
  EXPECT_EQ(harness.of(1).tokens.size(), stalled_at + 1);
  harness.run_all();
  expect_answer(harness, chat);
  expect_answer(harness, longer);
}

TEST(Scheduler, ASequenceMayPreemptItself) {
  SchedulerConfig config = small_config();
  config.num_blocks = 4;
  config.reserve_blocks = 0;
  config.prefix_cache = false;
  Harness harness(config);
  const RequestSpec first = make_spec(1, make_prompt(5, 1), 6);
  const RequestSpec second = make_spec(2, make_prompt(7, 2), 6);
  ASSERT_TRUE(harness.add(first).ok());
  ASSERT_TRUE(harness.add(second).ok());
  ASSERT_TRUE(harness.run(kInteractive));
  ASSERT_EQ(harness.scheduler.stats().num_running, 2);
  ASSERT_TRUE(harness.run(kInteractive));
  EXPECT_EQ(harness.scheduler.stats().num_preemptions, 0);
  ASSERT_TRUE(harness.run(kInteractive));  // the second needs its third block, and nobody goes after it
  EXPECT_EQ(harness.scheduler.stats().num_preemptions, 1);
  EXPECT_EQ(harness.of(2).tokens.size(), 2U);
  harness.run_all();
  expect_answer(harness, first);
  expect_answer(harness, second);
}

TEST(Scheduler, PrefixIsSharedBetweenRequests) {
  Harness harness(small_config());
  const RequestSpec first = make_spec(1, make_prompt(16, 1), 3);
  RequestSpec second = make_spec(2, make_prompt(16, 1), 3);
  ASSERT_TRUE(harness.add(first).ok());
  harness.run_all();
  ASSERT_TRUE(harness.add(second).ok());
  harness.run_all();
  EXPECT_EQ(harness.of(1).num_cached_tokens, 0);
  // Of four full blocks three: the last prompt token is always computed.
  EXPECT_EQ(harness.of(2).num_cached_tokens, 12);
  EXPECT_EQ(harness.scheduler.stats().prefix_queries_tokens, 32);
  EXPECT_EQ(harness.scheduler.stats().prefix_hits_tokens, 12);
  expect_answer(harness, first);
  expect_answer(harness, second);
  expect_clean(harness);
}

TEST(Scheduler, AnAnswerIsAPrefixOfTheNextTurn) {
  Harness harness(small_config());
  const RequestSpec first = make_spec(1, make_prompt(6, 1), 11);
  ASSERT_TRUE(harness.add(first).ok());
  harness.run_all();
  std::vector<int32_t> prompt = first.prompt;
  prompt.insert(prompt.end(), harness.of(1).tokens.begin(), harness.of(1).tokens.end());
  prompt.push_back(7);
  const RequestSpec second = make_spec(2, prompt, 3);
  ASSERT_TRUE(harness.add(second).ok());
  harness.run_all();
  EXPECT_EQ(harness.of(2).num_cached_tokens, 16);  // 6 + 11 tokens, of which the last has no KV: four blocks
  expect_answer(harness, second);
}

TEST(Scheduler, RunningRequestsShareBlocks) {
  Harness harness(small_config());
  ASSERT_TRUE(harness.add(make_spec(1, make_prompt(17, 1), 20)).ok());
  ASSERT_TRUE(harness.run(kBulk));
  const int64_t alone = harness.scheduler.stats().blocks_used();
  ASSERT_TRUE(harness.add(make_spec(2, make_prompt(17, 1), 20)).ok());
  ASSERT_TRUE(harness.run(kInteractive));
  EXPECT_EQ(harness.scheduler.stats().num_running, 2);
  EXPECT_LE(harness.scheduler.stats().blocks_used(), alone + 2);
  // The first leaves; the second still reads what they shared.
  harness.leave(harness.scheduler.finish(1));
  harness.run_all();
  expect_answer(harness, make_spec(2, make_prompt(17, 1), 20));
  expect_clean(harness);
}

TEST(Scheduler, TheLeastRecentlyUsedPrefixGoesFirst) {
  SchedulerConfig config = small_config();
  config.num_blocks = 12;
  Harness harness(config);
  const auto run_one = [&](RequestId id, int32_t salt) {
    ASSERT_TRUE(harness.add(make_spec(id, make_prompt(13, salt), 1)).ok());
    harness.run_all();
  };
  run_one(1, 1);
  run_one(2, 2);
  run_one(3, 1);  // touches prompt 1: 2 is the oldest now
  EXPECT_EQ(harness.of(3).num_cached_tokens, 12);
  run_one(4, 3);
  run_one(5, 4);
  // Twelve blocks, three kept a prompt: the fourth prompt needed one of prompt 2's, its last.
  run_one(6, 1);
  EXPECT_EQ(harness.of(6).num_cached_tokens, 12);
  run_one(7, 2);
  EXPECT_EQ(harness.of(7).num_cached_tokens, 8);
}

TEST(Scheduler, PrefixCacheCanBeTurnedOff) {
  SchedulerConfig config = small_config();
  config.prefix_cache = false;
  Harness harness(config);
  for (RequestId id = 1; id <= 2; ++id) {
    ASSERT_TRUE(harness.add(make_spec(id, make_prompt(16, 1), 2)).ok());
    harness.run_all();
    EXPECT_EQ(harness.of(id).num_cached_tokens, 0);
  }
  EXPECT_EQ(harness.scheduler.stats().prefix_queries_tokens, 0);
}

TEST(Scheduler, PromptLogprobsDoNotReadTheCache) {
  Harness harness(small_config());
  ASSERT_TRUE(harness.add(make_spec(1, make_prompt(16, 1), 1)).ok());
  harness.run_all();
  RequestSpec scored = make_spec(2, make_prompt(16, 1), 2);
  scored.prompt_logprobs = true;
  scored.sampling.num_logprobs = 3;
  ASSERT_TRUE(harness.add(scored).ok());
  harness.run_all();
  EXPECT_EQ(harness.of(2).num_cached_tokens, 0);
  const std::vector<ScoredToken>& scores = harness.of(2).prompt_scores;
  ASSERT_EQ(scores.size(), 15U);
  for (size_t i = 0; i < scores.size(); ++i) {
    EXPECT_EQ(scores[i].token, scored.prompt[i + 1]);
    EXPECT_EQ(scores[i].logprob, fake_logprob(std::span<const int32_t>(scored.prompt).first(i + 2)));
    EXPECT_EQ(scores[i].top.size(), 3U);
  }
  expect_answer(harness, scored);
}

TEST(Scheduler, PromptScoresSurviveChunksAndPreemption) {
  SchedulerConfig config = small_config();
  config.num_blocks = 14;
  config.pass_rows_max = 16;
  Harness harness(config);
  const RequestSpec chat = make_spec(1, make_prompt(4, 1), 40);
  ASSERT_TRUE(harness.add(chat).ok());
  ASSERT_TRUE(harness.run(kInteractive));
  RequestSpec scored = make_spec(2, make_prompt(40, 2), 2);
  scored.prompt_logprobs = true;
  ASSERT_TRUE(harness.add(scored).ok());
  ASSERT_TRUE(harness.run(kBulk));  // a first chunk of scores
  while (harness.scheduler.stats().num_preemptions == 0) ASSERT_TRUE(harness.run(kInteractive));
  harness.run_all();
  const std::vector<ScoredToken>& scores = harness.of(2).prompt_scores;
  ASSERT_EQ(scores.size(), 39U);
  for (size_t i = 0; i < scores.size(); ++i) {
    EXPECT_EQ(scores[i].token, scored.prompt[i + 1]);
    EXPECT_EQ(scores[i].logprob, fake_logprob(std::span<const int32_t>(scored.prompt).first(i + 2)));
  }
  expect_answer(harness, chat);
  expect_answer(harness, scored);
}

TEST(Scheduler, NoNewTokensScoresThePromptAlone) {
  for (const int32_t length : {1, 2, 30}) {
    Harness harness(small_config());
    RequestSpec spec = make_spec(1, make_prompt(length, 1), 0);
    spec.prompt_logprobs = true;
    ASSERT_TRUE(harness.add(spec).ok());
    harness.run_all();
    EXPECT_EQ(harness.of(1).num_events, 1);
    EXPECT_TRUE(harness.of(1).tokens.empty());
    EXPECT_EQ(harness.of(1).finish, FinishReason::kLength);
    EXPECT_EQ(static_cast<int32_t>(harness.of(1).prompt_scores.size()), length - 1);
    expect_clean(harness);
  }
}

TEST(Scheduler, ChoicesShareThePromptAndCopyItsLastBlock) {
  for (const bool prefix_cache : {true, false}) {
    for (const int32_t length : {1, 6, 8, 21}) {
      SchedulerConfig config = small_config();
      config.prefix_cache = prefix_cache;
      Harness harness(config);
      RequestSpec spec = make_spec(1, make_prompt(length, 1), 9);
      spec.n = 4;
      ASSERT_TRUE(harness.add(spec).ok());
      harness.run_all();
      for (int32_t choice = 0; choice < spec.n; ++choice) expect_answer(harness, spec, choice);
      EXPECT_NE(harness.of(1, 0).tokens, harness.of(1, 1).tokens);
      // One prefill, then a row a choice and token, the first row of three choices being the last prompt token's.
      EXPECT_EQ(harness.engine.num_rows_computed(), length + 3 + 4 * 8) << "prompt of " << length;
      EXPECT_EQ(harness.engine.num_blocks_copied(), (length - 1) % 4 == 0 ? 0 : 3);
      expect_clean(harness);
    }
  }
}

TEST(Scheduler, ChoicesShareAPromptWhoseFirstChoiceEndsAtOnce) {
  SchedulerConfig config = small_config();
  config.prefix_cache = false;
  Harness harness(config);
  RequestSpec spec = make_spec(1, make_prompt(30, 1), 1);
  spec.n = 8;
  ASSERT_TRUE(harness.add(spec).ok());
  harness.run_all();
  for (int32_t choice = 0; choice < spec.n; ++choice) expect_answer(harness, spec, choice);
  EXPECT_EQ(harness.engine.num_rows_computed(), 30 + 7);
  expect_clean(harness);
}

TEST(Scheduler, AFollowingChoiceTakesOverWhenTheFirstIsCancelled) {
  Harness harness(small_config());
  RequestSpec spec = make_spec(1, make_prompt(30, 1), 4);
  spec.n = 3;
  ASSERT_TRUE(harness.add(spec).ok());
  ASSERT_FALSE(harness.begin(kBulk).empty());
  harness.leave(harness.scheduler.finish_choice(1, 0));
  EXPECT_FALSE(harness.advance(kBulk));
  harness.commit(kBulk);
  harness.run_all();
  EXPECT_EQ(harness.of(1, 0).num_events, 0);
  expect_answer(harness, spec, 1);
  expect_answer(harness, spec, 2);
  expect_clean(harness);
}

TEST(Scheduler, StopAndEosIdsEndAChoice) {
  const std::vector<int32_t> free_running = expected_answer(make_spec(1, make_prompt(5, 1), 30), 0);
  const int32_t stop = free_running[7];
  const auto first = std::ranges::find(free_running, stop) - free_running.begin();
  for (const bool eos : {false, true}) {
    Harness harness(small_config());
    RequestSpec spec = make_spec(1, make_prompt(5, 1), 30);
    (eos ? spec.eos_token_ids : spec.stop_token_ids) = {stop};
    ASSERT_TRUE(harness.add(spec).ok());
    harness.run_all();
    EXPECT_EQ(static_cast<int64_t>(harness.of(1).tokens.size()), first + 1);
    EXPECT_EQ(harness.of(1).finish, FinishReason::kStop);
    EXPECT_EQ(harness.of(1).stop_token, stop);
  }
  Harness harness(small_config());
  RequestSpec spec = make_spec(1, make_prompt(5, 1), 30);
  spec.eos_token_ids = {stop};
  spec.ignore_eos = true;
  ASSERT_TRUE(harness.add(spec).ok());
  harness.run_all();
  EXPECT_EQ(harness.of(1).tokens, free_running);
}

TEST(Scheduler, MinTokensKeepsStopsAway) {
  Harness harness(small_config());
  RequestSpec spec = make_spec(1, make_prompt(5, 1), 40);
  for (int32_t id = 0; id < kVocab - 1; ++id) spec.stop_token_ids.push_back(id);
  spec.sampling.min_tokens = 6;
  ASSERT_TRUE(harness.add(spec).ok());
  harness.run_all();
  ASSERT_EQ(harness.of(1).tokens.size(), 7U);
  for (size_t i = 0; i < 6; ++i) EXPECT_EQ(harness.of(1).tokens[i], kVocab - 1);
}

TEST(Scheduler, ManyDecodersTakeTurns) {
  SchedulerConfig config = small_config();
  config.num_blocks = 256;
  config.pass_rows_max = 4;
  config.bulk_rows_min = 3;
  Harness harness(config);
  std::vector<RequestSpec> specs;
  for (int32_t id = 1; id <= 10; ++id) {
    specs.push_back(make_spec(id, make_prompt(2, id), 60));
    ASSERT_TRUE(harness.add(specs.back()).ok());
  }
  while (harness.of(10).tokens.empty()) ASSERT_TRUE(harness.run(kInteractive));
  std::vector<size_t> before;
  for (const RequestSpec& spec : specs) before.push_back(harness.of(spec.id).tokens.size());
  for (int i = 0; i < 25; ++i) ASSERT_TRUE(harness.run(kInteractive));
  // 25 passes of 4 rows for 10 sequences.
  for (size_t i = 0; i < specs.size(); ++i) {
    EXPECT_NEAR(static_cast<double>(harness.of(specs[i].id).tokens.size() - before[i]), 10.0, 1.0);
  }
  harness.run_all();
  for (const RequestSpec& spec : specs) expect_answer(harness, spec);
}

}  // namespace
}  // namespace moed
