#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/sampling.h"
#include "tests/engine/answers.h"
#include "tests/engine/counting_device.h"
#include "tests/engine/plans.h"

namespace moed {
namespace {

constexpr int32_t kBlocksEach = 6;
constexpr int32_t kLongPrompt = 90;  // more rows than the head takes at once

EngineConfig head_config() {
  return {.rows_max = 200, .sequences_max = 40, .max_model_len = 128, .kv_blocks = 200, .block_tokens = 16};
}

// A sequence in a pass, and whether the host must see its logits.
struct Mixed {
  const char* name;
  SamplingParams sampling;
  bool crosses = false;
  bool prompt_logprobs = false;
  bool samples = true;
  bool masked = false;
  int32_t num_tokens = 5;
  int32_t num_prompt = 5;
};

std::vector<Mixed> mixed_sequences() {
  return {
      {.name = "greedy", .sampling = {.temperature = 0.0F}},
      {.name = "logprobs", .sampling = {.seed = 3, .num_logprobs = 2}, .crosses = true},
      {.name = "temperature", .sampling = {.temperature = 1.3F, .seed = 5}},
      {.name = "top_p", .sampling = {.top_p = 0.8F, .seed = 6}},
      {.name = "penalties", .sampling = {.repetition_penalty = 1.3F, .seed = 7}, .crosses = true},
      {.name = "top_k", .sampling = {.top_k = 9, .seed = 8}},
      {.name = "bias", .sampling = {.logit_bias = {{3, 2.0F}}, .seed = 9}, .crosses = true},
      {.name = "min_p", .sampling = {.top_p = 0.95F, .min_p = 0.2F, .seed = 10}},
      {.name = "allowed ids", .sampling = {.allowed_token_ids = {1, 4}, .seed = 11}, .crosses = true},
      {.name = "prompt scores",
       .sampling = {.seed = 12},
       .prompt_logprobs = true,
       .num_tokens = kLongPrompt,
       .num_prompt = kLongPrompt},
      {.name = "bad words", .sampling = {.bad_words = {{2}}, .seed = 13}, .crosses = true},
      {.name = "middle of a prompt", .sampling = {}, .samples = false, .num_prompt = 9},
      {.name = "too short to end",
       .sampling = {.forbidden_until_min = {1}, .min_tokens = 3, .seed = 14},
       .crosses = true,
       .num_prompt = 3},
      {.name = "may end", .sampling = {.forbidden_until_min = {1}, .min_tokens = 2, .seed = 15}, .num_prompt = 3},
      {.name = "grammar", .sampling = {.seed = 16}, .crosses = true, .masked = true},
      {.name = "scores and more",
       .sampling = {.seed = 17, .num_logprobs = 0},
       .crosses = true,
       .prompt_logprobs = true},
  };
}

// Rows whose logits the host needs.
int64_t num_crossing(std::span<const Mixed> mixed) {
  int64_t rows = 0;
  for (const Mixed& one : mixed) {
    rows += one.crosses ? 1 : 0;
    rows += one.prompt_logprobs ? one.num_prompt - 1 : 0;
  }
  return rows;
}

// One pass of all of them.
std::vector<SequenceOutput> run(EngineBox& box, std::span<const Mixed> mixed, FunctionRef<void()> before_head) {
  std::vector<std::vector<int32_t>> tokens(mixed.size());
  std::vector<std::vector<int32_t>> blocks(mixed.size());
  const std::vector<uint32_t> mask = {0xF0U, 0x3U};
  std::vector<StepSequence> sequences;
  for (size_t i = 0; i < mixed.size(); ++i) {
    const Mixed& one = mixed[i];
    const auto id = static_cast<int32_t>(i);
    for (int32_t t = 0; t < one.num_tokens + 4; ++t) {
      tokens[i].push_back((t * 31 + id * 17) % box.model().config.vocab_size);
    }
    for (int32_t b = 0; b < kBlocksEach; ++b) blocks[i].push_back(id * kBlocksEach + b);
    StepSequence& sequence = sequences.emplace_back();
    sequence.tokens = std::span(tokens[i]).first(static_cast<size_t>(std::max(one.num_tokens, one.num_prompt)));
    sequence.id = id;
    sequence.num_prompt = one.num_prompt;
    sequence.num_new = one.num_tokens;
    sequence.prompt_logprobs = one.prompt_logprobs;
    sequence.num_prompt_top = 1;
    sequence.blocks = blocks[i];
    if (one.samples) sequence.sampling = &one.sampling;
    if (one.masked) sequence.allowed = mask;
  }
  Pass pass = box.engine().begin(sequences, box.plan(static_cast<int32_t>(sequences.size())));
  while (box.engine().advance(pass)) {
  }
  before_head();
  return box.engine().finish(std::move(pass)).sequences;
}

class HeadTest : public ::testing::TestWithParam<int> {};

TEST_P(HeadTest, OnlyRowsThatTheHostMustSeeCrossTheLink) {
  const Model model = parse_tiny(tiny_models()[GetParam()]);
  const auto source = dummy_weights(model, 21);
  const DeviceOptions options{.num_threads = 1, .deterministic = true, .seed = 4};
  const std::vector<Mixed> mixed = mixed_sequences();
  EngineBox host(model, *source, options, head_config());
  const std::vector<SequenceOutput> wanted = run(host, mixed, [] {});

  auto counting = std::make_unique<CountingDevice>(opened("emulated", options));
  CountingDevice& device = *counting;
  EngineBox box(model, *source, std::move(counting), head_config());
  for (const bool all : {true, false}) {
    std::vector<Mixed> chosen = mixed;
    if (!all) std::erase_if(chosen, [](const Mixed& one) { return one.crosses || one.prompt_logprobs; });
    SCOPED_TRACE(all ? "all" : "draws alone");
    Copied before;
    device.counted().sampled_rows.clear();
    const std::vector<SequenceOutput> got = run(box, chosen, [&] { before = device.copied; });
    EXPECT_EQ(device.copied.bytes - before.bytes,
              num_crossing(chosen) * model.config.vocab_size * int64_t{sizeof(float)});
    size_t num_sampled = 0;
    for (const size_t rows : device.counted().sampled_rows) num_sampled += rows;
    EXPECT_EQ(num_sampled, static_cast<size_t>(std::count_if(chosen.begin(), chosen.end(), [](const Mixed& one) {
                return one.samples && !one.crosses;
              })));
    if (!all) continue;
    ASSERT_EQ(got.size(), wanted.size());
    for (size_t i = 0; i < got.size(); ++i) {
      SCOPED_TRACE(mixed[i].name);
      EXPECT_EQ(got[i].id, wanted[i].id);
      ASSERT_EQ(got[i].sampled.has_value(), mixed[i].samples);
      ASSERT_EQ(wanted[i].sampled.has_value(), mixed[i].samples);
      if (mixed[i].samples) {
        EXPECT_TRUE(same_bits({*got[i].sampled}, {*wanted[i].sampled}));
      }
      EXPECT_TRUE(same_bits(got[i].prompt_scores, wanted[i].prompt_scores));
      EXPECT_EQ(got[i].prompt_scores.size(), mixed[i].prompt_logprobs ? mixed[i].num_prompt - 1U : 0U);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, HeadTest, ::testing::Range(0, static_cast<int>(tiny_models().size())),
                         [](const auto& param) { return tiny_models()[param.param].name; });

// Weights whose last norm is broken.
class BrokenSource final : public TensorSource {
 public:
  explicit BrokenSource(const TensorSource& whole) : whole_(whole) {}
  const std::vector<int64_t>* shape(std::string_view name) const override { return whole_.shape(name); }
  std::vector<std::string> names() const override { return whole_.names(); }
  Status read(std::string_view name, std::span<Bf16> out) const override { return whole_.read(name, out); }
  Status read(std::string_view name, std::span<float> out) const override {
    MOED_RETURN_IF_ERROR(whole_.read(name, out));
    if (name == "model.norm.weight") out[3] = NAN;
    return {};
  }
  bool rounds() const override { return whole_.rounds(); }

 private:
  const TensorSource& whole_;
};

TEST(Head, BrokenLogitsAreSaidOfTheirSequence) {
  const Model model = parse_tiny(tiny_models()[0]);
  const auto source = dummy_weights(model, 21);
  // The first is drawn on the device, the second's logits cross the link.
  const std::vector<Mixed> mixed = {{.name = "draw", .sampling = {.seed = 1}},
                                    {.name = "scores", .sampling = {.seed = 1, .num_logprobs = 1}}};
  for (const char* device : {"emulated", "cpu"}) {
    EngineBox box(model, BrokenSource(*source), opened(device, {.num_threads = 1}), head_config());
    for (const SequenceOutput& output : run(box, mixed, [] {})) {
      EXPECT_TRUE(output.broken) << device;
      EXPECT_EQ(output.sampled.value().token, kNoToken) << device;
    }
  }
}

}  // namespace
}  // namespace moed
