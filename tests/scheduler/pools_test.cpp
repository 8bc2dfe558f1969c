// Two KV pools: where sequences start, what they share there, and who makes room for whom.
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "tests/scheduler/expectations.h"
#include "tests/scheduler/harness.h"

namespace moed {
namespace {

SchedulerConfig split_config(int64_t num_blocks, int64_t device_blocks) {
  SchedulerConfig config = small_config();
  config.num_blocks = num_blocks;
  config.device_blocks = device_blocks;
  config.kv = KvPlacement::kSplit;
  return config;
}

// Runs a pass of each kind and notes where its sequences are.
class Pools {
 public:
  explicit Pools(const SchedulerConfig& config) : harness(config) {}

  bool run(PassKind kind) {
    for (const StepSequence& step : harness.begin(kind)) last_[step.id] = step.pool;
    if (!harness.pass(kind).alive()) return false;
    while (harness.advance(kind)) {
    }
    harness.commit(kind);
    return true;
  }
  bool run() { return static_cast<int>(run(kBulk)) + static_cast<int>(run(kInteractive)) > 0; }
  // Of requests with one choice that were added in this order from 1 on.
  Pool of(SequenceId id) const { return last_.at(id); }
  int64_t used(Pool pool) const { return harness.scheduler.stats().pool(pool).blocks_used; }
  int64_t num_preemptions() const { return harness.scheduler.stats().num_preemptions; }

  Harness harness;

