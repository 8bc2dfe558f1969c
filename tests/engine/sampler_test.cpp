#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <random>

namespace moed {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> random_logits(int size, uint64_t seed, float deviation = 2.0F) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0F, deviation);
  std::vector<float> logits(size);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

ScoredToken sample(std::vector<float> logits, const SamplingParams& params, std::span<const int32_t> tokens = {},
                   int32_t num_prompt = 0, std::span<const uint32_t> allowed = {}) {
  static SamplerScratch scratch;
  return sample_token(logits, {tokens, num_prompt, params, allowed}, scratch);
}

// Everything by its definition, in double, over fully sorted tokens: the probability of each token that may be drawn.
std::map<int32_t, double> oracle(const std::vector<float>& logits, const SamplingParams& params,
                                 std::span<const int32_t> tokens = {}, int32_t num_prompt = 0) {
  std::vector<double> x(logits.begin(), logits.end());
  const auto size = static_cast<int32_t>(x.size());
  for (int32_t token = 0; token < size; ++token) {
    const auto& ids = params.allowed_token_ids;
    if (!ids.empty() && std::count(ids.begin(), ids.end(), token) == 0) x[token] = -INFINITY;
    for (const auto& [id, bias] : params.logit_bias) {
      if (id == token) x[token] += bias;
    }
    const auto& forbidden = params.forbidden_until_min;
    if (static_cast<int32_t>(tokens.size()) - num_prompt < params.min_tokens &&
        std::count(forbidden.begin(), forbidden.end(), token) > 0) {
      x[token] = -INFINITY;
    }
    const auto seen = std::count(tokens.begin(), tokens.end(), token);
    const auto generated = std::count(tokens.begin() + num_prompt, tokens.end(), token);
    if (seen > 0) x[token] = x[token] > 0 ? x[token] / params.repetition_penalty : x[token] * params.repetition_penalty;
    x[token] -=
        static_cast<double>(generated) * params.frequency_penalty + (generated > 0 ? params.presence_penalty : 0.0);
  }
  std::vector<int32_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return x[a] > x[b]; });
  std::vector<std::pair<int32_t, double>> kept;
  for (const int32_t token : order) {
    const double weight = std::exp((x[token] - x[order[0]]) / params.temperature);
    if (weight > 0.0 && weight >= params.min_p) kept.emplace_back(token, weight);
  }
  if (params.top_k > 0 && kept.size() > static_cast<size_t>(params.top_k)) kept.resize(params.top_k);
  double total = 0.0;
  for (const auto& [token, weight] : kept) total += weight;
  double before = 0.0;
  size_t count = 0;
  while (count < kept.size() && (count == 0 || before < params.top_p * total)) before += kept[count++].second;
  kept.resize(count);
  std::map<int32_t, double> probabilities;
  for (const auto& [token, weight] : kept) probabilities[token] = weight / before;
  return probabilities;
}

// Draws one token for each of `draws` positions; true when none falls outside the oracle's tokens and Pearson's
// statistic stays below its mean by five deviations. Tokens that expect few draws are counted together.
::testing::AssertionResult draws_agree(const std::vector<float>& logits, SamplingParams params, int draws) {
  const std::map<int32_t, double> wanted = oracle(logits, params);
  std::map<int32_t, int> found;
  for (int seed = 0; seed < draws; ++seed) {
    params.seed = static_cast<uint64_t>(seed) * 7919 + 11;
    const int32_t token = sample(logits, params).token;
    if (!wanted.contains(token)) return ::testing::AssertionFailure() << "token " << token << " may not be drawn";
    ++found[token];
  }
  double statistic = 0.0;
  int cells = 0;
  double rare_wanted = 0.0;
  double rare_found = 0.0;
  const auto add = [&](double want, double got) {
    statistic += (got - want) * (got - want) / want;
    ++cells;
  };
  for (const auto& [token, probability] : wanted) {
    const double want = probability * draws;
    if (want >= 8.0) {
      add(want, found[token]);
    } else {
      rare_wanted += want;
      rare_found += found[token];
    }
  }
  if (rare_wanted >= 8.0) add(rare_wanted, rare_found);
  const double freedom = cells - 1;
  const double limit = freedom + 5.0 * std::sqrt(2.0 * freedom) + 5.0;
  if (statistic > limit) return ::testing::AssertionFailure() << "chi-square " << statistic << " above " << limit;
  return ::testing::AssertionSuccess();
}

