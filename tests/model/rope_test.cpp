#include "model/rope.h"

#include <cmath>
#include <fstream>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "model/architectures.h"

namespace moed {
namespace {

nlohmann::json expected() {
  std::ifstream file(MOED_SOURCE_DIR "/tests/model/rope_expected.json");
  return nlohmann::json::parse(file).at("cases");
}

TEST(Rope, FrequenciesAreThoseOfTransformers) {
  const nlohmann::json cases = expected();
  ASSERT_GE(cases.size(), 14U);
  for (const nlohmann::json& entry : cases) {
    SCOPED_TRACE(entry.at("name").get<std::string>());
    const StatusOr<Model> model = parse_model_config(entry.at("config").dump(), "");
    ASSERT_TRUE(model.ok()) << model.status().message();
    const RopeConfig& rope = model->config.rope;
    const std::vector<double> wanted = entry.at("frequencies");
    const std::vector<double> found = rope_frequencies(rope);
    ASSERT_EQ(found.size(), wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) EXPECT_NEAR(found[i] / wanted[i], 1.0, 1e-13) << i;
    EXPECT_NEAR(rope.attention_factor, entry.at("attention_factor").get<double>(), 1e-14);
  }
}

TEST(Rope, TableHoldsCosinesThenSines) {
  for (const nlohmann::json& entry : expected()) {
    SCOPED_TRACE(entry.at("name").get<std::string>());
    const StatusOr<Model> model = parse_model_config(entry.at("config").dump(), "");
    ASSERT_TRUE(model.ok());
    const std::vector<double> frequencies = entry.at("frequencies");
    const double attention_factor = entry.at("attention_factor");
    constexpr int32_t kPositions = 1000;  // no multiple of the run in which the table is made
    const std::vector<float> table = rope_cos_sin(model->config.rope, kPositions);
    const size_t half = frequencies.size();
    ASSERT_EQ(table.size(), kPositions * half * 2);
    for (size_t p = 0; p < kPositions; ++p) {
      for (size_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(p) * frequencies[i];
        // Half an ulp of a float near 1, and what 1e-13 of the angle makes.
        const double tolerance = 6.1e-8 * attention_factor + angle * 2e-13;
        ASSERT_NEAR(table[p * half * 2 + i], std::cos(angle) * attention_factor, tolerance) << p << " " << i;
        ASSERT_NEAR(table[p * half * 2 + half + i], std::sin(angle) * attention_factor, tolerance) << p << " " << i;
      }
    }
  }
}

TEST(Rope, FarPositionsStayExact) {
  RopeConfig rope;
  rope.rotary_dim = 64;
  constexpr int32_t kPositions = 200001;
  const std::vector<float> table = rope_cos_sin(rope, kPositions);
  const int64_t p = kPositions - 1;
  EXPECT_NEAR(table[p * 64], std::cos(200000.0), 1e-7);
  EXPECT_NEAR(table[p * 64 + 32], std::sin(200000.0), 1e-7);
}

TEST(Rope, NoPositionsMakeAnEmptyTable) {
  RopeConfig rope;
  rope.rotary_dim = 8;
  EXPECT_TRUE(rope_cos_sin(rope, 0).empty());
}

}  // namespace
}  // namespace moed
