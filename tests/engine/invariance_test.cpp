#include <gtest/gtest.h>

#include "tests/engine/answers.h"
#include "tests/engine/engine_box.h"
#include "tests/engine/late_device.h"

namespace moed {
namespace {

EngineConfig small_config() {
  return {.rows_max = 40, .sequences_max = 12, .max_model_len = 128, .kv_blocks = 120, .block_tokens = 16};
}

class Invariance : public ::testing::TestWithParam<int> {};

// Chunks, batches, halves, blocks, interruptions, drops, threads: nothing may change a bit.
TEST_P(Invariance, CrowdsChangeNothing) {
  const Model model = parse_tiny(tiny_models()[GetParam()]);
  const auto source = dummy_weights(model, 21);
  EngineBox alone(model, *source, {.num_threads = 1, .deterministic = true}, small_config());
  EngineBox crowd(model, *source, {.num_threads = 2, .deterministic = true}, small_config());
  CrowdCounts counts;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    const std::vector<Job> jobs = random_jobs(model.config, 10, seed);
    std::vector<Answer> wanted;
    for (const Job& job : jobs) wanted.push_back(run_alone(alone, job, 40));
    for (EngineBox* box : {&crowd, &alone}) {
      const std::vector<Answer> got = run_crowd(*box, jobs, seed * 100, counts);
      for (size_t i = 0; i < jobs.size(); ++i) {
        EXPECT_TRUE(same_bits(got[i].generated, wanted[i].generated)) << "seed " << seed << ", job " << i;
        EXPECT_TRUE(same_bits(got[i].prompt_scores, wanted[i].prompt_scores)) << "seed " << seed << ", job " << i;
      }
    }
    EXPECT_TRUE(same_bits(run_alone(crowd, jobs[0], 1).generated, wanted[0].generated)) << "seed " << seed;
    EXPECT_TRUE(same_bits(run_alone(crowd, jobs[1], 7).generated, wanted[1].generated)) << "seed " << seed;
  }
  EXPECT_GT(counts.num_drops, 10);
  EXPECT_GT(counts.num_interrupts, 10);
  EXPECT_GT(counts.num_splits, 10);
}

// A device that runs behind the host, as far as it may.
TEST_P(Invariance, LatenessChangesNothing) {
  const Model model = parse_tiny(tiny_models()[GetParam()]);
  const auto source = dummy_weights(model, 21);
  const DeviceOptions options{.num_threads = 1, .deterministic = true};
  EngineBox alone(model, *source, options, small_config());
  EngineBox late(model, *source, late_device(open_device("cpu", options).value()), small_config());
  CrowdCounts counts;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    const std::vector<Job> jobs = random_jobs(model.config, 10, seed);
    const std::vector<Answer> got = run_crowd(late, jobs, seed * 100, counts);
    for (size_t i = 0; i < jobs.size(); ++i) {
      const Answer wanted = run_alone(alone, jobs[i], 40);
      EXPECT_TRUE(same_bits(got[i].generated, wanted.generated)) << "seed " << seed << ", job " << i;
      EXPECT_TRUE(same_bits(got[i].prompt_scores, wanted.prompt_scores)) << "seed " << seed << ", job " << i;
    }
  }
  EXPECT_GT(counts.num_drops, 10);
}

// A device with memory of its own and a checker of races.
TEST_P(Invariance, TheEmulatedDeviceChangesNothing) {
  const Model model = parse_tiny(tiny_models()[GetParam()]);
  const auto source = dummy_weights(model, 21);
  const DeviceOptions options{.num_threads = 2, .deterministic = true};
  EngineBox alone(model, *source, options, small_config());
  CrowdCounts counts;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    DeviceOptions seeded = options;
    seeded.seed = seed;
    EngineBox emulated(model, *source, opened("emulated", seeded), small_config());
    const std::vector<Job> jobs = random_jobs(model.config, 10, seed);
    const std::vector<Answer> got = run_crowd(emulated, jobs, seed * 100, counts);
    for (size_t i = 0; i < jobs.size(); ++i) {
      const Answer wanted = run_alone(alone, jobs[i], 40);
      EXPECT_TRUE(same_bits(got[i].generated, wanted.generated)) << "seed " << seed << ", job " << i;
      EXPECT_TRUE(same_bits(got[i].prompt_scores, wanted.prompt_scores)) << "seed " << seed << ", job " << i;
    }
  }
  EXPECT_GT(counts.num_drops, 10);
  EXPECT_GT(counts.num_interrupts, 10);
  EXPECT_GT(counts.num_splits, 10);
}

INSTANTIATE_TEST_SUITE_P(Tiny, Invariance, ::testing::Range(0, static_cast<int>(tiny_models().size())),
                         [](const auto& param) { return tiny_models()[param.param].name; });

}  // namespace
}  // namespace moed
