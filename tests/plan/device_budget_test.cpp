#include "plan/device_budget.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <string>

#include "plan/memory_budget.h"

namespace moed {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kGiB = int64_t{1} << 30;

// 1 GiB of dense weights, 100 experts of 100 MiB, KV blocks of 1 MiB, contexts of 64 blocks.
DeviceDemand demand() {
  return {.dense_weight_bytes = kGiB,
          .activation_bytes = 256 * kMiB,
          .block_bytes = kMiB,
          .staging_block_bytes = kMiB / 32,
          .context_blocks = 64,
          .useful_blocks = 16,
          .contexts_max = 16,
          .kv = KvPlacement::kHost,
          .expert_bytes = 100 * kMiB,
          .num_experts = 100,
          .passing_slots = 2};
}

TEST(DeviceBudget, WhatIsLeftBecomesSlots) {
  const StatusOr<DeviceBudget> budget = device_budget(demand(), 4 * kGiB);
  ASSERT_TRUE(budget.ok()) << budget.status().message();
  EXPECT_EQ(budget->kv_blocks, 0);
  EXPECT_EQ(budget->staging_blocks, 128);  // two contexts, less than an eighth of what is left
  // 4096 - 1024 - 256 - 64 (rounding) - 4 (staging) MiB
  EXPECT_EQ(budget->num_slots, 2748 / 100);
  EXPECT_EQ(device_budget(demand(), 400 * kGiB)->num_slots, 100);
}

TEST(DeviceBudget, KvOnTheDeviceTakesItsShare) {
  DeviceDemand asked = demand();
  asked.kv = KvPlacement::kDevice;
  const StatusOr<DeviceBudget> shared = device_budget(asked, 4 * kGiB);
  ASSERT_TRUE(shared.ok()) << shared.status().message();
  EXPECT_EQ(shared->kv_blocks, (4096 - 1024 - 256 - 64 - 200) / 4);
  EXPECT_EQ(shared->staging_blocks, 0);  // no prompt's KV goes anywhere
  asked.kv_gib = 0.5;
  EXPECT_EQ(device_budget(asked, 4 * kGiB)->kv_blocks, 512);
  // Where no expert wants what is left, it is KV's, as far as that is of use.
  asked = demand();
  asked.kv = KvPlacement::kDevice;
  asked.num_experts = 0;
  EXPECT_EQ(device_budget(asked, 4 * kGiB)->kv_blocks, 1024);
  EXPECT_EQ(device_budget(asked, 2 * kGiB)->kv_blocks, 2048 - 1024 - 256 - 32);
}

TEST(DeviceBudget, ARingOfTheAskedSize) {
  DeviceDemand asked = demand();
  asked.num_resident = 5;
  asked.ring_slots = 7;
  EXPECT_EQ(device_budget(asked, 4 * kGiB)->num_slots, 7);
}

TEST(DeviceBudget, RefusalsNameTheSettingAndTheArithmetic) {
  struct Case {
    std::function<void(DeviceDemand&)> spoil;
    double gib;
    StatusCode code;
    const char* param;
    const char* text;
  };
  constexpr StatusCode kSmall = StatusCode::kResourceExhausted;
  constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
  const Case cases[] = {
      {[](DeviceDemand&) {}, 1.25, kSmall, "device.device_memory_gib",
       "too small for the dense weights and one expert: need 1.4 GiB: dense weights 1.0 GiB, activations 256.0 MiB, KV "
       "0.0 MiB (0 blocks), staging 0.0 MiB, 1 expert slots 100.0 MiB, rounding 20.0 MiB; the device has 1.2 GiB"},
      {[](DeviceDemand& d) { d.num_experts = 0; }, 1.0, kSmall, "device.device_memory_gib", "for the dense weights:"},
      {[](DeviceDemand& d) { d.all_resident = true; }, 8.0, kSmall, "device.device_memory_gib",
       "too small for all experts, as placement.policy device has it: need 11.1 GiB"},
      {[](DeviceDemand& d) { d.num_resident = 60; }, 4.0, kSmall, "device.device_memory_gib",
       "60 resident experts (placement.resident_experts) and 2 that pass through: need"},
      {[](DeviceDemand& d) { d.ring_slots = 30; }, 4.0, kInvalid, "placement.ring_slots",
       "placement.ring_slots is 30, but so large a ring does not fit the device: need 4.2 GiB"},
      {[](DeviceDemand& d) { d.ring_slots = 101; }, 40.0, kInvalid, "placement.ring_slots",
       "101, but the model has 100 experts"},
      {[](DeviceDemand& d) { d.ring_slots = 1; }, 40.0, kInvalid, "placement.ring_slots",
       "1, but 0 resident experts and 2 that pass through need 2"},
      {[](DeviceDemand& d) { d.ring_slots = -1; }, 40.0, kInvalid, "placement.ring_slots", "not be negative"},
      {[](DeviceDemand& d) {
         d.kv = KvPlacement::kDevice;
         d.kv_gib = 3.0;
       },
       4.0, kSmall, "device.device_memory_gib", "a KV cache of memory.device_kv_gib: need 4.5 GiB"},
      {[](DeviceDemand& d) {
         d.kv = KvPlacement::kDevice;
         d.kv_gib = 0.01;
       },
       4.0, kInvalid, "memory.device_kv_gib", "holds 10 blocks; one context of use needs 16, 16.0 MiB"},
      {[](DeviceDemand& d) {
         d.kv = KvPlacement::kDevice;
         d.useful_blocks = 3000;
       },
       4.0, kSmall, "device.device_memory_gib", "the KV of one context"},
  };
  for (const Case& c : cases) {
    DeviceDemand asked = demand();
    c.spoil(asked);
    const StatusOr<DeviceBudget> budget = device_budget(asked, static_cast<int64_t>(c.gib * kGiB));
    ASSERT_FALSE(budget.ok()) << c.text;
    EXPECT_EQ(budget.status().code(), c.code) << budget.status().message();
    EXPECT_EQ(budget.status().param(), c.param);
    EXPECT_NE(budget.status().message().find(c.text), std::string::npos) << budget.status().message();
  }
}

TEST(DeviceBudget, WhatItGrantsFits) {
  std::mt19937 random(14);
  int num_granted = 0;
  for (int i = 0; i < 5000; ++i) {
    DeviceDemand asked = demand();
    asked.kv = static_cast<KvPlacement>(random() % 3);
    asked.kv_gib = random() % 2 == 0 ? 0.0 : 0.01 * (random() % 200);
    asked.num_experts = random() % 120;
    asked.num_resident = asked.num_experts > 0 ? random() % asked.num_experts : 0;
    asked.all_resident = random() % 8 == 0;
    asked.ring_slots = random() % 2 == 0 ? 0 : random() % 130;
    const int64_t memory_bytes = static_cast<int64_t>(random() % 20'000) * kMiB;
    const StatusOr<DeviceBudget> budget = device_budget(asked, memory_bytes);
    if (!budget.ok()) continue;
    ++num_granted;
    EXPECT_LE(budget->total_bytes(), memory_bytes);
    EXPECT_LE(budget->num_slots, asked.num_experts);
    EXPECT_EQ(budget->slot_bytes, budget->num_slots * asked.expert_bytes);
    EXPECT_GE(budget->num_slots, std::min(asked.num_experts, asked.num_resident + asked.passing_slots));
    EXPECT_EQ(budget->kv_bytes, budget->kv_blocks * asked.block_bytes);
    EXPECT_EQ(budget->kv_blocks > 0, asked.kv != KvPlacement::kHost);
    if (asked.ring_slots != 0) {
      EXPECT_EQ(budget->num_slots, asked.ring_slots);
    }
  }
  EXPECT_GT(num_granted, 500);
}

ModelConfig small_model() {
  ModelConfig config;
  config.hidden_size = 64;
  config.num_layers = 2;
  config.vocab_size = 320;
  config.max_positions = 512;
  config.attention = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 16};
  config.rope.rotary_dim = 16;
  config.moe.num_experts = 6;
  config.moe.intermediate_size = 32;
  config.moe.router.top_k = 2;
  config.layers = {LayerKind::kDense, LayerKind::kMoe};
  config.dense_intermediate_size = 64;
  return config;
}

// The device's part inside the whole.
TEST(MemoryBudget, ADeviceAddsItsPart) {
  const MachineMemory machine{.host_free_bytes = 8 * kGiB, .source = "MemAvailable", .device_bytes = kGiB};
  BudgetLimits limits{.pass_rows_max = 64, .sequences_max = 4, .experts_on_device = true};
  const StatusOr<MemoryBudget> host_kv = memory_budget(small_model(), limits, machine);
  ASSERT_TRUE(host_kv.ok()) << host_kv.status().message();
  EXPECT_EQ(host_kv->device.num_slots, 6);
  EXPECT_EQ(host_kv->device.slot_bytes, 6 * 3 * 64 * 32 * 2);
  EXPECT_EQ(host_kv->device.dense_weight_bytes, dense_weight_bytes(small_model()));
  EXPECT_GT(host_kv->kv_blocks, 0);
  EXPECT_EQ(host_kv->device.kv_blocks, 0);
  limits.kv = KvPlacement::kDevice;
  const StatusOr<MemoryBudget> device_kv = memory_budget(small_model(), limits, machine);
  ASSERT_TRUE(device_kv.ok()) << device_kv.status().message();
  EXPECT_EQ(device_kv->kv_blocks, 0);
  EXPECT_EQ(device_kv->kv_bytes, 0);
  EXPECT_EQ(device_kv->device.kv_blocks, 4 * 512 / 16);
  EXPECT_EQ(device_kv->max_model_len, 512);
  limits.kv = KvPlacement::kSplit;
  const StatusOr<MemoryBudget> split = memory_budget(small_model(), limits, machine);
  EXPECT_GT(split->kv_blocks, 0);
  EXPECT_GT(split->device.kv_blocks, 0);
}

TEST(MemoryBudget, ADeviceInTheHostsMemoryCountsTwice) {
  MachineMemory machine{.host_free_bytes = 8 * kGiB, .source = "MemAvailable", .device_bytes = 4 * kGiB};
  BudgetLimits limits{.pass_rows_max = 64, .sequences_max = 4, .experts_on_device = true};
  limits.kv = KvPlacement::kDevice;
  limits.device_kv_gib = 2.0;
  const MemoryBudget apart = memory_budget(small_model(), limits, machine).value();
  EXPECT_EQ(apart.emulated_bytes, 0);
  machine.device_is_host = true;
  const MemoryBudget within = memory_budget(small_model(), limits, machine).value();
  EXPECT_EQ(within.device.total_bytes(), apart.device.total_bytes());
  EXPECT_GE(within.device.total_bytes(), 2 * kGiB);
  EXPECT_EQ(within.total_bytes(), apart.total_bytes() + apart.device.total_bytes());
  machine.host_free_bytes = within.total_bytes() - 1;
  const auto refused = memory_budget(small_model(), limits, machine);
  EXPECT_EQ(refused.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(refused.status().message().find("emulated device 2."), std::string::npos) << refused.status().message();
  machine.device_is_host = false;
  EXPECT_TRUE(memory_budget(small_model(), limits, machine).ok());
}

TEST(MemoryBudget, WithoutADeviceNothingLiesOnIt) {
  const MachineMemory machine{.host_free_bytes = 8 * kGiB, .source = "MemAvailable"};
  BudgetLimits limits{.pass_rows_max = 64, .sequences_max = 4, .experts_on_device = true};
  EXPECT_EQ(memory_budget(small_model(), limits, machine).status().param(), "placement.policy");
  limits.experts_on_device = false;
  const StatusOr<MemoryBudget> budget = memory_budget(small_model(), limits, machine);
  ASSERT_TRUE(budget.ok()) << budget.status().message();
  EXPECT_EQ(budget->device.total_bytes(), 0);
  limits.kv = KvPlacement::kSplit;
  EXPECT_FALSE(memory_budget(small_model(), limits, machine).ok());
}

}  // namespace
}  // namespace moed
