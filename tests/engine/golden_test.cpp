#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "engine/running_pass.h"
#include "tests/engine/engine_box.h"
#include "tests/engine/golden_case.h"
#include "tests/engine/plans.h"

namespace moed {
namespace {

constexpr const char* kCases[] = {"llama",     "mixtral",        "mixtral_linear", "olmoe",
                                  "qwen2_moe", "qwen2_moe_norm", "qwen3",          "qwen3_moe"};

template <class T>
T loaded(StatusOr<T> value) {
  MOED_CHECK(value.ok()) << value.status().message();
  return std::move(value).value();
}

// A checkpoint in which tensors whose names hold `a` and those whose names hold `b` have changed places.
class SwappedNames : public TensorSource {
 public:
  SwappedNames(const TensorSource& source, std::string a, std::string b)
      : source_(source), a_(std::move(a)), b_(std::move(b)) {}
  const std::vector<int64_t>* shape(std::string_view name) const override { return source_.shape(name); }
  std::vector<std::string> names() const override { return source_.names(); }
  Status read(std::string_view name, std::span<Bf16> out) const override { return source_.read(other(name), out); }
  Status read(std::string_view name, std::span<float> out) const override { return source_.read(other(name), out); }
  bool rounds() const override { return source_.rounds(); }

 private:
  std::string other(std::string_view name) const {
    std::string changed(name);
    if (const size_t at_a = changed.find(a_); at_a != std::string::npos) {
      changed.replace(at_a, a_.size(), b_);
    } else if (const size_t at_b = changed.find(b_); at_b != std::string::npos) {
      changed.replace(at_b, b_.size(), a_);
    }
    return changed;
  }
  const TensorSource& source_;
  const std::string a_, b_;
};

// Neighbouring experts of every layer; in dense models, FFNs of neighbouring layers.
std::vector<std::pair<std::string, std::string>> swaps(const Model& model) {
  std::vector<std::pair<std::string, std::string>> pairs;
  const auto ffn = [](int32_t layer) { return ".layers." + std::to_string(layer) + ".mlp."; };
  // The name up to the expert's number: "model.layers.3.mlp.experts.".
  const auto experts = [&](int32_t layer, int32_t expert) {
    std::string name = model.names.expert_gate.substr(0, model.names.expert_gate.find("{e}"));
    return name.replace(name.find("{l}"), 3, std::to_string(layer)) + std::to_string(expert) + ".";
  };
  for (int32_t layer = 0; layer < model.config.num_layers; ++layer) {
    if (model.config.moe.num_experts == 0 && layer + 1 < model.config.num_layers) {
      pairs.emplace_back(ffn(layer), ffn(layer + 1));
    }
    if (model.config.layers[layer] == LayerKind::kDense) continue;
    for (int32_t expert = 0; expert + 1 < model.config.moe.num_experts; ++expert) {
      pairs.emplace_back(experts(layer, expert), experts(layer, expert + 1));
    }
  }
  return pairs;
}

// What the engine makes of a prompt.
struct Found {
  std::vector<std::vector<float>> logprobs;                // [T][vocab]
  std::vector<std::vector<std::vector<int32_t>>> experts;  // [MoE layers][T][top_k]
};

// After a layer its router's choice still stands in the pass's tables.
void collect_experts(EngineBox& box, Pass& pass, int32_t layer, Found& found) {
  const ModelConfig& config = box.model().config;
  if (config.layers[layer] == LayerKind::kDense) return;
  const auto moe_layer = std::count(config.layers.begin(), config.layers.begin() + layer, LayerKind::kMoe);
  auto& state = static_cast<RunningPass&>(pass.state());
  state.clock().join();
  const Matrix<int32_t> experts = state.rows(state.halves()[0]).experts;
  std::vector<int32_t> chosen(static_cast<size_t>(experts.rows) * experts.cols);
  box.read(chosen.data(), experts.data, static_cast<int64_t>(chosen.size() * sizeof(int32_t)));
  for (auto row = chosen.begin(); row != chosen.end(); row += experts.cols) {
    found.experts[moe_layer].emplace_back(row, row + experts.cols);
  }
}

std::vector<float> by_token(const ScoredToken& scored) {
  std::vector<float> logprobs(scored.top.size(), std::nanf(""));
  for (const TokenLogprob& top : scored.top) logprobs.at(top.token) = top.logprob;
  return logprobs;
}

// The prompt in chunks of at most `chunk_max` rows: random ones, or all of that size when seed is 0.
Found run_prompt(EngineBox& box, const std::vector<int32_t>& tokens, int32_t chunk_max, uint64_t seed) {
  const ModelConfig& config = box.model().config;
  Found found;
  found.experts.resize(std::count(config.layers.begin(), config.layers.end(), LayerKind::kMoe));
  SamplingParams sampling{.temperature = 0.0F, .num_logprobs = config.vocab_size};
  std::vector<int32_t> blocks(box.config().kv_blocks);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int32_t>(blocks.size() - 1 - i);
  std::mt19937_64 random(seed);
  StepSequence sequence;
  sequence.tokens = tokens;
  sequence.id = 1;
  sequence.num_prompt = static_cast<int32_t>(tokens.size());
  sequence.prompt_logprobs = true;
  sequence.num_prompt_top = config.vocab_size;
  sequence.blocks = blocks;
  while (sequence.num_cached < sequence.num_prompt) {
    const int32_t left = sequence.num_prompt - sequence.num_cached;
    const int32_t most = std::min(chunk_max, left);
    sequence.num_new = seed == 0 ? most : 1 + static_cast<int32_t>(random() % most);
    if (sequence.num_new == left) sequence.sampling = &sampling;
    Pass pass = box.engine().begin({&sequence, 1}, box.plan(1));
    for (int32_t layer = 0; layer < config.num_layers; ++layer) {
      EXPECT_EQ(box.engine().advance(pass), layer + 1 < config.num_layers);
      collect_experts(box, pass, layer, found);
    }
    const SequenceOutput output = std::move(box.engine().finish(std::move(pass)).sequences.at(0));
    for (const ScoredToken& scored : output.prompt_scores) found.logprobs.push_back(by_token(scored));
    if (output.sampled.has_value()) found.logprobs.push_back(by_token(*output.sampled));
    sequence.num_cached += sequence.num_new;
  }
  return found;
}

struct Difference {
  int num_compared = 0;
  int num_excluded = 0;
  int num_outside = 0;         // rows with a logit outside its tolerance
  int num_experts_turned = 0;  // (layer, row) with another set of experts
  double worst = 0.0;          // of the tolerance
};

// Log-probabilities are logits but for a shift common to a row: a row is inside when some shift brings all logits
// within the tolerance.
Difference compare(const Found& found, const GoldenPrompt& golden) {
  Difference difference;
  EXPECT_EQ(found.logprobs.size(), golden.tokens.size());
  for (size_t row = 0; row < golden.tokens.size(); ++row) {
    if (golden.compared[row] == 0) {
      ++difference.num_excluded;
      continue;
    }
    ++difference.num_compared;
    double low = INFINITY;
    double high = -INFINITY;
    bool numbers = found.logprobs[row].size() == golden.logits[row].size();
    for (size_t token = 0; numbers && token < golden.logits[row].size(); ++token) {
      const double shift = static_cast<double>(found.logprobs[row][token]) - golden.logits[row][token];
      numbers = std::isfinite(shift);
      low = std::min(low, shift);
      high = std::max(high, shift);
    }
    const double ratio = numbers ? 0.5 * (high - low) / golden.logit_tolerance[row] : INFINITY;
    difference.worst = std::max(difference.worst, ratio);
    if (ratio > 1.0) ++difference.num_outside;
    for (size_t layer = 0; layer < golden.experts.size(); ++layer) {
      std::vector<int32_t> want = golden.experts[layer][row];
      std::vector<int32_t> got = found.experts[layer].at(row);
      std::sort(want.begin(), want.end());
      std::sort(got.begin(), got.end());
      if (want != got) ++difference.num_experts_turned;
    }
  }
  return difference;
}

EngineConfig golden_config() {
  return {.rows_max = 128, .sequences_max = 4, .max_model_len = 128, .kv_blocks = 8, .block_tokens = 16};
}

class Golden : public ::testing::TestWithParam<const char*> {
 protected:
  Golden()
      : model_(loaded(load_model_config(golden_dir(GetParam())))),
        source_(loaded(open_checkpoint(golden_dir(GetParam())))),
        prompts_(read_golden(GetParam())) {}
  Model model_;
  std::unique_ptr<TensorSource> source_;
  std::vector<GoldenPrompt> prompts_;
};

TEST_P(Golden, LogitsAndExpertsEqualTransformers) {
  struct Way {
    const char* isa;
    bool deterministic;
    int32_t chunk_max;
    uint64_t seed;
    const char* device = "cpu";
  };
  constexpr Way kWays[] = {{"", false, 128, 0},
                           {"", false, 30, 5},
                           {"", false, 1, 0},
                           {"", true, 128, 0},
                           {"portable", false, 40, 6},
                           {"portable", true, 1, 0},
                           {"", false, 30, 7, "emulated"},
                           {"", true, 128, 0, "emulated"}};
  for (const Way& way : kWays) {
    const DeviceOptions options{.num_threads = 2, .deterministic = way.deterministic, .isa = way.isa};
    EngineBox box(model_, *source_, opened(way.device, options), golden_config());
    Difference all;
    for (const GoldenPrompt& prompt : prompts_) {
      const Difference one = compare(run_prompt(box, prompt.tokens, way.chunk_max, way.seed), prompt);
      EXPECT_EQ(one.num_outside, 0) << "isa '" << way.isa << "', chunks of " << way.chunk_max;
      EXPECT_EQ(one.num_experts_turned, 0) << "isa '" << way.isa << "', chunks of " << way.chunk_max;
      all.num_compared += one.num_compared;
      all.num_excluded += one.num_excluded;
      all.worst = std::max(all.worst, one.worst);
    }
    EXPECT_GT(all.num_compared, 60);
    EXPECT_LE(all.num_excluded, 0.02 * (all.num_compared + all.num_excluded));
    printf("%s, isa '%s', chunks of %d: %d rows compared, %d excluded, worst %.2f of the tolerance\n", way.device,
           way.isa, way.chunk_max, all.num_compared, all.num_excluded, all.worst);
  }
}

// As fast as the device may: products of many rows by other kernels than products of few, chunked and not; and exactly.
TEST_P(Golden, EveryPolicyEqualsTransformers) {
  for (const PolicyCase& policy : policy_cases()) {
    for (const bool deterministic : {false, true}) {
      const DeviceOptions options{.num_threads = 2, .deterministic = deterministic, .seed = 11};
      EngineConfig config = config_of(policy, model_.config, golden_config());
      config.staging_blocks = deterministic ? 0 : 8;
      EngineBox box(model_, *source_, opened("emulated", options), config);
      box.set_planner(planner_of(policy));
      for (const GoldenPrompt& prompt : prompts_) {
        const int32_t chunk_max = deterministic ? 128 : 30;
        const Difference one = compare(run_prompt(box, prompt.tokens, chunk_max, deterministic ? 0 : 5), prompt);
        EXPECT_GT(one.num_compared, 0) << policy.name;
        EXPECT_EQ(one.num_outside, 0) << policy.name << ", worst " << one.worst;
        EXPECT_EQ(one.num_experts_turned, 0) << policy.name;
      }
    }
  }
}

// What is compared follows from the recorded margins and errors, and the tolerances fit an engine that is not ours.
TEST_P(Golden, TolerancesAndExclusionsFollowFromTheRecord) {
  double worst = 0.0;
  for (const GoldenPrompt& prompt : prompts_) {
    bool clear = true;
    for (size_t row = 0; row < prompt.tokens.size(); ++row) {
      for (size_t layer = 0; layer < prompt.experts.size(); ++layer) {
        clear = clear && prompt.router_margin.at(layer).at(row) > prompt.router_error.at(layer).at(row);
      }
      EXPECT_EQ(prompt.compared.at(row), clear ? 1 : 0) << "row " << row;
      if (!clear || prompt.logits_bf16.empty()) continue;
      ASSERT_EQ(prompt.logits_bf16.at(row).size(), prompt.logits[row].size());
      for (size_t token = 0; token < prompt.logits[row].size(); ++token) {
        const double error = std::abs(prompt.logits_bf16[row][token] - prompt.logits[row][token]);
        worst = std::max(worst, error / prompt.logit_tolerance.at(row));
      }
    }
    ASSERT_EQ(prompt.greedy_margin.size(), prompt.greedy_tokens.size());
    EXPECT_EQ(prompt.greedy_tolerance.at(0), prompt.logit_tolerance.back());
    int32_t sure = 0;
    while (clear && sure < std::ssize(prompt.greedy_tokens) &&
           prompt.greedy_margin.at(sure) > 2 * prompt.greedy_tolerance.at(sure)) {
      ++sure;
    }
    // With routers, one of them may end the run before a margin does.
    EXPECT_LE(prompt.greedy_compared, sure);
    if (prompt.experts.empty()) {
      EXPECT_EQ(prompt.greedy_compared, sure);
    }
    EXPECT_GE(prompt.greedy_compared, 2);
  }
  // bf16 throughout rounds more often than the engine does: far below the tolerances they would be too wide.
  EXPECT_LE(worst, 1.0);
  EXPECT_GE(worst, 0.25);
}

TEST_P(Golden, GreedyTextEqualsTransformers) {
  EngineBox box(model_, *source_, {.num_threads = 2}, golden_config());
  for (const GoldenPrompt& prompt : prompts_) {
    Job job{.prompt = prompt.tokens, .num_generate = static_cast<int32_t>(prompt.greedy_tokens.size())};
    job.sampling.temperature = 0.0F;
    const Answer answer = run_alone(box, job, 128);
    ASSERT_LE(prompt.greedy_compared, job.num_generate);
    for (int32_t i = 0; i < prompt.greedy_compared; ++i) {
      EXPECT_EQ(answer.generated[i].token, prompt.greedy_tokens[i]) << "token " << i;
    }
  }
}

// The comparison itself is tested: two experts (or FFNs) that have changed places must not pass it.
TEST_P(Golden, SwappedExpertsAreFound) {
  const auto pairs = swaps(model_);
  EXPECT_GT(pairs.size(), 0U);
  for (const auto& [a, b] : pairs) {
    EngineBox box(model_, SwappedNames(*source_, a, b), {.num_threads = 1}, golden_config());
    int num_outside = 0;
    for (const GoldenPrompt& prompt : prompts_) {
      num_outside += compare(run_prompt(box, prompt.tokens, 128, 0), prompt).num_outside;
    }
    EXPECT_GT(num_outside, 0) << a << " and " << b;
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, Golden, ::testing::ValuesIn(kCases), [](const auto& param) { return param.param; });

}  // namespace
}  // namespace moed
