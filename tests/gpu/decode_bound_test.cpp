#include "tests/gpu/decode_bound.h"

#include <gtest/gtest.h>

namespace moed {
namespace {

using Json = nlohmann::ordered_json;

Json bench(const char* model, int32_t layers, const char* policy = "stream", int32_t slots = 40) {
  return {{"model", model}, {"layers", layers}, {"policy", policy}, {"expert_slots", slots}, {"resident_experts", 0}};
}

// A link of 25 GB/s, a device of 900 GB/s and 150 TFLOP/s.
Json probe() {
  return {{"tiny", false},
          {"copy_up_gb_per_s", 25.0},
          {"linear_1_row_gb_per_s", 800.0},
          {"linear_4_rows_gb_per_s", 700.0},
          {"linear_8_rows_gb_per_s", 700.0},
          {"linear_16_rows_gb_per_s", 700.0},
          {"linear_32_rows_gb_per_s", 700.0},
          {"linear_many_rows_tflop_per_s", 150.0},
          {"experts_2_rows_gb_per_s", 900.0},
          {"experts_many_rows_tflop_per_s", 100.0}};
}

TEST(DecodeBound, AProbeThatWasCutOffBoundsByWhatItHas) {
  const Json cut = {{"tiny", false}, {"copy_up_gb_per_s", 25.0}};
  EXPECT_EQ(decode_bound(bench("mixtral-8x7b", 16), cut, 64.0).at("new_tokens_per_s"),
            decode_bound(bench("mixtral-8x7b", 16), probe(), 64.0).at("new_tokens_per_s"));
  EXPECT_TRUE(decode_bound(bench("mixtral-8x7b", 16), {{"tiny", false}}, 64.0).is_null());
}

// Policy stream keeps nothing from pass to pass, however many slots there are.
TEST(DecodeBound, EveryExpertOfEveryLayerIsCopied) {
  const double mixtral_gb = 16 * 8 * 3.0 * 4096 * 14336 * 2e-9;
  const Json bound = decode_bound(bench("mixtral-8x7b", 16), probe(), 64.0);
  EXPECT_EQ(bound.at("what"), "link");
  EXPECT_NEAR(bound.at("experts_copied_gb_a_pass").get<double>(), mixtral_gb, 1e-6);
  EXPECT_NEAR(bound.at("link_ms").get<double>(), 1e3 * mixtral_gb / 25.0, 1e-3);
  EXPECT_NEAR(bound.at("new_tokens_per_s").get<double>(), 64.0 * 25.0 / mixtral_gb, 1e-6);
  const double qwen_gb = 48 * 128 * 3.0 * 2048 * 768 * 2e-9;
  EXPECT_NEAR(decode_bound(bench("qwen3-30b-a3b", 48), probe(), 64.0).at("experts_copied_gb_a_pass").get<double>(),
              qwen_gb, 1e-6);
}

TEST(DecodeBound, TheDeviceBindsWhereNothingIsCopied) {
  const Json bound = decode_bound(bench("mixtral-8x7b", 16, "device", 128), probe(), 64.0);
  EXPECT_EQ(bound.at("what"), "device");
  // With 64 rows all experts are read; at least these, at the best rate that was seen.
  EXPECT_GT(bound.at("device_ms").get<double>(), 16 * 8 * 3.0 * 4096 * 14336 * 2e-9 / 900.0 * 1e3);
}

TEST(DecodeBound, WhatIsUnknownBoundsNothing) {
  EXPECT_TRUE(decode_bound(bench("mixtral-8x7b", 16, "hot"), probe(), 64.0).is_null());
  EXPECT_TRUE(decode_bound(bench("mixtral-8x7b", 16), probe(), 0.0).is_null());
  EXPECT_TRUE(decode_bound(bench("/models/mine", 16), probe(), 64.0).is_null());
  Json tiny = probe();
  tiny["tiny"] = true;
  EXPECT_TRUE(decode_bound(bench("mixtral-8x7b", 16), tiny, 64.0).is_null());
}

}  // namespace
}  // namespace moed