 private:
  std::map<SequenceId, Pool> last_;
};

TEST(SchedulerPools, OnePlacementOnePool) {
  for (const KvPlacement kv : {KvPlacement::kHost, KvPlacement::kDevice}) {
    const bool device = kv == KvPlacement::kDevice;
    SchedulerConfig config = split_config(device ? 3 : 64, device ? 64 : 3);
    config.kv = kv;
    Pools pools(config);
    RequestSpec several = make_spec(1, make_prompt(6, 1), 9);
    several.n = 3;
    const RequestSpec longer = make_spec(2, make_prompt(30, 2), 9);
    ASSERT_TRUE(pools.harness.add(several).ok());
    ASSERT_TRUE(pools.harness.add(longer).ok());
    while (pools.run()) {
      EXPECT_EQ(pools.used(device ? Pool::kHost : Pool::kDevice), 0);
    }
    for (SequenceId id = 1; id <= 4; ++id) EXPECT_EQ(pools.of(id), device ? Pool::kDevice : Pool::kHost);
    for (int32_t choice = 0; choice < 3; ++choice) expect_answer(pools.harness, several, choice);
    expect_answer(pools.harness, longer);
    // The pool that is left out counts for nothing.
    EXPECT_EQ(pools.harness.scheduler.stats().blocks_total(), 64);
    EXPECT_EQ(pools.harness.engine.num_blocks_copied(), 2);
    expect_clean(pools.harness);
  }
}

TEST(SchedulerPools, SplitFillsTheDeviceFirst) {
  // Two blocks and one of reserve each: the device has room for two of them, the reserve included.
  Pools pools(split_config(64, 6));
  std::vector<RequestSpec> specs;
  for (int32_t id = 1; id <= 4; ++id) {
    specs.push_back(make_spec(id, make_prompt(7, id), 4));
    ASSERT_TRUE(pools.harness.add(specs.back()).ok());
  }
  ASSERT_TRUE(pools.run(kInteractive));
  EXPECT_EQ(pools.of(1), Pool::kDevice);
  EXPECT_EQ(pools.of(2), Pool::kDevice);
  EXPECT_EQ(pools.of(3), Pool::kHost);  // two are free, which its prompt needs, and none for the reserve
  EXPECT_EQ(pools.of(4), Pool::kHost);
  EXPECT_EQ(pools.used(Pool::kDevice), 4);
  EXPECT_EQ(pools.used(Pool::kHost), 4);
  const SchedulerStats stats = pools.harness.scheduler.stats();
  EXPECT_EQ(stats.pool(Pool::kDevice).blocks_free(), 2);
  EXPECT_EQ(stats.pool(Pool::kHost).blocks_free(), 60);
  EXPECT_EQ(stats.blocks_total(), 70);
  EXPECT_DOUBLE_EQ(stats.kv_usage(), 8.0 / 70.0);
  pools.harness.run_all();
  for (const RequestSpec& spec : specs) expect_answer(pools.harness, spec);
  expect_clean(pools.harness);
}

TEST(SchedulerPools, WhatOutgrowsItsPoolGoesOnInTheOther) {
  // The prompts fit the device now, but not the answers that may come.
  Pools pools(split_config(16, 8));
  const RequestSpec longer = make_spec(1, make_prompt(6, 1), 40);
  const RequestSpec longest = make_spec(2, make_prompt(6, 2), 59);
  ASSERT_TRUE(pools.harness.add(longer).ok());
  const Status status = pools.harness.add(make_spec(3, make_prompt(6, 2), 60));
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("need 17 KV blocks of 4 tokens; the server has 16"), std::string::npos)
      << status.message();
  ASSERT_TRUE(pools.harness.add(longest).ok());
  ASSERT_TRUE(pools.run(kInteractive));
  EXPECT_EQ(pools.of(1), Pool::kDevice);
  EXPECT_EQ(pools.of(2), Pool::kDevice);
  // The second gives way to the first, which goes when it has the device to itself and that is not enough.
  while (pools.run()) {
    if (pools.harness.of(1).tokens.size() >= 30) {
      EXPECT_EQ(pools.of(1), Pool::kHost);
    }
  }
  EXPECT_GE(pools.num_preemptions(), 2);
  expect_answer(pools.harness, longer);
  expect_answer(pools.harness, longest);
  expect_clean(pools.harness);
}

TEST(SchedulerPools, TheLongerPrefixDecidesWhileItFits) {
  Pools pools(split_config(64, 14));
  // Fills the device, so that the second prompt is computed on the host.
  ASSERT_TRUE(pools.harness.add(make_spec(1, make_prompt(38, 1), 10)).ok());
  ASSERT_TRUE(pools.harness.add(make_spec(2, make_prompt(17, 2), 2)).ok());
  while (pools.run()) {
  }
  ASSERT_EQ(pools.of(1), Pool::kDevice);
  ASSERT_EQ(pools.of(2), Pool::kHost);
  // The device is empty, but the host knows 16 tokens of it.
  ASSERT_TRUE(pools.harness.add(make_spec(3, make_prompt(17, 2), 2)).ok());
  while (pools.run()) {
  }
  EXPECT_EQ(pools.of(3), Pool::kHost);
  EXPECT_EQ(pools.harness.of(3).num_cached_tokens, 16);
  // The device knows 36 tokens of this one; then all of it is taken by others, and it must go to the host.
  ASSERT_TRUE(pools.harness.add(make_spec(4, make_prompt(38, 1), 2)).ok());
  ASSERT_TRUE(pools.run());
  EXPECT_EQ(pools.of(4), Pool::kDevice);
  while (pools.run()) {
  }
  EXPECT_EQ(pools.harness.of(4).num_cached_tokens, 36);
  ASSERT_TRUE(pools.harness.add(make_spec(5, make_prompt(44, 5), 9)).ok());
  ASSERT_TRUE(pools.run());
  ASSERT_EQ(pools.of(5), Pool::kDevice);
  ASSERT_TRUE(pools.harness.add(make_spec(6, make_prompt(38, 1), 2)).ok());
  ASSERT_TRUE(pools.run());
  EXPECT_EQ(pools.of(6), Pool::kHost);
  pools.harness.run_all();
  EXPECT_EQ(pools.harness.of(6).num_cached_tokens, 0);
  expect_answer(pools.harness, make_spec(3, make_prompt(17, 2), 2));
  expect_answer(pools.harness, make_spec(4, make_prompt(38, 1), 2));
  expect_answer(pools.harness, make_spec(6, make_prompt(38, 1), 2));
  expect_clean(pools.harness);
}

TEST(SchedulerPools, ChoicesShareWithinTheirPool) {
  for (const bool prefix_cache : {true, false}) {
    SchedulerConfig config = split_config(64, 10);
    config.prefix_cache = prefix_cache;
    Pools pools(config);
    // Six blocks of prompt and a few for each choice: some choices share on the device, the others start on the host,
    // where the first of them computes the prompt anew and the rest share with it.
    RequestSpec spec = make_spec(1, make_prompt(22, 1), 6);
    spec.n = 6;
    ASSERT_TRUE(pools.harness.add(spec).ok());
    std::map<Pool, int32_t> num_choices;
    while (pools.run()) {
    }
    for (SequenceId id = 1; id <= spec.n; ++id) ++num_choices[pools.of(id)];
    EXPECT_GT(num_choices[Pool::kDevice], 1);
    EXPECT_GT(num_choices[Pool::kHost], 1);
    for (int32_t choice = 0; choice < spec.n; ++choice) expect_answer(pools.harness, spec, choice);
    expect_clean(pools.harness);
  }
}

// Two on the device, two on the host, all alike but for the pool. The device runs dry first.
TEST(SchedulerPools, OnlyTheShortPoolMakesRoom) {
  SchedulerConfig config = split_config(64, 6);
  config.prefix_cache = false;
  Pools pools(config);
  std::vector<RequestSpec> specs;
  for (int32_t id = 1; id <= 4; ++id) {
    specs.push_back(make_spec(id, make_prompt(7, id), 14));
    ASSERT_TRUE(pools.harness.add(specs.back()).ok());
  }
  while (pools.num_preemptions() == 0) ASSERT_TRUE(pools.run(kInteractive));
  // The last of all, on the host, runs on; the last on the device gave way.
  const size_t before = pools.harness.of(1).tokens.size();
  EXPECT_EQ(pools.harness.of(4).tokens.size(), before);
  EXPECT_EQ(pools.harness.of(3).tokens.size(), before);
  EXPECT_LT(pools.harness.of(2).tokens.size(), before);
  EXPECT_EQ(pools.harness.scheduler.stats().num_running, 3);
  // It starts anew where there is room.
  ASSERT_TRUE(pools.run());
  EXPECT_EQ(pools.of(2), Pool::kHost);
  EXPECT_EQ(pools.of(1), Pool::kDevice);
  pools.harness.run_all();
  EXPECT_EQ(pools.num_preemptions(), 1);
  for (const RequestSpec& spec : specs) expect_answer(pools.harness, spec);
  expect_clean(pools.harness);
}

// A live pass of the host's pool frees nothing that a sequence on the device could take: it gives way at once.
TEST(SchedulerPools, NobodyWaitsForALivePassOfTheOtherPool) {
  SchedulerConfig config = split_config(64, 4);
  config.prefix_cache = false;
  config.reserve_blocks = 0;
  Pools pools(config);
  const RequestSpec first = make_spec(1, make_prompt(5, 1), 8);
  const RequestSpec second = make_spec(2, make_prompt(8, 2), 8);
  const RequestSpec longer = make_spec(3, make_prompt(40, 3), 4);
  ASSERT_TRUE(pools.harness.add(first).ok());
  ASSERT_TRUE(pools.harness.add(second).ok());
  ASSERT_TRUE(pools.run(kInteractive));
  ASSERT_EQ(pools.used(Pool::kDevice), 4);
  ASSERT_TRUE(pools.harness.add(longer).ok());
  const auto bulk = pools.harness.begin(kBulk);  // goes after both, and stays live
  ASSERT_EQ(bulk.size(), 1U);
  EXPECT_EQ(bulk[0].pool, Pool::kHost);
  ASSERT_TRUE(pools.run(kInteractive));  // the second needs its third block, and nobody on the device goes after it
  EXPECT_EQ(pools.num_preemptions(), 1);
  EXPECT_EQ(pools.harness.of(1).tokens.size(), 2U);
  EXPECT_EQ(pools.harness.of(2).tokens.size(), 1U);
  while (pools.harness.advance(kBulk)) {
  }
  pools.harness.commit(kBulk);
  pools.harness.run_all();
  for (const RequestSpec& spec : {first, second, longer}) expect_answer(pools.harness, spec);
  expect_clean(pools.harness);
}

TEST(SchedulerPools, ABlockedHeadStartsWhenEitherPoolHasRoom) {
  for (const SequenceId leaves : {1, 2}) {
    SchedulerConfig config = split_config(8, 8);
    config.reserve_blocks = 0;
    config.prefix_cache = false;
    Pools pools(config);
    for (int32_t id = 1; id <= 3; ++id) ASSERT_TRUE(pools.harness.add(make_spec(id, make_prompt(29, id), 4)).ok());
    ASSERT_TRUE(pools.run(kBulk));
    EXPECT_EQ(pools.harness.scheduler.stats().num_waiting, 1);
    EXPECT_TRUE(pools.harness.scheduler.finish(leaves).empty());
    ASSERT_TRUE(pools.run(kBulk));
    EXPECT_EQ(pools.of(3), pools.of(leaves));
    EXPECT_EQ(pools.harness.scheduler.stats().num_waiting, 0);
    pools.harness.run_all();
    expect_answer(pools.harness, make_spec(3, make_prompt(29, 3), 4));
    expect_clean(pools.harness);
  }
}

TEST(SchedulerPools, ConfigIsRefusedWithTheFieldAndTheLimit) {
  const auto expect_refused = [](const SchedulerConfig& config, const char* field, const char* text) {
    const Status status = validate(config);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << field;
    EXPECT_EQ(status.param(), field) << status.message();
    EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
  };
  EXPECT_TRUE(validate(split_config(4, 8)).ok());
  expect_refused(split_config(4, 0), "kv", "kv wants a pool on the device, which has 0 KV blocks");
  expect_refused(split_config(0, 8), "kv", "kv wants a pool on the host, which has 0 KV blocks");

  SchedulerConfig config = split_config(4, 8);
  config.max_model_len = 33;  // 32 tokens with KV
  EXPECT_TRUE(validate(config).ok());
  config.max_model_len = 34;
  expect_refused(config, "max_model_len", "max_model_len 34 tokens fits no pool that kv allows: the largest has 8");
  config.max_model_len = 33;
  config.kv = KvPlacement::kHost;
  expect_refused(config, "max_model_len", "the largest has 4 KV blocks of 4 tokens");
  config.kv = KvPlacement::kDevice;
  config.num_blocks = 0;
  EXPECT_TRUE(validate(config).ok());

  config.pass_rows_max = 1;
  expect_refused(config, "pass_rows_max", "must be at least 2, not 1");
  config = small_config();
  config.bulk_rows_min = 0;
  expect_refused(config, "bulk_rows_min", "must be at least 1, not 0");
}

}  // namespace
}  // namespace moed
