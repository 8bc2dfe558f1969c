#include "plan/memory_budget.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <string>

namespace moed {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

ModelConfig mixtral() {
  ModelConfig config;
  config.hidden_size = 4096;
  config.num_layers = 32;
  config.vocab_size = 32'000;
  config.max_positions = 32'768;
  config.attention = {.num_heads = 32, .num_kv_heads = 8, .head_dim = 128};
  config.rope.rotary_dim = 128;
  config.moe.num_experts = 8;
  config.moe.intermediate_size = 14'336;
  config.moe.router.top_k = 2;
  config.layers.assign(32, LayerKind::kMoe);
  return config;
}

ModelConfig tiny() {
  ModelConfig config;
  config.hidden_size = 64;
  config.num_layers = 3;
  config.vocab_size = 320;
  config.max_positions = 512;
  config.dense_intermediate_size = 160;
  config.tied_embeddings = true;
  config.attention = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 16};
  config.attention.qkv_bias = true;
  config.attention.qk_norm = AttentionConfig::QkNorm::kPerHead;
  config.rope.rotary_dim = 16;
  config.moe.num_experts = 6;
  config.moe.intermediate_size = 32;
  config.moe.router.top_k = 2;
  config.moe.shared_intermediate_size = 96;
  config.moe.shared_gate = true;
  config.layers = {LayerKind::kDense, LayerKind::kMoe, LayerKind::kMoe};
  return config;
}

BudgetLimits limits() { return {.pass_rows_max = 512, .sequences_max = 64, .block_tokens = 16}; }
MachineMemory machine(double gib) {
  return {.host_free_bytes = static_cast<int64_t>(gib * kGiB), .source = "MemAvailable"};
}

TEST(WeightBytes, OfTinyCountedByHand) {
  const int64_t experts = int64_t{2} * 6 * 3 * 64 * 32 * 2;
  EXPECT_EQ(expert_weight_bytes(tiny()), experts);
  // All sizes are multiples of 64 bytes here, so there is no padding.
  const int64_t attention = 2 * (128 * 64 + 64 * 64) + 4 * (2 * 64 + 128 + 2 * 16);
  const int64_t dense = 2 * 3 * 160 * 64;
  const int64_t moe = 2 * (6 * 64 + 3 * 96 * 64 + 64);
  EXPECT_EQ(dense_weight_bytes(tiny()), 2 * 320 * 64 + 4 * 64 + 3 * attention + dense + 2 * moe);
}

