#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "tests/engine/answers.h"
#include "tests/engine/counting_device.h"
#include "tests/engine/plans.h"

namespace moed {
namespace {

EngineConfig small_config() {
  return {.rows_max = 40,
          .sequences_max = 12,
          .max_model_len = 128,
          .kv_blocks = 40,
          .block_tokens = 16,
          .device_kv_blocks = 40,
          .staging_blocks = 4};
}

constexpr int kCallsMin = 4;        // the last layer of a dense model
constexpr int kOtherCallsMax = 11;  // a layer a half, beside those that run experts
constexpr int32_t kNumSequences = 4;

class OpCalls : public ::testing::TestWithParam<int> {};

// Four prompts, their KV on the host, on the device, or in turn. Of those on the host the third one is long enough to
// be staged.
std::vector<StepSequence> sequences_of(const std::vector<Job>& jobs, const std::vector<std::vector<int32_t>>& blocks,
                                       int pools) {
  std::vector<StepSequence> sequences;
  for (int32_t i = 0; i < kNumSequences; ++i) {
    StepSequence& sequence = sequences.emplace_back();
    sequence.tokens = jobs[i].prompt;
    sequence.id = i;
    sequence.num_prompt = sequence.num_new = static_cast<int32_t>(jobs[i].prompt.size());
    sequence.blocks = blocks[i];
    sequence.pool = pools == 0 || (pools == 2 && i % 2 == 0) ? Pool::kHost : Pool::kDevice;
  }
  return sequences;
}

// What an advance() may enqueue: one layer's calls a half, of which one runs the experts that are there; then one for
// each expert that was asked for and not there, as no call runs none.
TEST_P(OpCalls, ALayerTakesFewCalls) {
  const Model model = parse_tiny(tiny_models()[GetParam()]);
  const auto source = dummy_weights(model, 21);
  std::vector<Job> jobs(kNumSequences);
  std::vector<std::vector<int32_t>> blocks(kNumSequences);
  for (int32_t i = 0; i < kNumSequences; ++i) {
    const int32_t num_tokens = i == 2 ? 9 : 4 + i;
    for (int32_t t = 0; t < num_tokens; ++t) jobs[i].prompt.push_back((t * 31 + i * 17) % model.config.vocab_size);
    blocks[i] = {2 * i, 2 * i + 1};
  }
  for (const PolicyCase& policy : policy_cases()) {
    auto device = std::make_unique<CountingDevice>(opened("emulated", {.num_threads = 1, .seed = 4}));
    CountingOps& ops = device->counted();
    EngineBox box(model, *source, std::move(device), config_of(policy, model.config, small_config()));
    box.set_planner(planner_of(policy));
    for (int pools = 0; pools < 3; ++pools) {
      for (const int32_t split : {kNumSequences, kNumSequences / 2}) {
        SCOPED_TRACE(std::string(policy.name) + ", pools " + std::to_string(pools) + ", split " +
                     std::to_string(split));
        const int num_halves = split == kNumSequences ? 1 : 2;
        const int kept = model.config.moe.shared_intermediate_size > 0 ? 2 : 1;
        Pass pass = box.engine().begin(sequences_of(jobs, blocks, pools), box.plan(split));
        for (bool more = true; more;) {
          const EngineStats before = box.engine().stats();
          const int calls_before = ops.num_calls;
          const int expert_calls_before = ops.num_expert_calls;
          more = box.engine().advance(pass);
          const EngineStats after = box.engine().stats();
          const int calls = ops.num_calls - calls_before;
          const int expert_calls = ops.num_expert_calls - expert_calls_before;
          const int hosts = after.host_expert_rows > before.host_expert_rows ? num_halves : 0;
          EXPECT_LE(calls - expert_calls, num_halves * kOtherCallsMax + hosts);
          EXPECT_GE(calls, num_halves * kCallsMin);
          // What was on its way when rows asked for it counts as a hit and takes a call nevertheless.
          const bool copied = after.expert_bytes_copied > before.expert_bytes_copied;
          if (!copied) {
            EXPECT_LE(expert_calls, num_halves * kept);
          }
          EXPECT_EQ(ops.num_empty_expert_calls, 0);
        }
        box.engine().finish(std::move(pass));
      }
    }
  }
}

// Rows that close the gap of a dropped one are copied at once, however many they are.
TEST_P(OpCalls, DroppingASequenceTakesFewCopies) {
  const Model model = parse_tiny(tiny_models()[GetParam()]);
  const auto source = dummy_weights(model, 21);
  auto counting = std::make_unique<CountingDevice>(opened("emulated", {.num_threads = 1, .seed = 4}));
  CountingDevice& device = *counting;
  EngineBox box(model, *source, std::move(counting), small_config());
  const std::vector<int32_t> tokens(30, 1);
  const std::vector<std::vector<int32_t>> blocks = {{0, 1}, {2, 3}};
  const auto sequence = [&](SequenceId id, int32_t num_rows) {
    StepSequence made;
    made.tokens = std::span(tokens).first(num_rows);
    made.id = id;
    made.num_prompt = made.num_new = num_rows;
    made.blocks = blocks[id];
    made.pool = Pool::kDevice;
    return made;
  };
  for (const auto [num_rows, num_behind, num_copies] : {std::array{1, 30, 4}, {3, 7, 4}, {8, 8, 2}, {9, 2, 2}}) {
    SCOPED_TRACE(std::to_string(num_rows) + " rows, " + std::to_string(num_behind) + " behind");
    const StepSequence sequences[] = {sequence(0, num_rows), sequence(1, num_behind)};
    Pass pass = box.engine().begin(sequences, box.plan(2));
    box.engine().advance(pass);
    for (const auto& [id, wanted] : {std::pair(0, num_copies), std::pair(1, 0)}) {
      const int before = device.copied.num_copies;
      box.engine().drop(pass, id);
      EXPECT_EQ(device.copied.num_copies - before, wanted) << "sequence " << id;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, OpCalls, ::testing::Range(0, static_cast<int>(tiny_models().size())),
                         [](const auto& param) { return tiny_models()[param.param].name; });

}  // namespace
}  // namespace moed
