#include <gtest/gtest.h>

#include <cmath>

#include "tests/engine/answers.h"
#include "tests/engine/late_device.h"
#include "tests/engine/plans.h"

namespace moed {
namespace {

constexpr DeviceOptions kExact{.num_threads = 2, .deterministic = true};

// One KV pool on the host.
EngineConfig small_config() {
  return {.rows_max = 40, .sequences_max = 12, .max_model_len = 128, .kv_blocks = 120, .block_tokens = 16};
}

// Beside a device: a second pool there, and room for some of the prompts of the first.
EngineConfig split_config() {
  EngineConfig config = small_config();
  config.device_kv_blocks = 120;
  config.staging_blocks = 6;
  return config;
}

RingKind ring_kind(uint64_t seed) { return seed == 5 ? RingKind::kNone : seed == 6 ? RingKind::kFull : RingKind::kAny; }

DeviceOptions seeded(uint64_t seed) {
  DeviceOptions options = kExact;
  options.seed = seed;
  return options;
}

// Whatever a valid plan says: the bits of the plain host engine.
class Plans : public ::testing::TestWithParam<int> {
 protected:
  Plans() : model_(parse_tiny(tiny_models()[GetParam()])), source_(dummy_weights(model_, 21)) {}

  void expect_same(EngineBox& box, uint64_t seed, CrowdCounts& counts) {
    const std::vector<Job> jobs = random_jobs(model_.config, 7, seed);
    EngineBox alone(model_, *source_, kExact, small_config());
    const std::vector<Answer> wanted = answers_alone(alone, jobs);
    const std::vector<Answer> got = run_crowd(box, jobs, seed * 100, counts);
    for (size_t i = 0; i < jobs.size(); ++i) {
      EXPECT_TRUE(same_bits(got[i], wanted[i])) << "seed " << seed << ", job " << i;
    }
  }

  const Model model_;
  const std::unique_ptr<TensorSource> source_;
};

TEST_P(Plans, KvInBothPoolsAndStagedPromptsChangeNothing) {
  CrowdCounts counts;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    EngineBox box(model_, *source_, opened("emulated", seeded(seed)), split_config());
    expect_same(box, seed, counts);
  }
  EXPECT_GT(counts.num_drops, 10);
  EXPECT_GT(counts.num_interrupts, 10);
  EXPECT_GT(counts.num_splits, 10);
  EXPECT_GT(counts.num_mixed, 10);
}

TEST_P(Plans, PoliciesChangeNothing) {
  CrowdCounts counts;
  for (const PolicyCase& policy : policy_cases()) {
    SCOPED_TRACE(policy.name);
    EngineBox box(model_, *source_, opened("emulated", seeded(3)), config_of(policy, model_.config, small_config()));
    box.set_planner(planner_of(policy));
    expect_same(box, 5, counts);
    const EngineStats stats = box.engine().stats();
    if (model_.config.moe.num_experts == 0) {
      EXPECT_EQ(stats.host_expert_rows + stats.device_expert_rows, 0);
      continue;
    }
    EXPECT_EQ(stats.host_expert_rows > 0, std::isfinite(policy.costs.host_row_us) && policy.resident_percent < 100);
    EXPECT_EQ(stats.device_expert_rows > 0, std::isfinite(policy.costs.copy_us) || policy.resident_percent > 0);
    EXPECT_EQ(stats.expert_misses + stats.experts_prefetched > 0,
              std::isfinite(policy.costs.copy_us) && policy.resident_percent < 100);
  }
}

TEST_P(Plans, RandomPlansAndRingsChangeNothing) {
  CrowdCounts counts;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    EngineConfig config = split_config();
    config.staging_blocks = static_cast<int64_t>(random() % 12);
    config.ring = random_ring(model_.config, ring_kind(seed), random);
    EngineBox box(model_, *source_, opened("emulated", seeded(seed)), config);
    box.set_planner(random_planner(config.ring, seed));
    expect_same(box, seed, counts);
  }
  EXPECT_GT(counts.num_drops, 10);
  EXPECT_GT(counts.num_interrupts, 10);
  EXPECT_GT(counts.num_splits, 10);
  EXPECT_GT(counts.num_mixed, 10);
}

// A device that runs behind the host as far as it may, whose memory is the host's.
TEST_P(Plans, LatenessChangesNothing) {
  CrowdCounts counts;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    EngineConfig config = split_config();
    config.ring = random_ring(model_.config, RingKind::kAny, random);
    EngineBox box(model_, *source_, late_device(opened("cpu", kExact), seed % 2 == 0 ? nullptr : opened("cpu", kExact)),
                  config);
    box.set_planner(random_planner(config.ring, seed));
    expect_same(box, seed, counts);
  }
  EXPECT_GT(counts.num_drops, 5);
}

INSTANTIATE_TEST_SUITE_P(Tiny, Plans, ::testing::Range(0, static_cast<int>(tiny_models().size())),
                         [](const auto& param) { return tiny_models()[param.param].name; });

}  // namespace
}  // namespace moed
