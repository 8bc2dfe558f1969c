#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/check.h"

namespace moed {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

bool is_broken(const LogitsPeak& peak) { return peak.has_nan || peak.logit == kInfinity; }

bool in_vocab(int32_t token, std::span<const float> logits) {
  return token >= 0 && static_cast<size_t>(token) < logits.size();
}

bool is_early(const SampleContext& context) {
  return static_cast<int64_t>(context.tokens.size()) - context.num_prompt < context.params.min_tokens;
}

bool changes_logits(const SampleContext& context) {
  const SamplingParams& params = context.params;
  return !context.allowed.empty() || !params.allowed_token_ids.empty() || !params.logit_bias.empty() ||
         !params.bad_words.empty() || is_early(context) || params.needs_history();
}

void keep_only(std::span<float> logits, std::span<const int32_t> tokens) {
  std::vector<std::pair<int32_t, float>> kept;
  kept.reserve(tokens.size());
  for (const int32_t token : tokens) {
    if (in_vocab(token, logits)) kept.emplace_back(token, logits[token]);
  }
  std::fill(logits.begin(), logits.end(), -kInfinity);
  for (const auto& [token, logit] : kept) logits[token] = logit;
}

void apply_mask(std::span<float> logits, std::span<const uint32_t> allowed) {
  const size_t covered = std::min(logits.size(), allowed.size() * 32);
  for (size_t token = 0; token < covered; ++token) {
    if ((allowed[token / 32] >> (token % 32) & 1U) == 0U) logits[token] = -kInfinity;
  }
  std::fill(logits.begin() + static_cast<int64_t>(covered), logits.end(), -kInfinity);
}

// A word is looked for in generated tokens alone, as in vLLM.
void forbid_bad_words(std::span<float> logits, const SampleContext& context) {
  const auto generated = context.tokens.subspan(std::min<size_t>(context.num_prompt, context.tokens.size()));
  for (const std::vector<int32_t>& word : context.params.bad_words) {
    const size_t num_before = word.size() - 1;
    if (num_before > generated.size() || !in_vocab(word.back(), logits)) continue;
    if (std::equal(word.begin(), word.end() - 1, generated.end() - static_cast<int64_t>(num_before))) {
      logits[word.back()] = -kInfinity;
    }
  }
}

// Repetition looks at prompt and generated tokens alike; frequency and presence at generated ones.
void apply_penalties(std::span<float> logits, const SampleContext& context, std::vector<int32_t>& counts) {
  const SamplingParams& params = context.params;
  counts.resize(logits.size());
  const auto penalize = [&](int32_t token, int32_t count) {
    float& logit = logits[token];
    if (logit == -kInfinity) return;  // masked
    if (params.repetition_penalty != 1.0F) {
      logit = logit > 0.0F ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    }
    if (count > 0) logit -= params.frequency_penalty * static_cast<float>(count) + params.presence_penalty;
    // A request must not be able to make what broken weights make.
    logit = std::clamp(logit, -kLargest, kLargest);
  };
  const auto generated = context.tokens.subspan(std::min<size_t>(context.num_prompt, context.tokens.size()));
  for (const int32_t token : generated) {
    if (in_vocab(token, logits)) ++counts[token];
  }
  // A token's count becomes -1 when it is done.
  for (const int32_t token : context.tokens) {
    if (!in_vocab(token, logits) || counts[token] < 0) continue;
    penalize(token, counts[token]);
    counts[token] = -1;
  }
  for (const int32_t token : context.tokens) {
    if (in_vocab(token, logits)) counts[token] = 0;
  }
}

void apply_changes(std::span<float> logits, const SampleContext& context, bool ban_early_ends,
                   std::vector<int32_t>& counts) {
  const SamplingParams& params = context.params;
  if (!context.allowed.empty()) apply_mask(logits, context.allowed);
  if (!params.allowed_token_ids.empty()) keep_only(logits, params.allowed_token_ids);
  if (!params.bad_words.empty()) forbid_bad_words(logits, context);
  for (const auto& [token, bias] : params.logit_bias) {
    if (in_vocab(token, logits)) logits[token] += bias;
  }
  if (ban_early_ends) {
    for (const int32_t token : params.forbidden_until_min) {
      if (in_vocab(token, logits)) logits[token] = -kInfinity;
    }
  }
  if (params.needs_history()) apply_penalties(logits, context, counts);
}

// Changes the logits; where that leaves nothing, as sampler.h says. scratch.raw holds them as they were.
LogitsPeak change_logits(std::span<float> logits, const SampleContext& context, SamplerScratch& scratch) {
  for (const bool ban : {is_early(context), false}) {
    apply_changes(logits, context, ban, scratch.counts);
    const LogitsPeak peak = logits_peak(logits);
    if (is_broken(peak) || peak.logit > -kInfinity) return peak;
    std::copy(scratch.raw.begin(), scratch.raw.end(), logits.begin());
  }
  return logits_peak(logits);
}

}  // namespace