TEST(WeightBytes, OfMixtralAsPublished) {
  const int64_t weights = (dense_weight_bytes(mixtral()) + expert_weight_bytes(mixtral())) / 2;
  EXPECT_NEAR(static_cast<double>(weights), 46'702'792'704.0, 1e6);  // the checkpoint's number of parameters
}

TEST(MemoryBudget, KvOfTheAskedSize) {
  BudgetLimits asked = limits();
  asked.kv_gib = 4.0;
  const StatusOr<MemoryBudget> budget = memory_budget(mixtral(), asked, machine(128));
  ASSERT_TRUE(budget.ok()) << budget.status().message();
  EXPECT_EQ(budget->kv_blocks, 4 * kGiB / (131'072 * 16));
  EXPECT_EQ(budget->kv_bytes, 4 * kGiB);
  EXPECT_EQ(budget->max_model_len, 32'768);  // 4 GiB hold exactly one context
}

TEST(MemoryBudget, TheContextIsWhatKvHolds) {
  BudgetLimits asked = limits();
  asked.kv_gib = 1.0;
  EXPECT_EQ(memory_budget(mixtral(), asked, machine(128))->max_model_len, 8192);
}

TEST(MemoryBudget, ByDefaultKvTakesWhatIsLeftButNoMoreThanCanBeUsed) {
  const StatusOr<MemoryBudget> tight = memory_budget(mixtral(), limits(), machine(120));
  ASSERT_TRUE(tight.ok()) << tight.status().message();
  EXPECT_LE(tight->total_bytes(), tight->free_bytes);
  EXPECT_GT(tight->kv_bytes, 10 * kGiB);
  const StatusOr<MemoryBudget> roomy = memory_budget(mixtral(), limits(), machine(4000));
  EXPECT_EQ(roomy->kv_blocks, 16 * 32'768 / 16);
}

TEST(MemoryBudget, ABoxTooSmallIsRefusedWithTheArithmetic) {
  const StatusOr<MemoryBudget> budget = memory_budget(mixtral(), limits(), machine(37.4));
  ASSERT_FALSE(budget.ok());
  EXPECT_EQ(budget.status().code(), StatusCode::kResourceExhausted);
  const std::string& message = budget.status().message();
  for (const char* part :
       {"not enough memory", "need 8", "weights 87.0", "experts 84.0", "KV 0.0", "activations 0.", "process 0.4",
        "free 37.4 (MemAvailable)", "one context of 256 tokens, with 4.7 GiB left to the machine"}) {
    EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
  }
  BudgetLimits asked = limits();
  asked.kv_gib = 50.0;
  const StatusOr<MemoryBudget> kv = memory_budget(mixtral(), asked, machine(120));
  ASSERT_FALSE(kv.ok());
  EXPECT_NE(kv.status().message().find("KV 50.0"), std::string::npos) << kv.status().message();
}

TEST(MemoryBudget, ContradictionsNameTheSetting) {
  const auto refused = [](BudgetLimits asked) {
    const StatusOr<MemoryBudget> budget = memory_budget(mixtral(), asked, machine(128));
    EXPECT_FALSE(budget.ok());
    EXPECT_EQ(budget.status().code(), StatusCode::kInvalidArgument) << budget.status().message();
    return budget.status();
  };
  BudgetLimits asked = limits();
  asked.max_model_len = 40'000;
  EXPECT_EQ(refused(asked).message(), "max_model_len 40000 is above the model's 32768 (max_position_embeddings)");
  asked.max_model_len = 16'384;
  asked.kv_gib = 1.0;
  const Status small = refused(asked);
  EXPECT_EQ(small.param(), "kv_gib");
  EXPECT_NE(small.message().find("holds 8192 tokens; one context of 16384 needs 2.0"), std::string::npos)
      << small.message();
  for (const double kv : {-1.0, std::numeric_limits<double>::quiet_NaN()}) {
    BudgetLimits bad = limits();
    bad.kv_gib = kv;
    EXPECT_EQ(refused(bad).param(), "kv_gib");
  }
  BudgetLimits no_rows = limits();
  no_rows.pass_rows_max = 0;
  EXPECT_EQ(refused(no_rows).param(), "pass_rows_max");
  BudgetLimits no_sequences = limits();
  no_sequences.sequences_max = 0;
  EXPECT_EQ(refused(no_sequences).param(), "sequences_max");
}

TEST(MemoryBudget, WhatItGrantsFitsAndHoldsAContext) {
  std::mt19937 random(13);
  for (int i = 0; i < 2000; ++i) {
    BudgetLimits asked{.kv_gib = random() % 2 == 0 ? 0.0 : 0.001 * (1 + random() % 3000),
                       .max_model_len = random() % 2 == 0 ? 0 : 1 + static_cast<int32_t>(random() % 600),
                       .pass_rows_max = 1 + static_cast<int32_t>(random() % 1024),
                       .sequences_max = 1 + static_cast<int32_t>(random() % 512),
                       .block_tokens = 1 << (random() % 6)};
    const StatusOr<MemoryBudget> budget = memory_budget(tiny(), asked, machine(0.01 * (random() % 300)));
    if (!budget.ok()) continue;
    EXPECT_LE(budget->total_bytes(), budget->free_bytes);
    EXPECT_GT(budget->max_model_len, 0);
    EXPECT_LE(budget->max_model_len, budget->kv_blocks * asked.block_tokens);
    EXPECT_LE(budget->max_model_len, tiny().max_positions);
    EXPECT_EQ(budget->kv_bytes, budget->kv_blocks * asked.block_tokens * tiny().kv_bytes_per_token());
    const int32_t wanted = asked.max_model_len;
    EXPECT_TRUE(wanted == 0 || budget->max_model_len == wanted) << budget->max_model_len;
  }
}

TEST(MemoryBudget, MoreRowsAndSequencesNeedMore) {
  BudgetLimits asked = limits();
  asked.kv_gib = 1.0;
  const int64_t base = memory_budget(mixtral(), asked, machine(128))->activation_bytes;
  BudgetLimits rows = asked;
  rows.pass_rows_max *= 2;
  EXPECT_GT(memory_budget(mixtral(), rows, machine(128))->activation_bytes, base * 3 / 2);
  BudgetLimits sequences = asked;
  sequences.sequences_max *= 2;
  EXPECT_GT(memory_budget(mixtral(), sequences, machine(128))->activation_bytes, base);
}

}  // namespace
}  // namespace moed
