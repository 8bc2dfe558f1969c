#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "scheduler/scheduler.h"
#include "tests/support/fake_engine.h"

namespace moed {

inline constexpr int32_t kVocab = 50;

inline RequestLimits test_limits() {
  return {.vocab_size = kVocab,
          .max_model_len = 4096,
          .n_max = 16,
          .new_tokens_max = 4096,
          .logprobs_max = 5,
          .logit_bias_max = 300};
}

// A prompt of `length` tokens; different salts have different first tokens, so they share no prefix.
inline std::vector<int32_t> make_prompt(int32_t length, int32_t salt) {
  std::vector<int32_t> prompt(length);
  for (int32_t i = 0; i < length; ++i) prompt[i] = (salt + i * (1 + salt / kVocab)) % kVocab;
  return prompt;
}

inline RequestSpec make_spec(RequestId id, std::vector<int32_t> prompt, int32_t max_tokens) {
  RequestSpec spec;
  spec.id = id;
  spec.prompt = std::move(prompt);
  spec.max_tokens = max_tokens;
  spec.arrival_us = id;
  spec.sampling.seed = static_cast<uint64_t>(id) * 1000;
  return spec;
}

// What FakeEngine must answer: the tokens of a choice until a stop id or max_tokens.
inline std::vector<int32_t> expected_answer(const RequestSpec& spec, int32_t choice) {
  SamplingParams sampling = spec.sampling;
  sampling.seed += choice;
  std::vector<int32_t> tokens = spec.prompt;
  const auto num_prompt = static_cast<int32_t>(spec.prompt.size());
  while (static_cast<int32_t>(tokens.size()) - num_prompt < spec.max_tokens) {
    tokens.push_back(fake_next_token(tokens, num_prompt, sampling, kVocab));
    const auto is = [&](int32_t id) { return id == tokens.back(); };
    if (std::ranges::any_of(spec.stop_token_ids, is)) break;
    if (!spec.ignore_eos && std::ranges::any_of(spec.eos_token_ids, is)) break;
  }
  return {tokens.begin() + num_prompt, tokens.end()};
}

// What a choice has received.
struct Received {
  std::vector<int32_t> tokens;
  std::vector<ScoredToken> prompt_scores;
  FinishReason finish = FinishReason::kNone;
  int32_t stop_token = -1;
  int32_t num_cached_tokens = 0;
  int32_t num_events = 0;
};

// A scheduler and a FakeEngine, driven by hand.
class Harness {
 public:
  explicit Harness(const SchedulerConfig& config, StepModel model = StepModel(0.0, 1.0, 0.0), int32_t num_layers = 2,
                   int32_t breaks_on = -1)
      : scheduler(config),
        engine({.num_layers = num_layers,
                .rows_max = config.pass_rows_max,
                .num_blocks = config.num_blocks,
                .device_blocks = config.device_blocks,
                .block_tokens = config.block_tokens,
                .vocab_size = kVocab,
                .breaks_on = breaks_on}),
        model_(model) {}

  Status add(RequestSpec spec) {
    StatusOr<Request> request = Request::make(std::move(spec), test_limits());
    if (!request.ok()) return request.status();
    return scheduler.add(std::move(request).value());
  }

  // The next pass of a kind, its copies done, its engine part begun. Empty: nothing to do.
  std::span<const StepSequence> begin(PassKind kind) {
    const auto steps = scheduler.schedule(kind, model_, 0);
    scheduler.check_invariants();
    if (steps.empty()) return steps;
    for (const BlockCopy& copy : scheduler.block_copies()) engine.copy_block(copy.pool, copy.from, copy.to);
    pass(kind) = engine.begin(steps, StepPlan());
    return steps;
  }

  bool advance(PassKind kind) { return engine.advance(pass(kind)); }

  void commit(PassKind kind) {
    const StepOutput output = engine.finish(std::exchange(pass(kind), Pass()));
    for (TokenEvent& event : scheduler.commit(kind, output)) receive(std::move(event));
    scheduler.check_invariants();
  }

  // Begin to commit. False: nothing to do.
  bool run(PassKind kind) {
    if (begin(kind).empty()) return false;
    while (advance(kind)) {
    }
    commit(kind);
    return true;
  }

  // Interactive and bulk passes in turn until all requests have ended.
  void run_all() {
    while (!scheduler.idle()) {
      const bool bulk = run(PassKind::kBulk);
      const bool interactive = run(PassKind::kInteractive);
      ASSERT_TRUE(bulk || interactive) << "nothing can run, but the scheduler is not idle";
    }
  }

  void leave(const std::vector<LiveSequence>& live) {
    for (const LiveSequence& sequence : live) {
      engine.drop(pass(sequence.pass), sequence.id);
      scheduler.dropped(sequence.id);
    }
    scheduler.check_invariants();
  }

  Received& of(RequestId request, int32_t choice = 0) { return received_[{request, choice}]; }
  Pass& pass(PassKind kind) { return kind == PassKind::kBulk ? bulk_ : interactive_; }

  Scheduler scheduler;
  FakeEngine engine;

 private:
  void receive(TokenEvent event) {
    Received& choice = of(event.request, event.choice);
    ASSERT_EQ(choice.finish, FinishReason::kNone) << "an event after the last one";
    if (event.has_token) choice.tokens.push_back(event.token.token);
    if (choice.num_events++ == 0) {
      choice.prompt_scores = std::move(event.prompt_scores);
      choice.num_cached_tokens = event.num_cached_tokens;
    } else {
      ASSERT_TRUE(event.prompt_scores.empty());
    }
    choice.finish = event.finish;
    choice.stop_token = event.stop_token;
  }

  StepModel model_;
  std::map<std::pair<RequestId, int32_t>, Received> received_;
  Pass interactive_;
  Pass bulk_;
};

}  // namespace moed