// Known answers of Random123 for philox4x32-10: counter 0, key 0 gives 6627e8d5 e169c58d ...
TEST(Uniform, IsPhilox) {
  EXPECT_EQ(uniform_draw(0, 0), static_cast<double>((uint64_t{0x6627e8d5} << 32 | 0xe169c58d) >> 11) * 0x1p-53);
  double mean = 0.0;
  for (uint64_t i = 0; i < 100000; ++i) {
    const double u = uniform_draw(42, i);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    mean += u / 100000;
  }
  EXPECT_NEAR(mean, 0.5, 0.005);
  EXPECT_NE(uniform_draw(1, 0), uniform_draw(2, 0));
}

TEST(Sampler, GreedyTakesTheLowerIdOfTies) {
  std::vector<float> logits = random_logits(1000, 1);
  logits[700] = logits[300] = 50.0F;
  EXPECT_EQ(sample(logits, {.temperature = 0.0F}).token, 300);
  EXPECT_EQ(sample(logits, {.temperature = 1e-6F}).token, 300);
}

TEST(Sampler, DrawsFollowTheDistribution) {
  const std::vector<float> small = random_logits(50, 2);
  const std::vector<float> large = random_logits(3000, 3, 3.0F);
  const std::vector<float> flat = random_logits(1500, 4, 0.1F);
  const SamplingParams cases[] = {
      {},
      {.temperature = 0.6F},
      {.temperature = 1.7F},
      {.top_k = 5},
      {.top_k = 1},
      {.temperature = 0.8F, .top_k = 40, .top_p = 0.9F},
      {.top_p = 0.7F},
      {.top_p = 1e-9F},
      {.top_p = 0.999F},
      {.min_p = 0.05F},
      {.temperature = 1.3F, .top_k = 20, .top_p = 0.8F, .min_p = 0.02F},
      {.top_p = 0.8F, .min_p = 0.1F},
      {.min_p = 1.0F},
      {.logit_bias = {{3, 4.0F}, {7, -100.0F}}},
      {.allowed_token_ids = {1, 4, 9}},
  };
  for (size_t i = 0; i < std::size(cases); ++i) {
    EXPECT_TRUE(draws_agree(small, cases[i], 20000)) << "small, case " << i;
    EXPECT_TRUE(draws_agree(large, cases[i], 4000)) << "large, case " << i;
    EXPECT_TRUE(draws_agree(flat, cases[i], 4000)) << "flat, case " << i;
  }
}

// The token that is drawn, walking a full sort.
int32_t brute_force_draw(const std::vector<float>& logits, const SamplingParams& params) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  const float inverse = 1.0F / params.temperature;
  std::vector<double> weights;
  double total = 0.0;
  for (const int32_t token : order) {
    const float weight = exp_negative((logits[token] - logits[order[0]]) * inverse);
    weights.push_back(weight >= params.min_p ? weight : 0.0);
    total += weights.back();
  }
  size_t kept = 0;
  double held = 0.0;
  while (kept < weights.size() && (kept == 0 || held < params.top_p * total)) held += weights[kept++];
  double left = uniform_draw(params.seed, 0) * held;
  size_t at = 0;
  while (at + 1 < kept && left >= weights[at]) left -= weights[at++];
  return order[at];
}

TEST(Sampler, WideDrawsEqualAFullSort) {
  std::mt19937_64 random(21);
  int num_checked = 0;
  for (int round = 0; round < 120; ++round) {
    std::vector<float> logits = random_logits(100 + static_cast<int>(random() % 6000), random(), 0.1F + random() % 5);
    if (round % 3 == 0) {  // many ties
      for (float& logit : logits) logit = std::round(logit * 4.0F) / 4.0F;
    }
    if (round % 4 == 0) logits[random() % logits.size()] = -kInfinity;
    if (round % 5 == 0) logits[random() % logits.size()] = -1e30F;
    for (const float top_p : {0.5F, 0.9F, 0.9999F}) {
      SamplingParams params{.temperature = 0.5F + static_cast<float>(random() % 4) * 0.5F, .top_p = top_p};
      if (round % 7 == 0) params.min_p = 0.001F;
      for (params.seed = 0; params.seed < 10; ++params.seed) {
        EXPECT_EQ(sample(logits, params).token, brute_force_draw(logits, params)) << round << " " << params.seed;
        ++num_checked;
      }
    }
  }
  EXPECT_EQ(num_checked, 3600);
}

