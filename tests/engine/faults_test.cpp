#include <gtest/gtest.h>

#include <string>

#include "tests/engine/answers.h"
#include "tests/engine/plans.h"

namespace moed {
namespace {

EngineConfig small_config() {
  return {.rows_max = 40,
          .sequences_max = 12,
          .max_model_len = 128,
          .kv_blocks = 120,
          .block_tokens = 16,
          .device_kv_blocks = 120,
          .staging_blocks = 6};
}

class Faults : public ::testing::Test {
 protected:
  Faults() : model_(parse_tiny(tiny_models()[1])), source_(dummy_weights(model_, 21)) {
    // One that hits, misses and uses the host.
    policy_ = policy_cases().back();
    config_ = config_of(policy_, model_.config, small_config());
  }

  void serve(const std::string& faults) {
    EngineBox box(model_, *source_, opened("emulated", {.num_threads = 1, .seed = 3, .faults = faults}), config_);
    box.set_planner(planner_of(policy_));
    CrowdCounts counts;
    run_crowd(box, random_jobs(model_.config, 4, 1), 1, counts);
  }

  const Model model_;
  const std::unique_ptr<TensorSource> source_;
  PolicyCase policy_;
  EngineConfig config_;
};

// Without a plant the crowd is served; with one the process ends with a line that says what failed.
TEST_F(Faults, AFailedDeviceEndsTheProcessWithOneLine) {
  serve("");
  for (const char* faults : {"copy:7", "copy:60", "copy:211"}) {
    EXPECT_DEATH(serve(faults), "copy of [0-9]+ bytes failed") << faults;
  }
  for (const char* faults : {"launch:1", "launch:23", "launch:500", "launch:1999"}) {
    EXPECT_DEATH(serve(faults), "device: launch of [a-z_]+ failed") << faults;
  }
  for (const char* faults : {"lost:50", "lost:801"}) EXPECT_DEATH(serve(faults), "device lost: at ") << faults;
}

// Each allocation of start-up in turn.
TEST_F(Faults, NoMemoryAtStartIsAnError) {
  const auto weights = DenseWeights::load(model_, *source_, {});
  const auto experts = ExpertStore::load(model_, *source_, {});
  ASSERT_TRUE(weights.ok() && experts.ok());
  for (int at = 1;; ++at) {
    ASSERT_LT(at, 100);
    const auto device = opened("emulated", {.num_threads = 1, .faults = "memory:" + std::to_string(at)});
    const auto engine = make_engine(model_, *weights, *experts, *device, config_);
    if (engine.ok()) {
      EXPECT_GT(at, 10);
      break;
    }
    EXPECT_EQ(engine.status().code(), StatusCode::kResourceExhausted) << engine.status().message();
  }
}

// So is a copy that fails: of the dense weights, of the rope table.
TEST_F(Faults, AFailedStartIsAnError) {
  const auto weights = DenseWeights::load(model_, *source_, {});
  const auto experts = ExpertStore::load(model_, *source_, {});
  ASSERT_TRUE(weights.ok() && experts.ok());
  for (const char* faults : {"copy:1", "copy:2"}) {
    const auto device = opened("emulated", {.num_threads = 1, .faults = faults});
    const auto engine = make_engine(model_, *weights, *experts, *device, config_);
    ASSERT_FALSE(engine.ok()) << faults;
    EXPECT_NE(engine.status().message().find("failed"), std::string::npos) << engine.status().message();
  }
}

}  // namespace
}  // namespace moed
