#include "plan/step_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "plan/memory_budget.h"

namespace moed {
namespace {

StepShape rows(int32_t num_rows, int64_t context_tokens = 0) {
  return {.num_sequences = num_rows, .num_rows = num_rows, .num_sampled = num_rows, .context_tokens = context_tokens};
}

TEST(StepModel, IsTheSlowerOfSweepAndRowsPlusAttention) {
  const StepModel model(100.0, 2.0, 0.01);
  EXPECT_DOUBLE_EQ(model.predict_us(rows(0)), 0.0);
  EXPECT_DOUBLE_EQ(model.predict_us(rows(1)), 100.0);
  EXPECT_DOUBLE_EQ(model.predict_us(rows(50)), 100.0);
  EXPECT_DOUBLE_EQ(model.predict_us(rows(80)), 160.0);
  EXPECT_DOUBLE_EQ(model.predict_us(rows(80, 1000)), 170.0);
}

TEST(StepModel, MoreWorkNeverCostsLess) {
  std::mt19937 random(5);
  for (int i = 0; i < 1000; ++i) {
    const StepModel model(random() % 100, 0.1 * (random() % 100), 0.01 * (random() % 100));
    const auto num_rows = static_cast<int32_t>(random() % 600);
    const int64_t context = random() % 10'000;
    EXPECT_LE(model.predict_us(rows(num_rows, context)), model.predict_us(rows(num_rows + 1, context)));
    EXPECT_LE(model.predict_us(rows(num_rows, context)), model.predict_us(rows(num_rows, context + 1)));
  }
}

// 128 experts of which a row chooses 8: one row reads a sixteenth of them, many rows read nearly all.
const StepCosts kSparse{
    .dense_us = 100.0, .experts_us = 1600.0, .expert_share = 8.0 / 128.0, .row_us = 1.0, .context_us = 0.001};

TEST(StepModel, SweepsTheExpertsThatRowsChoose) {
  const StepModel model(kSparse);
  EXPECT_DOUBLE_EQ(model.sweep_us(), 1700.0);
  EXPECT_NEAR(model.predict_us(rows(1)), 100.0 + 100.0, 1e-9);
  EXPECT_NEAR(model.predict_us(rows(2)), 100.0 + 1600.0 * (1.0 - 15.0 / 16.0 * 15.0 / 16.0), 1e-9);
  EXPECT_NEAR(model.predict_us(rows(512)), 1700.0, 1e-6);
  EXPECT_DOUBLE_EQ(StepModel(StepCosts{.experts_us = 5.0, .expert_share = 1.0}).predict_us(rows(1)), 5.0);
}

TEST(StepModel, TheHostsPartOfASweepSlowsWithRows) {
  // Every row chooses each expert: a quarter of the rate is the link's, the host is bound by products from 10 rows on.
  const StepModel model({.experts_us = 100.0, .expert_share = 1.0, .link_share = 0.25, .host_rows = 10.0});
  EXPECT_DOUBLE_EQ(model.predict_us(rows(1)), 100.0);
  EXPECT_DOUBLE_EQ(model.predict_us(rows(10)), 100.0);
  EXPECT_DOUBLE_EQ(model.predict_us(rows(20)), 100.0 / (0.25 + 0.375));
  EXPECT_NEAR(model.predict_us(rows(1'000'000)), 400.0, 0.1);  // the link alone
}

TEST(StepModel, OneDecodeRowDoesNotRideInALongChunkOfASparseModel) {
  const StepModel model(kSparse);
  EXPECT_FALSE(model.share_sweep(rows(1), rows(512)));
  EXPECT_FALSE(model.share_sweep(rows(4), rows(512)));
  EXPECT_TRUE(model.share_sweep(rows(64), rows(512)));  // their own sweep is nearly as long
}

TEST(StepModel, RidingNeverDoublesTheTimeOfWhoRides) {
  std::mt19937 random(3);
  int num_shared = 0;
  for (int i = 0; i < 3000; ++i) {
    const StepModel model(StepCosts{.dense_us = 1.0 * (random() % 1000),
                                    .experts_us = 1.0 * (random() % 5000),
                                    .expert_share = 0.01 * (random() % 101),
                                    .row_us = 0.01 * (random() % 500),
                                    .context_us = 1e-4 * (random() % 100),
                                    .attended_us = 1e-6 * (random() % 100)});
    StepShape light, heavy, both;
    const auto add = [&](StepShape& shape, int32_t num_cached, int32_t num_new) {
      shape.add(num_cached, num_new, true);
      both.add(num_cached, num_new, true);
    };
    for (auto left = 1 + random() % 64; left > 0; --left) add(light, static_cast<int32_t>(random() % 4000), 1);
    add(heavy, static_cast<int32_t>(random() % 30'000), 1 + static_cast<int32_t>(random() % 512));
    if (!model.share_sweep(light, heavy)) continue;
    ++num_shared;
    EXPECT_LE(model.predict_us(both), 2.0 * model.predict_us(light));
    EXPECT_LE(model.predict_us(both), model.predict_us(light) + model.predict_us(heavy));
  }
  EXPECT_GT(num_shared, 300);
}

TEST(StepShape, RowsAttendToAllBeforeThem) {
  StepShape shape;
  shape.add(0, 3, false);   // 1 + 2 + 3
  shape.add(10, 1, true);   // 11
  shape.add(100, 2, true);  // 101 + 102
  EXPECT_EQ(shape.num_sequences, 3);
  EXPECT_EQ(shape.num_rows, 6);
  EXPECT_EQ(shape.num_sampled, 2);
  EXPECT_EQ(shape.context_tokens, 3 + 11 + 102);
  EXPECT_EQ(shape.attended_tokens, 6 + 11 + 203);
}

TEST(StepModel, AttentionOfAChunkCostsItsProducts) {
  const StepModel model(StepCosts{.dense_us = 100.0, .context_us = 0.01, .attended_us = 0.001});
  StepShape decode, chunk;
  decode.add(31'999, 1, true);
  chunk.add(31'488, 512, true);
  EXPECT_DOUBLE_EQ(model.predict_us(decode), 100.0 + 320.0);  // the KV is read
  EXPECT_DOUBLE_EQ(model.predict_us(chunk), 100.0 + 0.001 * (512.0 * 31'488 + 512 * 513 / 2));
}

TEST(StepModel, SharesASweepOnlyWhenItIsWorthTheDelay) {
  // Streaming: the sweep outweighs any rows. Riding costs nothing and saves a sweep.
  EXPECT_TRUE(StepModel(1e6, 1.0, 0.0).share_sweep(rows(8), rows(512)));
  // Compute-bound: the chunk takes 10x the light pass. Riding would delay each answer by that.
  EXPECT_FALSE(StepModel(50.0, 1.0, 0.0).share_sweep(rows(8), rows(512)));
  // No light rows, nothing to share.
  EXPECT_FALSE(StepModel(1e6, 1.0, 0.0).share_sweep(rows(0), rows(512)));
  EXPECT_FALSE(StepModel(1e6, 1.0, 0.0).share_sweep(rows(8), rows(0)));
  EXPECT_FALSE(StepModel().share_sweep(rows(8), rows(512)));
}

// Once sharing pays for a chunk, it pays for each smaller chunk too.
TEST(StepModel, SmallerChunksAreSharedSooner) {
  std::mt19937 random(9);
  for (int i = 0; i < 300; ++i) {
    const StepModel model(1.0 + random() % 1000, 0.1 + 0.01 * (random() % 500), 0.0);
    const StepShape light = rows(1 + static_cast<int32_t>(random() % 64));
    bool shared = true;
    for (int32_t heavy = 1; heavy <= 1024; heavy *= 2) {
      const bool now = model.share_sweep(light, rows(heavy));
      EXPECT_TRUE(shared || !now) << "chunk of " << heavy;
      shared = now;
    }
  }
}

TEST(Tracker, FollowsALastingChange) {
  for (const double factor : {3.0, 1.0 / 3.0}) {
    for (const StepShape& shape : {rows(4), rows(400), rows(4, 1'000'000)}) {
      const StepModel prior(100.0, 2.0, 0.001);
      Tracker tracker(prior);
      for (int i = 0; i < 50; ++i) tracker.observe(shape, prior.predict_us(shape));
      EXPECT_NEAR(tracker.model().predict_us(shape) / prior.predict_us(shape), 1.0, 1e-9);
      const double changed_us = prior.predict_us(shape) * factor;
      for (int i = 0; i < 25; ++i) tracker.observe(shape, changed_us);
      EXPECT_NEAR(tracker.model().predict_us(shape) / changed_us, 1.0, 0.1) << factor << " " << shape.num_rows;
    }
  }
}

TEST(Tracker, ASingleOutlierMovesItLittle) {
  for (const double outlier : {1000.0, 0.001}) {
    const StepModel prior(100.0, 2.0, 0.001);
    Tracker tracker(prior);
    for (int i = 0; i < 20; ++i) tracker.observe(rows(4), 100.0);
    tracker.observe(rows(4), 100.0 * outlier);
    EXPECT_NEAR(std::log(tracker.model().predict_us(rows(4)) / 100.0), 0.0, std::log(1.095));
  }
}

TEST(Tracker, CorrectsTheTermThatWasMeasured) {
  Tracker tracker(StepModel(100.0, 2.0, 0.0));
  for (int i = 0; i < 50; ++i) tracker.observe(rows(4), 300.0);  // the sweep binds
  EXPECT_NEAR(tracker.model().sweep_us(), 300.0, 10.0);
  EXPECT_DOUBLE_EQ(tracker.model().row_us(), 2.0);
}

TEST(Tracker, ScalesBothSweepsAndTheBindingAttention) {
  StepCosts prior = kSparse;
  prior.attended_us = 1e-4;
  Tracker sweeps((StepModel(prior)));
  for (int i = 0; i < 60; ++i) sweeps.observe(rows(4), 3.0 * StepModel(prior).predict_us(rows(4)));
  EXPECT_NEAR(sweeps.model().costs().dense_us, 300.0, 10.0);
  EXPECT_NEAR(sweeps.model().costs().experts_us, 4800.0, 160.0);
  EXPECT_DOUBLE_EQ(sweeps.model().row_us(), prior.row_us);
  StepShape chunk;
  chunk.add(100'000, 512, true);
  Tracker attention((StepModel(prior)));
  for (int i = 0; i < 60; ++i) attention.observe(chunk, 3.0 * StepModel(prior).predict_us(chunk));
  EXPECT_GT(attention.model().costs().attended_us, 2.0 * prior.attended_us);
  EXPECT_DOUBLE_EQ(attention.model().context_us(), prior.context_us);
  EXPECT_NEAR(attention.model().predict_us(chunk) / StepModel(prior).predict_us(chunk), 3.0, 0.1);
}

TEST(Tracker, StaysNearThePrior) {
  Tracker tracker(StepModel(100.0, 2.0, 0.001));
  for (int i = 0; i < 1000; ++i) tracker.observe(rows(4, 10), 1e12);
  EXPECT_LE(tracker.model().sweep_us(), 6400.0);
  for (int i = 0; i < 1000; ++i) tracker.observe(rows(4, 10), 1e-9);
  EXPECT_GE(tracker.model().sweep_us(), 100.0 / 64.0);
}

TEST(Tracker, IgnoresWhatCannotBeMeasured) {
  Tracker tracker(StepModel(100.0, 2.0, 0.001));
  for (const double us : {0.0, -5.0, std::nan(""), HUGE_VAL}) tracker.observe(rows(4), us);
  tracker.observe(rows(0), 100.0);
  EXPECT_DOUBLE_EQ(tracker.model().sweep_us(), 100.0);
  Tracker empty((StepModel()));
  empty.observe(rows(4), 100.0);
  EXPECT_DOUBLE_EQ(empty.model().predict_us(rows(4)), 0.0);
}

ModelConfig mixtral() {
  ModelConfig config;
  config.hidden_size = 4096;
  config.num_layers = 32;
  config.vocab_size = 32'000;
  config.attention = {.num_heads = 32, .num_kv_heads = 8, .head_dim = 128};
  config.moe.num_experts = 8;
  config.moe.intermediate_size = 14'336;
  config.moe.router.top_k = 2;
  config.layers.assign(32, LayerKind::kMoe);
  return config;
}

// All but 2 * 32'000 * 4096 of embeddings, attention and routers.
constexpr double kExpertBytes = 2 * 32 * 8 * 3 * 4096.0 * 14'336;
constexpr double kExpertFlops = kExpertBytes / 4;  // a row: two of eight experts

const Policy* policy(std::string_view name) {
  for (const Policy& each : policies()) {
    if (each.name == name) return &each;
  }
  return nullptr;
}

TEST(PriorStepModel, MixtralOnAKnownMachine) {
  // 46.7e9 weights in bf16, 12.9e9 of them active (less the embedding table: 12.75e9).
  Planning planning;
  planning.rates = {.host_bytes = 100e3, .host_flops = 1e6};
  const StepModel model = prior_step_model(mixtral(), planning);
  EXPECT_NEAR(model.sweep_us(), 2 * 46.70e9 / 100e3, 0.005 * 934e3);
  EXPECT_NEAR(model.row_us(), 2 * 12.75e9 / 1e6, 0.005 * 25.5e3);
  EXPECT_DOUBLE_EQ(model.context_us(), 131'072 / 100e3);
  EXPECT_NEAR(model.costs().experts_us, kExpertBytes / 100e3, 1.0);
  EXPECT_NEAR(model.costs().dense_us, model.sweep_us() - model.costs().experts_us, 1e-6);
  EXPECT_DOUBLE_EQ(model.costs().expert_share, 0.25);
  EXPECT_DOUBLE_EQ(model.costs().attended_us, 4.0 * 32 * 128 * 32 / 1e6);
}

TEST(PriorStepModel, ReadsEachPartFromWhereThePolicyHasIt) {
  Planning planning;
  planning.residency = {.has_device = true, .num_slots = 64, .resident = {}};
  planning.rates = {
      .link_bytes = 20e3, .host_bytes = 60e3, .host_flops = 2e6, .device_flops = 100e6, .device_bytes = 500e3};
  const auto costs = [&](std::string_view name) {
    planning.policy = policy(name);
    return prior_step_model(mixtral(), planning).costs();
  };
  // Every expert comes in every pass, one row or many.
  EXPECT_NEAR(costs("stream").experts_us, kExpertBytes / 20e3, 1.0);
  EXPECT_DOUBLE_EQ(costs("stream").expert_share, 1.0);
  EXPECT_NEAR(costs("stream").row_us, 2 * 12.75e9 / 100e6, 0.005 * 255);
  // A quarter stands there; link and host share the rest.
  EXPECT_NEAR(costs("hot").experts_us, kExpertBytes * (0.75 / 80e3 + 0.25 / 500e3), 1.0);
  EXPECT_DOUBLE_EQ(costs("hot").expert_share, 0.25);
  EXPECT_NEAR(costs("hot").row_us, costs("stream").row_us, 1e-9);
  EXPECT_DOUBLE_EQ(costs("hot").link_share, 0.25);
  EXPECT_DOUBLE_EQ(costs("hot").host_rows, 2e6 / 60e3);
  EXPECT_DOUBLE_EQ(costs("stream").link_share, 1.0);
  // Beside a device that has the dense weights the host computes what it reads.
  EXPECT_NEAR(costs("host").experts_us, kExpertBytes / 60e3, 1.0);
  EXPECT_NEAR(costs("host").row_us, kExpertFlops / 2e6, 0.02 * kExpertFlops / 2e6);
  for (const char* name : {"stream", "hot", "host"}) {
    EXPECT_DOUBLE_EQ(costs(name).dense_us, costs("stream").dense_us);
    EXPECT_DOUBLE_EQ(costs(name).context_us, 131'072 / 60e3);
  }
  planning.residency.num_slots = 256;
  planning.kv = KvPlacement::kDevice;
  for (int32_t i = 0; i < 256; ++i) planning.residency.resident.push_back({i / 8, i % 8});
  EXPECT_NEAR(costs("device").experts_us, kExpertBytes / 500e3, 1.0);
  EXPECT_DOUBLE_EQ(costs("device").expert_share, 0.25);
  EXPECT_DOUBLE_EQ(costs("device").context_us, 131'072 / 500e3);
}

// MoE-Lens's regime: a pass takes as long as the experts take to come, whoever rides.
TEST(PriorStepModel, DecodersRideWhereEveryPassStreamsTheModel) {
  Planning planning;
  planning.policy = policy("stream");
  planning.residency = {.has_device = true, .num_slots = 16, .resident = {}};
  planning.rates = {
      .link_bytes = 19.5e3, .host_bytes = 130e3, .host_flops = 1.5e6, .device_flops = 97.6e6, .device_bytes = 592e3};
  const StepModel model = prior_step_model(mixtral(), planning);
  StepShape prompt;
  prompt.add(0, 8192, true);
  for (const int32_t decoders : {1, 8, 64}) EXPECT_TRUE(model.share_sweep(rows(decoders, 100), prompt)) << decoders;
}

}  // namespace
}  // namespace moed
