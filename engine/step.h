#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/shared_vector.h"

namespace moed {

// One choice of one request, unique for the life of the process.
using SequenceId = int64_t;

// Where a sequence's KV lives, and so where its attention runs.
enum class Pool : uint8_t { kHost, kDevice };

// How one sequence's tokens are chosen. Checked by Request::make; constant while the sequence lives.
// Order as in vLLM: allowed ids, bad words, bias, min_tokens, penalties, temperature, min_p, top_k, top_p. Temperature
// 0: the largest logit, ties to the lower id.
struct SamplingParams {
  float temperature = 1.0F;
  int32_t top_k = 0;  // 0: all
  float top_p = 1.0F;
  float min_p = 0.0F;
  float presence_penalty = 0.0F;    // generated tokens
  float frequency_penalty = 0.0F;   // generated tokens
  float repetition_penalty = 1.0F;  // prompt and generated tokens
  SharedVector<std::pair<int32_t, float>> logit_bias;
  SharedVector<int32_t> allowed_token_ids;       // empty: all
  SharedVector<std::vector<int32_t>> bad_words;  // none empty; a generated token never completes one
  SharedVector<int32_t> forbidden_until_min;     // EOS and stop ids: not sampled before min_tokens are generated
  int32_t min_tokens = 0;
  uint64_t seed = 0;          // token t of a sequence draws from (seed, t) alone
  int32_t num_logprobs = -1;  // -1: none; else the chosen token's and the best num_logprobs
  bool needs_history() const {
    return presence_penalty != 0.0F || frequency_penalty != 0.0F || repetition_penalty != 1.0F;
  }
};

// One sequence's part of a pass. Speaks of sequences: rows exist only inside a pass. What the spans and `sampling`
// point to belongs to the scheduler, which leaves it alone until the sequence has left the pass: finish(), or drop() of
// this sequence.
struct StepSequence {
  std::span<const int32_t> tokens;  // all so far: prompt, then generated
  SequenceId id = 0;
  int32_t num_prompt = 0;
  int32_t num_cached = 0;  // tokens whose KV stands in the blocks
  int32_t num_new = 0;     // this pass's rows: tokens[num_cached, num_cached + num_new)
  bool prompt_logprobs =
      false;  // log-probabilities of tokens[num_cached + 1 ..] that belong to the prompt, for those rows
  int32_t num_prompt_top = 0;  // best ones beside each prompt score
  Pool pool = Pool::kHost;
  std::span<const int32_t> blocks;           // cover [0, num_cached + num_new)
  const SamplingParams* sampling = nullptr;  // null: no token is sampled (not the last chunk)
  std::span<const uint32_t> allowed;         // grammar mask, a bit a token; empty: all
};

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0.0F;
};

// What is chosen from logits that hold a NaN or an infinity: the weights or a kernel are broken.
inline constexpr int32_t kNoToken = -1;

// A token with its log-probability before temperature and penalties, and the best ones beside it, best first.
struct ScoredToken {
  int32_t token = 0;
  float logprob = 0.0F;
  std::vector<TokenLogprob> top;
};

struct SequenceOutput {
  SequenceId id = 0;
  bool broken = false;                 // of its rows' logits some had no token to give: kNoToken
  std::optional<ScoredToken> sampled;  // when `sampling` was set
  std::vector<ScoredToken>
      prompt_scores;  // when `prompt_logprobs`: of tokens[num_cached + 1, ...], one a row but the sampled one's
};

// Measured times of a pass, microseconds of the device's clock.
struct StepTimes {
  bool lanes_measured = true;  // false: the four parts of total_us below are 0; LaneEstimate makes up for them
  double total_us = 0.0;       // begin to finish, waits for other passes excluded
  // What the device's stream was spent on, waits for the host and for copies included; they add up to total_us.
  double attention_us = 0.0;
  double experts_us = 0.0;
  double dense_us = 0.0;  // all other products
  double sample_us = 0.0;
  // Of that time, what the host lane beside a device computed or waited for; 0 where the device is the host.
  double host_attention_us = 0.0;
  double host_experts_us = 0.0;
  double ring_wait_us = 0.0;  // nothing to do but wait for an expert's copy
};

struct StepOutput {
  std::vector<SequenceOutput> sequences;  // in the order of begin(), dropped ones left out
  StepTimes times;
};

}  // namespace moed
