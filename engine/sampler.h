#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/step.h"
#include "kernels/sampling.h"

namespace moed {

// What choosing a sequence's next token depends on besides its logits.
struct SampleContext {
  std::span<const int32_t> tokens;  // all so far
  int32_t num_prompt = 0;
  const SamplingParams& params;
  std::span<const uint32_t> allowed;  // grammar mask, a bit a token; empty: all; tokens beyond its end are not allowed
};

// Workspaces that calls share, of one thread.
struct SamplerScratch {
  std::vector<float> raw;       // logits before anything changed them
  std::vector<int32_t> counts;  // [vocab], all zero between calls
  SamplingScratch sampling;
};

// Whether Ops::sample can choose the token: nothing changes the logits, and no log-probability is asked for.
bool only_draws(const SampleContext& context);
// What it needs to know then.
SampleRow draw_of(const SampleContext& context);

// Chooses a sequence's next token in the order that SamplingParams states, and scores it when num_logprobs >= 0.
// `logits` are overwritten. The answer depends on the arguments alone. Details:
// - The candidates that min_p, top_k and top_p leave are a prefix of the tokens by descending logit, ties by ascending
// token. top_p keeps the
//   shortest prefix that holds that share of what min_p and top_k left, and always one token.
// - Temperatures below kTemperatureMin are 0, as in vLLM.
// - When masks leave no token, min_tokens yields first (a grammar that has ended allows nothing but EOS), then the
// masks.
// - Ids outside the vocabulary are ignored.
// - Of logits that hold a NaN or an infinity: kNoToken, as from score_token().
ScoredToken sample_token(std::span<float> logits, const SampleContext& context, SamplerScratch& scratch);

// The log-probability of `token` under softmax(logits), and the best `num_top`.
ScoredToken score_token(std::span<const float> logits, int32_t token, int32_t num_top, SamplerScratch& scratch);

// In [0, 1): number `index` of the stream of `seed`. Philox4x32-10 (Salmon et al., SC 2011), key = seed, counter =
// index; the top 53 bits of its first two words.
double uniform_draw(uint64_t seed, uint64_t index);

}  // namespace moed