bool only_draws(const SampleContext& context) { return context.params.num_logprobs < 0 && !changes_logits(context); }

SampleRow draw_of(const SampleContext& context) {
  MOED_CHECK(static_cast<int64_t>(context.tokens.size()) >= context.num_prompt) << "a prompt is not there yet";
  const SamplingParams& params = context.params;
  return {.temperature = params.temperature,
          .top_k = params.top_k,
          .top_p = params.top_p,
          .min_p = params.min_p,
          .uniform = uniform_draw(params.seed, context.tokens.size() - static_cast<size_t>(context.num_prompt))};
}

ScoredToken sample_token(std::span<float> logits, const SampleContext& context, SamplerScratch& scratch) {
  const SampleRow row = draw_of(context);
  LogitsPeak peak = logits_peak(logits);
  const bool changes = changes_logits(context);
  if (changes && !is_broken(peak)) {
    scratch.raw.assign(logits.begin(), logits.end());
    peak = change_logits(logits, context, scratch);
  }
  if (is_broken(peak)) return {.token = kNoToken};
  int32_t token = peak.token;
  if (row.temperature >= kTemperatureMin) token = draw_token(logits, peak.logit, row, scratch.sampling);
  if (token < 0) return {.token = kNoToken};
  MOED_CHECK(in_vocab(token, logits)) << token;
  if (context.params.num_logprobs < 0) return {.token = token};
  const std::span<const float> raw = changes ? std::span<const float>(scratch.raw) : logits;
  return score_token(raw, token, context.params.num_logprobs, scratch);
}

ScoredToken score_token(std::span<const float> logits, int32_t token, int32_t num_top, SamplerScratch& scratch) {
  MOED_CHECK(in_vocab(token, logits)) << token;
  const LogitsPeak peak = logits_peak(logits);
  if (is_broken(peak)) return {.token = kNoToken};
  const double log_sum =
      peak.logit + std::log(sum_weights(logits, peak.logit, 1.0F, 0.0F, scratch.sampling.block_sums));
  const auto logprob = [&](float logit) { return static_cast<float>(logit - log_sum); };
  ScoredToken scored{.token = token, .logprob = logprob(logits[token]), .top = {}};
  top_logits(logits, num_top, scratch.sampling.candidates);
  scored.top.reserve(scratch.sampling.candidates.size());
  for (const Candidate& candidate : scratch.sampling.candidates) {
    scored.top.push_back({candidate.token, logprob(candidate.logit)});
  }
  return scored;
}

double uniform_draw(uint64_t seed, uint64_t index) {
  uint32_t x[4] = {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53U} * x[0];
    const uint64_t b = uint64_t{0xCD9E8D57U} * x[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ x[3] ^ key[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, x);
    key[0] += 0x9E3779B9U;
    key[1] += 0xBB67AE85U;
  }
  const uint64_t bits = (uint64_t{x[0]} << 32 | x[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace moed
