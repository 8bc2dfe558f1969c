#include "tests/engine/answers.h"

#include <cstring>
#include <random>

namespace moed {

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
    job.sampling.num_logprobs = below(4) - 1;
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

::testing::AssertionResult same_bits(const Answer& a, const Answer& b) {
  if (const auto same = same_bits(a.generated, b.generated); !same) return same;
  return same_bits(a.prompt_scores, b.prompt_scores);
}

std::vector<Answer> answers_alone(EngineBox& box, std::span<const Job> jobs) {
  std::vector<Answer> answers;
  for (const Job& job : jobs) answers.push_back(run_alone(box, job, box.config().rows_max));
  return answers;
}

}  // namespace moed
