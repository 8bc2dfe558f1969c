#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
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
  EXPECT_EQ(harness.scheduler.stats().blocks_used, 2);
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
  harness.scheduler.finish(2, FinishReason::kCancelled);
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
  const int64_t alone = harness.scheduler.stats().blocks_used;
  ASSERT_TRUE(harness.add(make_spec(2, make_prompt(17, 1), 20)).ok());
  ASSERT_TRUE(harness.run(kInteractive));
  EXPECT_EQ(harness.scheduler.stats().num_running, 2);
  EXPECT_LE(harness.scheduler.stats().blocks_used, alone + 2);
  // The first leaves; the second still reads what they shared.
  harness.leave(harness.scheduler.finish(1, FinishReason::kCancelled));
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
  harness.leave(harness.scheduler.finish_choice(1, 0, FinishReason::kCancelled));
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

TEST(Scheduler, LongPromptsAreBulkAndShortOnesAreNot) {
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

TEST(Scheduler, ChunksAreBoundedAndPacked) {
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

TEST(Scheduler, ALongPromptDoesNotHoldUpShorterOnes) {
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
    for (const TokenEvent& event : scheduler.commit(kBulk, output, 0)) {
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
    scheduler.finish(2, FinishReason::kCancelled);
    scheduler.finish(3, FinishReason::kCancelled);
  }
  EXPECT_LE(num_passes, 1 + (32'000 + 2'100) / 512 + 2);  // and no row is wasted
}

TEST(Scheduler, DecodeRowsRideInTheBulkPassWhenTheSweepIsDear) {
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
TEST(Scheduler, DecodeRowsStopRidingNowAndThen) {
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

TEST(Scheduler, AStreamOfShortRequestsDoesNotStarveALongOne) {
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
