#include "plan/plan.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <random>
#include <string>

namespace moed {
namespace {

ModelConfig model() {
  ModelConfig config;
  config.num_layers = 3;
  config.layers = {LayerKind::kDense, LayerKind::kMoe, LayerKind::kMoe};
  config.moe.num_experts = 8;
  return config;
}

constexpr StepShape kShape{.num_sequences = 4, .num_rows = 9, .num_sampled = 4, .context_tokens = 100};

// A device on which no expert is resident.
const Residency kEmpty{.has_device = true, .num_slots = 1, .resident = {}};

StepPlan device_plan() {
  StepPlan plan = host_plan(kShape, model());
  plan.split = 2;
  plan.layers[1] = LayerMode::kWhole;
  plan.prefetch = {{1, 0}, {2, 7}};
  plan.costs = {.copy_us = 10.0, .device_row_us = 1.0, .host_base_us = 5.0, .host_row_us = 2.0};
  return plan;
}

TEST(Plan, TheHostPlanIsValidForAnyPass) {
  std::mt19937 random(3);
  for (int i = 0; i < 100; ++i) {
    const StepShape shape{.num_sequences = 1 + static_cast<int32_t>(random() % 500)};
    const StepPlan plan = host_plan(shape, model());
    EXPECT_EQ(plan.split, shape.num_sequences);  // one half
    EXPECT_TRUE(validate(plan, shape, model(), kEmpty).ok());
  }
  EXPECT_TRUE(validate(device_plan(), kShape, model(), kEmpty).ok());
}

TEST(Plan, RefusalsNameFieldLayerAndExpert) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  struct Case {
    const char* param;
    std::function<void(StepPlan&)> spoil;
    const char* text;
  };
  const Case cases[] = {
      {"split", [](StepPlan& p) { p.split = 0; }, "split 0 is not within the pass's 4 sequences"},
      {"split", [](StepPlan& p) { p.split = 5; }, "split 5"},
      {"layers", [](StepPlan& p) { p.layers.pop_back(); }, "2 modes; the model has 3 layers"},
      {"layers", [](StepPlan& p) { p.layers[2] = static_cast<LayerMode>(7); }, "layers[2]"},
      {"prefetch",
       [](StepPlan& p) {
         p.prefetch.push_back({3, 0});
       },
       "layer 3, expert 0; the model has 3 layers"},
      {"prefetch",
       [](StepPlan& p) {
         p.prefetch.push_back({-1, 0});
       },
       "layer -1, expert 0"},
      {"prefetch",
       [](StepPlan& p) {
         p.prefetch.push_back({0, 1});
       },
       "layer 0, expert 1; that layer has no experts"},
      {"prefetch",
       [](StepPlan& p) {
         p.prefetch.push_back({1, 8});
       },
       "layer 1, expert 8; the layer has 8 experts"},
      {"prefetch",
       [](StepPlan& p) {
         p.prefetch.push_back({1, -1});
       },
       "layer 1, expert -1"},
      {"prefetch",
       [](StepPlan& p) {
         p.prefetch.push_back({2, 7});
       },
       "layer 2, expert 7 twice"},
      {"costs.copy_us", [=](StepPlan& p) { p.costs.copy_us = kNan; }, "NaN"},
      {"costs.host_row_us", [](StepPlan& p) { p.costs.host_row_us = -1.0; }, "negative"},
      {"costs", [=](StepPlan& p) { p.costs.copy_us = p.costs.host_base_us = kInf; },
       "layer 1, expert 0 would have no place: the layer is to come whole, but costs forbid both the host and"},
      {"layers", [=](StepPlan& p) { p.costs.copy_us = kInf; },
       "layer 1, expert 0 would have no place: the layer is to come whole, but costs forbid copies or the device"},
      {"layers", [=](StepPlan& p) { p.costs.device_row_us = kInf; }, "layer 1, expert 0 would have no place"},
      {"prefetch",
       [=](StepPlan& p) {
         p.layers[1] = LayerMode::kRouted;
         p.costs.copy_us = kInf;
       },
       "prefetch names layer 1, expert 0, but costs forbid copies"},
  };
  for (const Case& c : cases) {
    StepPlan plan = device_plan();
    c.spoil(plan);
    const Status status = validate(plan, kShape, model(), kEmpty);
    ASSERT_FALSE(status.ok()) << c.text;
    EXPECT_EQ(status.param(), c.param);
    EXPECT_NE(status.message().find(c.text), std::string::npos) << status.message();
  }
}

std::vector<ExpertId> experts_of(int32_t layer) {
  std::vector<ExpertId> experts;
  for (int32_t expert = 0; expert < model().moe.num_experts; ++expert) experts.push_back({layer, expert});
  return experts;
}

TEST(Plan, WhatIsResidentNeedsNoOtherPlace) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  StepPlan plan = device_plan();
  plan.prefetch.clear();
  plan.layers[2] = LayerMode::kWhole;
  plan.costs = {.copy_us = kInf, .device_row_us = 1.0, .host_base_us = kInf};
  Residency residency{.has_device = true, .num_slots = 16, .resident = experts_of(1)};
  Status status = validate(plan, kShape, model(), residency);
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.param(), "costs");
  EXPECT_NE(status.message().find("layer 2, expert 0 would have no place"), std::string::npos) << status.message();
  const std::vector<ExpertId> others = experts_of(2);
  residency.resident.insert(residency.resident.end(), others.begin(), others.end());
  EXPECT_TRUE(validate(plan, kShape, model(), residency).ok());
  residency.resident.erase(residency.resident.begin() + 13);
  status = validate(plan, kShape, model(), residency);
  ASSERT_FALSE(status.ok());
  EXPECT_NE(status.message().find("layer 2, expert 5 would have no place"), std::string::npos) << status.message();
}

TEST(Plan, WhatNeedsADeviceIsRefusedWithoutOne) {
  const Residency nothing;
  EXPECT_TRUE(validate(host_plan(kShape, model()), kShape, model(), nothing).ok());
  StepPlan plan = device_plan();
  Status status = validate(plan, kShape, model(), nothing);
  EXPECT_EQ(status.param(), "layers");
  EXPECT_NE(status.message().find("layer 1, expert 0"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("there is no device"), std::string::npos) << status.message();
  plan.layers[1] = LayerMode::kRouted;
  status = validate(plan, kShape, model(), Residency{.has_device = true, .num_slots = 0, .resident = {}});
  EXPECT_EQ(status.param(), "prefetch");
  EXPECT_NE(status.message().find("the device has no slots"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace moed
