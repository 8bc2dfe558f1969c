#include "plan/bound.h"

#include <gtest/gtest.h>

#include <cmath>

namespace moed {
namespace {

MachineProfile machine() {
  MachineProfile profile;
  profile.link_bytes = 10.0;
  profile.device_bytes = 100.0;
  profile.device_flops = 1000.0;
  profile.host_bytes = 20.0;
  profile.host_flops = 50.0;
  profile.attention_bytes = 20.0;
  profile.attention_flops = 40.0;
  profile.interference = {{0.0, 1.0}, {1.0, 0.5}};
  return profile;
}

TEST(Bound, EachPartAlone) {
  LeastWork work;
  work.link_bytes = 100.0;
  EXPECT_DOUBLE_EQ(closed_form_bound(machine(), work).us(), 10.0);
  EXPECT_STREQ(closed_form_bound(machine(), work).binding(), "link");
  work = {.attention_bytes = 100.0, .attention_flops = 400.0};
  EXPECT_DOUBLE_EQ(closed_form_bound(machine(), work).us(), 10.0);
  EXPECT_STREQ(closed_form_bound(machine(), work).binding(), "host");
  work = {.host_bytes = 100.0, .host_flops = 100.0};
  EXPECT_DOUBLE_EQ(closed_form_bound(machine(), work).us(), 5.0);
  work = {.device_bytes = 100.0, .device_flops = 20'000.0};
  EXPECT_DOUBLE_EQ(closed_form_bound(machine(), work).us(), 20.0);
  EXPECT_STREQ(closed_form_bound(machine(), work).binding(), "device");
}

// The host takes all of DRAM: the link keeps 5, the host gets the 15 that are left.
TEST(Bound, TheLinkAndTheHostSlowEachOther) {
  const LeastWork copies_last{.link_bytes = 100.0, .attention_bytes = 150.0};
  const Bound last = closed_form_bound(machine(), copies_last);
  EXPECT_DOUBLE_EQ(last.host_us, 10.0);
  EXPECT_DOUBLE_EQ(last.link_us, 10.0 + (100.0 - 50.0) / 10.0);
  const LeastWork host_last{.link_bytes = 100.0, .attention_bytes = 600.0};
  const Bound first = closed_form_bound(machine(), host_last);
  EXPECT_DOUBLE_EQ(first.link_us, 20.0);
  EXPECT_DOUBLE_EQ(first.host_us, 20.0 + (600.0 - 20.0 * 15.0) / 20.0);
}

TEST(Bound, WhatEitherMayTakeEndsOnBothAtOnce) {
  const LeastWork work{.shared_bytes = 300.0, .shared_flops = 300.0};
  EXPECT_DOUBLE_EQ(closed_form_bound(machine(), work).us(), 15.0);  // 5 over the link, 15 read by the host
  const LeastWork heavy{.shared_bytes = 300.0, .shared_flops = 3000.0};
  // 50 FLOP are 5 bytes here, a quarter of DRAM: the link keeps 8.75.
  EXPECT_DOUBLE_EQ(closed_form_bound(machine(), heavy).us(), 300.0 / 13.75);
}

// The sums of performance-model.md, Mixtral's shape: all but the kept experts a pass, those that rows choose on the
// host.
TEST(Bound, LeastWorkOfPolicies) {
  ModelConfig config;
  config.hidden_size = 64;
  config.num_layers = 3;
  config.vocab_size = 100;
  config.attention = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 16};
  config.moe.num_experts = 8;
  config.moe.intermediate_size = 32;
  config.moe.router.top_k = 2;
  config.layers = {LayerKind::kMoe, LayerKind::kMoe, LayerKind::kMoe};
  StepShape shape;
  for (int i = 0; i < 4; ++i) shape.add(9, 1, true);
  const double blob = 3.0 * 64 * 32 * 2;
  const double dense = (64.0 * 64 + 64 * 64 + 64 * 64 + 64 * 8) * 3 + 64 * 100;
  const double chosen = 3 * 8 * (1 - std::pow(0.75, 4));
  const auto planning = [&](const char* name, int32_t slots) {
    Planning out;
    for (const Policy& policy : policies()) {
      if (std::string_view(policy.name) == name) out.policy = &policy;
    }
    out.residency.has_device = true;
    out.residency.num_slots = slots;
    return out;
  };
  const LeastWork streamed = least_work(config, shape, planning("stream", 4), 1.0);
  EXPECT_DOUBLE_EQ(streamed.link_bytes, 24 * blob);
  EXPECT_DOUBLE_EQ(streamed.attention_bytes, 4 * 10 * 2.0 * 2 * 32 * 3);
  EXPECT_DOUBLE_EQ(streamed.attention_flops, 4.0 * 4 * 10 * 64 * 3);
  EXPECT_DOUBLE_EQ(streamed.device_bytes, dense * 2 + chosen * blob);
  EXPECT_DOUBLE_EQ(streamed.device_flops, 2 * dense * 4 + 4 * 2 * 3 * 6.0 * 64 * 32);
  const LeastWork hot = least_work(config, shape, planning("hot", 6), 0.25);
  EXPECT_DOUBLE_EQ(hot.link_bytes, 0.0);
  EXPECT_DOUBLE_EQ(hot.shared_bytes, chosen * blob * 18 / 24);
  EXPECT_DOUBLE_EQ(hot.attention_bytes, 0.25 * 4 * 10 * 2.0 * 2 * 32 * 3);
  const LeastWork host = least_work(config, shape, planning("host", 0), 0.0);
  EXPECT_DOUBLE_EQ(host.host_bytes, chosen * blob);
  EXPECT_DOUBLE_EQ(host.host_flops, 4 * 2 * 3 * 6.0 * 64 * 32);
}

}  // namespace
}  // namespace moed
