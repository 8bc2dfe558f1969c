// The budget is arithmetic of plan/, the buffers are engine/'s: what is granted must cover what is taken.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "engine/hybrid_engine.h"
#include "plan/memory_budget.h"

namespace moed {
namespace {

ModelConfig random_model(std::mt19937& random) {
  const auto between = [&](int32_t low, int32_t high) {
    return low + static_cast<int32_t>(random() % (high - low + 1));
  };
  ModelConfig config;
  config.hidden_size = 8 * between(1, 600);
  config.num_layers = between(1, 60);
  config.vocab_size = between(1, 200'000);
  config.max_positions = between(300, 50'000);
  config.dense_intermediate_size = between(1, 20'000);
  config.attention.num_kv_heads = between(1, 8);
  config.attention.num_heads = config.attention.num_kv_heads * between(1, 8);
  config.attention.head_dim = 2 * between(4, 128);
  config.rope.rotary_dim = config.attention.head_dim;
  config.moe.num_experts = between(1, 256);
  config.moe.intermediate_size = between(1, 4000);
  config.moe.router.top_k = between(1, std::min(8, config.moe.num_experts));
  config.moe.shared_intermediate_size = between(0, 1) * between(1, 4000);
  for (int32_t i = 0; i < config.num_layers; ++i)
    config.layers.push_back(between(0, 2) == 0 ? LayerKind::kDense : LayerKind::kMoe);
  if (std::find(config.layers.begin(), config.layers.end(), LayerKind::kMoe) == config.layers.end()) config.moe = {};
  return config;
}

EngineConfig engine_config(const BudgetLimits& limits, const MemoryBudget& budget) {
  return {.rows_max = limits.pass_rows_max,
          .sequences_max = limits.sequences_max,
          .max_model_len = budget.max_model_len,
          .kv_blocks = budget.kv_blocks,
          .block_tokens = limits.block_tokens,
          .device_kv_blocks = budget.device.kv_blocks,
          .staging_blocks = budget.device.staging_blocks};
}

TEST(MemoryBudget, ActivationsCoverWhatTheEngineTakes) {
  std::mt19937 random(17);
  for (int i = 0; i < 500; ++i) {
    const ModelConfig model = random_model(random);
    BudgetLimits limits{.kv_gib = 1000.0,
                        .pass_rows_max = 1 + static_cast<int32_t>(random() % 2048),
                        .sequences_max = 1 + static_cast<int32_t>(random() % 1024),
                        .block_tokens = 16};
    MachineMemory machine{.host_free_bytes = int64_t{1} << 50, .source = "test"};
    const StatusOr<MemoryBudget> alone = memory_budget(model, limits, machine);
    ASSERT_TRUE(alone.ok()) << alone.status().message();
    EXPECT_GE(alone->activation_bytes, engine_activation_bytes(model, engine_config(limits, *alone))) << "case " << i;

    machine.device_bytes = int64_t{1} << 50;
    limits.experts_on_device = true;
    limits.kv = KvPlacement::kSplit;
    const StatusOr<MemoryBudget> beside = memory_budget(model, limits, machine);
    ASSERT_TRUE(beside.ok()) << beside.status().message();
    const EngineBytes taken = engine_activations(model, engine_config(limits, *beside), false);
    EXPECT_GE(beside->device.activation_bytes, taken.device_bytes) << "case " << i;
    EXPECT_GE(beside->activation_bytes, taken.host_bytes) << "case " << i;
  }
}

}  // namespace
}  // namespace moed
