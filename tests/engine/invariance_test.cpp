#include <gtest/gtest.h>

#include <cstring>

#include "tests/engine/engine_box.h"
#include "tests/engine/late_device.h"

namespace moed {
namespace {

EngineConfig small_config() {
  return {.rows_max = 40, .sequences_max = 12, .max_model_len = 128, .kv_blocks = 120, .block_tokens = 16};
}

std::vector<Job> random_jobs(const ModelConfig& config, int count, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto below = [&](int limit) { return static_cast<int32_t>(random() % limit); };
  std::vector<Job> jobs(count);
  for (Job& job : jobs) {
    job.prompt.resize(1 + below(70));
    for (int32_t& token : job.prompt) token = below(config.vocab_size);
    job.num_generate = 1 + below(16);
    job.prompt_logprobs = below(3) == 0;
    job.sampling.temperature = below(2) == 0 ? 0.0F : 0.9F;
    job.sampling.seed = random();
    if (below(3) == 0) job.sampling.top_p = 0.8F;
    if (below(3) == 0) job.sampling.top_k = 12;
    if (below(3) == 0) job.sampling.repetition_penalty = 1.2F;
    if (below(3) == 0) job.sampling.frequency_penalty = 0.4F;
    job.sampling.num_logprobs = below(4);
  }
  return jobs;
}

::testing::AssertionResult same_bits(const std::vector<ScoredToken>& a, const std::vector<ScoredToken>& b) {
  if (a.size() != b.size()) return ::testing::AssertionFailure() << a.size() << " and " << b.size() << " tokens";
  const auto same = [](float x, float y) { return std::memcmp(&x, &y, sizeof(x)) == 0; };
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].token != b[i].token || !same(a[i].logprob, b[i].logprob) || a[i].top.size() != b[i].top.size()) {
      return ::testing::AssertionFailure() << "token " << i << ": " << a[i].token << " " << a[i].logprob << " and "
                                           << b[i].token << " " << b[i].logprob;
    }
    for (size_t j = 0; j < a[i].top.size(); ++j) {
      if (a[i].top[j].token != b[i].top[j].token || !same(a[i].top[j].logprob, b[i].top[j].logprob)) {
        return ::testing::AssertionFailure() << "token " << i << ", alternative " << j;
      }
    }
  }
  return ::testing::AssertionSuccess();
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
