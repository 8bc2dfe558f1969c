#include <gtest/gtest.h>

#include <cmath>

#include "tests/engine/engine_box.h"
#include "tests/engine/reference_model.h"

namespace moed {
namespace {

EngineConfig small_config() {
  return {.rows_max = 48, .sequences_max = 8, .max_model_len = 128, .kv_blocks = 64, .block_tokens = 16};
}

std::vector<int32_t> random_tokens(int32_t count, int32_t vocab, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % vocab);
  return tokens;
}

// Roundings to bf16 that a logit has behind it, each a random relative error below 2^-9: the sum of independent errors,
// three times.
double tolerance(const ModelConfig& config) { return 3.0 * 0x1p-9 * std::sqrt(6.0 * config.num_layers + 2.0); }

struct Comparison {
  int num_compared = 0;
  int num_excluded = 0;
  double worst = 0.0;  // root mean square of a row's differences
};

// Scores of the whole vocabulary at each position against the oracle; rows that the router's near ties may have turned
// are left out.
Comparison compare(const Answer& answer, const ReferenceModel::Output& wanted, double margin) {
  Comparison comparison;
  for (size_t row = 0; row < answer.prompt_scores.size(); ++row) {
    if (wanted.router_gaps[row] < margin) {
      ++comparison.num_excluded;
      continue;
    }
    const std::vector<TokenLogprob>& top = answer.prompt_scores[row].top;
    EXPECT_EQ(top.size(), wanted.logprobs[row].size());
    double sum = 0.0;
    for (const TokenLogprob& scored : top) {
      const double difference = scored.logprob - wanted.logprobs[row][scored.token];
      sum += difference * difference;
    }
    EXPECT_TRUE(std::isfinite(sum));
    comparison.worst = std::max(comparison.worst, std::sqrt(sum / static_cast<double>(top.size())));
    ++comparison.num_compared;
  }
  return comparison;
}

class Reference : public ::testing::TestWithParam<int> {};

TEST_P(Reference, LogitsAgreeWithADoubleForwardPass) {
  const Model model = parse_tiny(tiny_models()[GetParam()]);
  const auto source = dummy_weights(model, 7);
  Job job{.prompt = random_tokens(90, model.config.vocab_size, 3),
          .num_generate = 0,
          .sampling = {},
          .prompt_logprobs = true};
  job.sampling.num_logprobs = model.config.vocab_size;
  const ReferenceModel::Output wanted = ReferenceModel(model, *source).run(job.prompt);
  const double limit = tolerance(model.config);
  for (const bool deterministic : {false, true}) {
    EngineBox box(model, *source, {.num_threads = 2, .deterministic = deterministic}, small_config());
    for (const int32_t chunk : {48, 17, 1}) {
      const Answer answer = run_alone(box, job, chunk);
      ASSERT_EQ(answer.prompt_scores.size(), job.prompt.size() - 1);
      for (size_t i = 0; i < answer.prompt_scores.size(); ++i)
        EXPECT_EQ(answer.prompt_scores[i].token, job.prompt[i + 1]);
      const Comparison comparison = compare(answer, wanted, 0.25 * limit);
      EXPECT_LT(comparison.worst, limit) << "chunks of " << chunk;
      EXPECT_LE(comparison.num_excluded, static_cast<int>(job.prompt.size()) / 8);
      RecordProperty("worst", std::to_string(comparison.worst));
      printf("chunk %d: worst row %.2e of %.2e, %d rows compared, %d left out\n", chunk, comparison.worst, limit,
             comparison.num_compared, comparison.num_excluded);
    }
  }
}

// The comparison must see what it is there for: another seed's weights are another model.
TEST_P(Reference, AnotherModelIsFarOff) {
  const Model model = parse_tiny(tiny_models()[GetParam()]);
  Job job{.prompt = random_tokens(20, model.config.vocab_size, 4),
          .num_generate = 0,
          .sampling = {},
          .prompt_logprobs = true};
  job.sampling.num_logprobs = model.config.vocab_size;
  EngineBox box(model, *dummy_weights(model, 8), {.num_threads = 1}, small_config());
  const ReferenceModel::Output wanted = ReferenceModel(model, *dummy_weights(model, 7)).run(job.prompt);
  EXPECT_GT(compare(run_alone(box, job, 48), wanted, 0.0).worst, 10.0 * tolerance(model.config));
}

INSTANTIATE_TEST_SUITE_P(Tiny, Reference, ::testing::Range(0, static_cast<int>(tiny_models().size())),
                         [](const auto& param) { return tiny_models()[param.param].name; });

}  // namespace
}  // namespace moed
