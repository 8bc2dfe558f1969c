#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "tests/engine/answers.h"
#include "tests/engine/engine_box.h"
#include "tests/engine/plans.h"

namespace moed {
namespace {

// The engine on one device, wholly: what is wanted is what that device says of a sequence alone. The emulated device
// has the host's kernels and so the host's bits; a GPU has its own, and must keep to them.

constexpr int32_t kSequences = 6;
constexpr int32_t kGenerated = 6;
constexpr int32_t kContextMax = 96;
constexpr int32_t kBlockTokens = 16;
constexpr int32_t kBlocksEach = kContextMax / kBlockTokens;

struct Sequence {
  std::vector<int32_t> tokens;
  int32_t num_prompt = 0;
  int32_t num_cached = 0;
  int32_t num_new = 0;
  std::vector<int32_t> blocks;
  std::vector<ScoredToken> generated;

  bool done() const { return static_cast<int32_t>(generated.size()) == kGenerated; }
  int32_t rows_left() const { return static_cast<int32_t>(tokens.size()) - num_cached; }
};

std::vector<Sequence> random_sequences(const ModelConfig& config, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Sequence> sequences(kSequences);
  for (int32_t i = 0; i < kSequences; ++i) {
    Sequence& sequence = sequences[i];
    sequence.num_prompt = 1 + static_cast<int32_t>(random() % (kContextMax - kGenerated));
    for (int32_t t = 0; t < sequence.num_prompt; ++t) {
      sequence.tokens.push_back(static_cast<int32_t>(random() % config.vocab_size));
    }
    for (int32_t b = 0; b < kBlocksEach; ++b) sequence.blocks.push_back((kSequences - 1 - i) + b * kSequences);
  }
  return sequences;
}

// One pass of the sequences that have num_new > 0.
void run_pass(EngineBox& box, std::vector<Sequence>& sequences, Pool pool, int32_t split) {
  const SamplingParams sampling{.temperature = 0.0F, .num_logprobs = 5};
  std::vector<StepSequence> steps;
  std::vector<Sequence*> members;
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence& sequence = sequences[i];
    if (sequence.num_new == 0) continue;
    StepSequence step;
    step.tokens = sequence.tokens;
    step.id = i + 1;
    step.num_prompt = sequence.num_prompt;
    step.num_cached = sequence.num_cached;
    step.num_new = sequence.num_new;
    step.pool = pool;
    step.blocks = sequence.blocks;
    if (sequence.num_new == sequence.rows_left()) step.sampling = &sampling;
    steps.push_back(step);
    members.push_back(&sequence);
  }
  Pass pass = box.engine().begin(steps, box.plan(std::min(split, static_cast<int32_t>(steps.size()))));
  while (box.engine().advance(pass)) {
  }
  const StepOutput output = box.engine().finish(std::move(pass));
  for (size_t i = 0; i < members.size(); ++i) {
    Sequence& member = *members[i];
    member.num_cached += std::exchange(member.num_new, 0);
    const auto& sampled = output.sequences.at(i).sampled;
    if (!sampled.has_value()) continue;
    member.generated.push_back(*sampled);
    member.tokens.push_back(sampled->token);
  }
}

void run_alone(EngineBox& box, std::vector<Sequence>& sequences, Pool pool) {
  for (Sequence& sequence : sequences) {
    while (!sequence.done()) {
      sequence.num_new = sequence.rows_left();
      run_pass(box, sequences, pool, 1);
    }
  }
}

// Random batches, chunks and halves.
void run_together(EngineBox& box, std::vector<Sequence>& sequences, Pool pool, uint64_t seed) {
  std::mt19937_64 random(seed);
  while (std::any_of(sequences.begin(), sequences.end(), [](const Sequence& each) { return !each.done(); })) {
    int32_t rows = 0;
    int32_t count = 0;
    for (Sequence& sequence : sequences) {
      const int32_t most = std::min(sequence.rows_left(), box.config().rows_max - rows);
      if (sequence.done() || most == 0 || random() % 4 == 0) continue;
      sequence.num_new = random() % 2 == 0 ? most : 1 + static_cast<int32_t>(random() % most);
      rows += sequence.num_new;
      ++count;
    }
    if (count > 0) run_pass(box, sequences, pool, 1 + static_cast<int32_t>(random() % count));
  }
}

class SameBits : public ::testing::TestWithParam<int> {};

TEST_P(SameBits, BatchesChunksHalvesAndTheRingChangeNothing) {
  const Model model = parse_tiny(tiny_models()[GetParam()]);
  const auto source = dummy_weights(model, 21);
  for (const PolicyCase& policy : policy_cases()) {
    // Where an expert may run here or there, from pass to pass, its bits are those of the place.
    if (policy.costs.device_allowed() && policy.costs.host_allowed()) continue;
    const EngineConfig config = config_of(policy, model.config,
                                          {.rows_max = 100,
                                           .sequences_max = kSequences,
                                           .max_model_len = 128,
                                           .kv_blocks = kSequences * kBlocksEach,
                                           .block_tokens = kBlockTokens,
                                           .device_kv_blocks = kSequences * kBlocksEach});
    for (const Pool pool : {Pool::kDevice, Pool::kHost}) {
      SCOPED_TRACE(std::string(policy.name) + (pool == Pool::kDevice ? ", KV on the device" : ", KV on the host"));
      EngineBox box(model, *source, opened("emulated", {.num_threads = 2, .deterministic = true}), config);
      box.set_planner(planner_of(policy));
      std::vector<Sequence> wanted = random_sequences(model.config, 5);
      run_alone(box, wanted, pool);
      for (const uint64_t seed : {1U, 2U}) {
        std::vector<Sequence> got = random_sequences(model.config, 5);
        run_together(box, got, pool, seed);
        for (int32_t i = 0; i < kSequences; ++i) {
          EXPECT_TRUE(same_bits(got[i].generated, wanted[i].generated)) << "seed " << seed << ", sequence " << i;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, SameBits, ::testing::Range(0, static_cast<int>(tiny_models().size())),
                         [](const auto& param) { return tiny_models()[param.param].name; });

}  // namespace
}  // namespace moed