TEST(Sampler, PenaltiesAndBansFollowTheirDefinitions) {
  std::mt19937_64 random(9);
  for (int round = 0; round < 300; ++round) {
    const std::vector<float> logits = random_logits(40, random());
    std::vector<int32_t> tokens(random() % 60);
    for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 40);
    const auto num_prompt = static_cast<int32_t>(random() % (tokens.size() + 1));
    SamplingParams params;
    params.presence_penalty = static_cast<float>(random() % 5) - 2.0F;
    params.frequency_penalty = static_cast<float>(random() % 5) * 0.5F - 1.0F;
    params.repetition_penalty = 0.5F + static_cast<float>(random() % 4) * 0.5F;
    params.min_tokens = static_cast<int32_t>(random() % 40);
    params.forbidden_until_min = {static_cast<int32_t>(random() % 40), static_cast<int32_t>(random() % 40)};
    params.logit_bias = {{static_cast<int32_t>(random() % 40), 3.0F}};
    params.top_k = 1;
    const auto wanted = oracle(logits, params, tokens, num_prompt);
    params.temperature = 0.0F;
    EXPECT_EQ(sample(logits, params, tokens, num_prompt).token, wanted.begin()->first) << "round " << round;
    params.temperature = 1.0F;
    EXPECT_EQ(sample(logits, params, tokens, num_prompt).token, wanted.begin()->first) << "round " << round;
  }
}

// By the definition: the token after which the generated text ends in a bad word may not be drawn.
TEST(Sampler, BadWordsAreNeverCompleted) {
  std::mt19937_64 random(23);
  for (int round = 0; round < 300; ++round) {
    const auto few = [&](int longest) {
      std::vector<int32_t> ids(1 + random() % longest);
      for (int32_t& id : ids) id = static_cast<int32_t>(random() % 4);
      return ids;
    };
    std::vector<int32_t> tokens = few(3);
    const auto num_prompt = static_cast<int32_t>(tokens.size());
    const std::vector<int32_t> generated = random() % 4 == 0 ? std::vector<int32_t>() : few(4);
    tokens.insert(tokens.end(), generated.begin(), generated.end());
    SamplingParams params;
    params.temperature = 0.0F;
    params.bad_words = {few(3), few(3), few(3)};
    const std::vector<float> logits = random_logits(8, round);
    int32_t best = -1;
    for (int32_t token = 0; token < 8; ++token) {
      std::vector<int32_t> text = generated;
      text.push_back(token);
      const bool bad = std::any_of(params.bad_words.begin(), params.bad_words.end(), [&](const auto& word) {
        return word.size() <= text.size() && std::equal(word.rbegin(), word.rend(), text.rbegin());
      });
      if (!bad && (best < 0 || logits[token] > logits[best])) best = token;
    }
    EXPECT_EQ(sample(logits, params, tokens, num_prompt).token, best) << "round " << round;
  }
  SamplingParams outside;
  outside.temperature = 0.0F;
  outside.bad_words = {{100}, {-1}};
  EXPECT_EQ(sample({0.0F, 1.0F}, outside).token, 1);
}

TEST(Sampler, GrammarMaskRestrictsAndEndsBeforeMinTokens) {
  const std::vector<float> logits = random_logits(100, 12);
  std::vector<uint32_t> mask(4, 0);
  mask[2] = 1U << 6;  // token 70
  SamplingParams params;
  EXPECT_EQ(sample(logits, params, {}, 0, mask).token, 70);
  EXPECT_EQ(sample(logits, params, {}, 0, std::span(mask).first(3)).token, 70);
  params.min_tokens = 5;
  params.forbidden_until_min = {70};
  EXPECT_EQ(sample(logits, params, {}, 0, mask).token, 70);
  mask[2] = 0;  // nothing is left
  params.temperature = 0.0F;
  EXPECT_EQ(sample(logits, params, {}, 0, mask).token, logits_peak(logits).token);
}

TEST(Sampler, IdsOutsideTheVocabularyAreIgnored) {
  const std::vector<float> logits = random_logits(64, 13);
  SamplingParams params;
  params.temperature = 0.0F;
  params.logit_bias = {{-1, 50.0F}, {64, 50.0F}, {5, 90.0F}};
  params.allowed_token_ids = {1000, 5, -7};
  params.forbidden_until_min = {64};
  params.min_tokens = 1;
  EXPECT_EQ(sample(logits, params).token, 5);
}

TEST(Sampler, SeedAndPositionAloneDecide) {
  const std::vector<float> logits = random_logits(500, 14);
  std::vector<int32_t> tokens(20, 3);
  SamplingParams params{.seed = 77};
  const int32_t first = sample(logits, params, tokens, 10).token;
  std::fill(tokens.begin(), tokens.end(), 4);
  EXPECT_EQ(sample(logits, params, tokens, 10).token, first);
  EXPECT_EQ(sample(logits, params, std::span(tokens).first(15), 5).token, first);
  int different = 0;
  for (int t = 0; t < 20; ++t)
    different += sample(logits, params, std::span(tokens).first(t), 0).token != first ? 1 : 0;
  EXPECT_GT(different, 10);
}

TEST(Sampler, LogprobsAreOfTheLogitsBeforeAnyChange) {
  const std::vector<float> logits = random_logits(2000, 15, 4.0F);
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
  SamplingParams params{
      .temperature = 0.3F, .repetition_penalty = 1.4F, .logit_bias = {{17, 90.0F}}, .num_logprobs = 7};
  const std::vector<int32_t> tokens = {1, 2, 3};
  const ScoredToken scored = sample(logits, params, tokens, 2);
  EXPECT_EQ(scored.token, 17);
  EXPECT_NEAR(scored.logprob, logits[17] - std::log(sum), 3e-6);
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  ASSERT_EQ(scored.top.size(), 7U);
  for (int i = 0; i < 7; ++i) {
    EXPECT_EQ(scored.top[i].token, order[i]);
    EXPECT_NEAR(scored.top[i].logprob, logits[order[i]] - std::log(sum), 3e-6);
  }
  params.num_logprobs = 0;
  EXPECT_TRUE(sample(logits, params, tokens, 2).top.empty());
  EXPECT_NEAR(sample(logits, params, tokens, 2).logprob, scored.logprob, 0.0F);
}

// Whatever a request may ask for, and what only other callers could: the process lives and a token that may be drawn
// is.
TEST(Sampler, ExtremeParametersLeaveTheLogitsFinite) {
  const std::vector<int32_t> tokens = {0, 1, 2, 3, 2, 3};
  for (const float size : {1e4F, 3e38F}) {
    const std::vector<float> logits = {size, -size, size, -size, 0.0F, 1.0F};
    for (const float repetition : {1e-38F, 0.01F, 1.0F, 100.0F, 1e38F}) {
      for (const float temperature : {0.0F, 1e-5F, 1.0F, 2.0F}) {
        for (const float bias : {-100.0F, 100.0F}) {
          for (const bool restrict : {false, true}) {
            SamplingParams params{.temperature = temperature,
                                  .presence_penalty = bias > 0.0F ? 2.0F : -2.0F,
                                  .frequency_penalty = bias > 0.0F ? 2.0F : -2.0F,
                                  .repetition_penalty = repetition,
                                  .logit_bias = {{0, bias}, {1, bias}, {3, bias}},
                                  .num_logprobs = 2};
            if (restrict) params.allowed_token_ids = {1, 3};
            for (const float top_p : {0.9F, 1.0F}) {
              params.top_p = top_p;
              const ScoredToken scored = sample(logits, params, tokens, 2);
              EXPECT_TRUE(!restrict || scored.token == 1 || scored.token == 3) << scored.token;
              EXPECT_TRUE(scored.token >= 0 && scored.token < 6) << scored.token;
              EXPECT_FALSE(std::isnan(scored.logprob));
            }
          }
        }
      }
    }
  }
  // Overflow is the largest logit, not an error.
  EXPECT_EQ(
      sample({4.0F, 5.0F, 0.0F}, {.temperature = 0.0F, .repetition_penalty = 1e-38F}, std::vector<int32_t>{0, 1}).token,
      0);
}

TEST(Sampler, BrokenLogitsGiveNoToken) {
  std::vector<float> logits = random_logits(100, 16);
  for (const float broken : {std::nanf(""), kInfinity}) {
    logits[50] = broken;
    EXPECT_EQ(sample(logits, {}).token, kNoToken);
    EXPECT_EQ(sample(logits, {.temperature = 0.0F, .num_logprobs = 2}).token, kNoToken);
    EXPECT_EQ(sample(logits, {.logit_bias = {{3, 5.0F}}}).token, kNoToken);
    SamplerScratch scratch;
    EXPECT_EQ(score_token(logits, 7, 2, scratch).token, kNoToken);
  }
}

}  // namespace
}  // namespace moed
