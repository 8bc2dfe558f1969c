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
constexpr int32_t kFirstCandidates = 64;

LogitsPeak checked_peak(std::span<const float> logits) {
  const LogitsPeak peak = logits_peak(logits);
  MOED_CHECK(!peak.has_nan && peak.logit < kInfinity)
      << "logits hold a NaN or an infinity: broken weights or a broken kernel";
  return peak;
}

bool in_vocab(int32_t token, std::span<const float> logits) {
  return token >= 0 && static_cast<size_t>(token) < logits.size();
}

bool changes_logits(const SampleContext& context) {
  const SamplingParams& params = context.params;
  return !context.allowed.empty() || !params.allowed_token_ids.empty() || !params.logit_bias.empty() ||
         !params.bad_words.empty() || params.min_tokens > 0 || params.needs_history();
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
  const auto num_generated = static_cast<int64_t>(context.tokens.size()) - context.num_prompt;
  const bool early = num_generated < context.params.min_tokens;
  for (const bool ban : {early, false}) {
    apply_changes(logits, context, ban, scratch.counts);
    const LogitsPeak peak = checked_peak(logits);
    if (peak.logit > -kInfinity) return peak;
    std::copy(scratch.raw.begin(), scratch.raw.end(), logits.begin());
  }
  return checked_peak(logits);
}

struct Weights {
  float peak = 0.0F;
  float inverse_temperature = 1.0F;
  float weight_min = 0.0F;  // of the peak's weight, which is 1
  float operator()(float logit) const {
    const float weight = exp_negative((logit - peak) * inverse_temperature);
    return weight < weight_min ? 0.0F : weight;
  }
};

// No prefix is cut: walks the tokens in order of id.
int32_t draw_any(std::span<const float> logits, const Weights& weights, double uniform, std::vector<double>& sums) {
  double left = uniform * sum_weights(logits, weights.peak, weights.inverse_temperature, weights.weight_min, sums);
  size_t block = 0;
  while (block + 1 < sums.size() && left >= sums[block]) left -= sums[block++];
  // Rounding may leave a remainder beyond the last block with any weight.
  while (block > 0 && sums[block] == 0.0) --block;
  const auto begin = static_cast<int32_t>(block) * kSumBlock;
  const auto end = std::min(begin + kSumBlock, static_cast<int32_t>(logits.size()));
  int32_t chosen = -1;
  for (int32_t token = begin; token < end; ++token) {
    const float weight = weights(logits[token]);
    if (weight == 0.0F) continue;
    chosen = token;
    if (left < weight) break;
    left -= weight;
  }
  return chosen;
}

// How many of the sorted candidates top_p keeps: the shortest prefix that holds its share of `total`; nothing when they
// hold less.
size_t prefix_of_mass(std::span<const Candidate> candidates, const Weights& weights, double mass) {
  double held = 0.0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    held += weights(candidates[i].logit);
    if (held >= mass) return i + 1;
  }
  return 0;
}

// The token at which so much of the mass is passed; rounding may leave a remainder beyond the last.
int32_t walk(std::span<const Candidate> candidates, const Weights& weights, double left) {
  int32_t chosen = candidates.front().token;
  for (const Candidate& candidate : candidates) {
    const float weight = weights(candidate.logit);
    if (weight == 0.0F) break;
    chosen = candidate.token;
    if (left < weight) break;
    left -= weight;
  }
  return chosen;
}

int32_t draw_prefix(std::span<const Candidate> candidates, const Weights& weights, double uniform) {
  double total = 0.0;
  for (const Candidate& candidate : candidates) total += weights(candidate.logit);
  return walk(candidates, weights, uniform * total);
}

// draw_prefix() of the shortest prefix that holds `mass`, of a distribution so wide that sorting it would be dear.
int32_t draw_wide(std::span<const float> logits, const Weights& weights, double mass, double uniform,
                  SamplerScratch& scratch) {
  std::vector<double>& masses = scratch.bin_masses;
  bin_weights(logits, weights.peak, weights.inverse_temperature, weights.weight_min, masses);
  // The bin in which the prefix ends, and how much of it belongs.
  double before = 0.0;
  int32_t last = 0;
  for (int32_t bin = 0; bin < kNumBins; ++bin) {
    if (masses[bin] == 0.0) continue;
    if (bin > 0) before += masses[last];
    last = bin;
    if (before + masses[bin] >= mass) break;
  }
  collect_bin(logits, weights.peak, weights.inverse_temperature, last, scratch.candidates);
  const size_t kept = prefix_of_mass(scratch.candidates, weights, mass - before);
  if (kept > 0) scratch.candidates.resize(kept);
  double held = 0.0;
  for (const Candidate& candidate : scratch.candidates) held += weights(candidate.logit);

  double left = uniform * (before + held);
  int32_t chosen = 0;
  while (chosen < last && left >= masses[chosen]) left -= masses[chosen++];
  if (chosen < last) collect_bin(logits, weights.peak, weights.inverse_temperature, chosen, scratch.candidates);
  return walk(scratch.candidates, weights, left);
}

int32_t draw(std::span<const float> logits, float peak, const SampleContext& context, SamplerScratch& scratch) {
  const SamplingParams& params = context.params;
  const auto vocab = static_cast<int32_t>(logits.size());
  const Weights weights{peak, 1.0F / params.temperature, params.min_p};
  const double uniform = uniform_draw(params.seed, context.tokens.size() - static_cast<size_t>(context.num_prompt));
  const int32_t top_k = params.top_k > 0 && params.top_k < vocab ? params.top_k : vocab;
  if (top_k == vocab && params.top_p >= 1.0F) return draw_any(logits, weights, uniform, scratch.block_sums);

  std::vector<Candidate>& candidates = scratch.candidates;
  double total = 0.0;
  if (top_k < vocab) {
    top_logits(logits, top_k, candidates);
    for (const Candidate& candidate : candidates) total += weights(candidate.logit);
    if (params.top_p >= 1.0F) return draw_prefix(candidates, weights, uniform);
  } else {
    total = sum_weights(logits, peak, weights.inverse_temperature, weights.weight_min, scratch.block_sums);
    top_logits(logits, std::min(kFirstCandidates, vocab), candidates);
  }
  // Most distributions hold their mass in few tokens.
  const double mass = params.top_p * total;
  size_t kept = prefix_of_mass(candidates, weights, mass);
  if (kept == 0 && top_k == vocab && vocab > kFirstCandidates)
    return draw_wide(logits, weights, mass, uniform, scratch);
  if (kept == 0) kept = candidates.size();
  return draw_prefix(std::span(candidates).first(kept), weights, uniform);
}

}  // namespace

ScoredToken sample_token(std::span<float> logits, const SampleContext& context, SamplerScratch& scratch) {
  MOED_CHECK(static_cast<int64_t>(context.tokens.size()) >= context.num_prompt) << "a prompt is not there yet";
  LogitsPeak peak = checked_peak(logits);
  const bool changes = changes_logits(context);
  if (changes) {
    scratch.raw.assign(logits.begin(), logits.end());
    peak = change_logits(logits, context, scratch);
  }
  int32_t token = peak.token;
  if (context.params.temperature >= kTemperatureMin) token = draw(logits, peak.logit, context, scratch);
  MOED_CHECK(in_vocab(token, logits)) << token;
  if (context.params.num_logprobs < 0) return {.token = token};
  const std::span<const float> raw = changes ? std::span<const float>(scratch.raw) : logits;
  return score_token(raw, token, context.params.num_logprobs, scratch);
}

ScoredToken score_token(std::span<const float> logits, int32_t token, int32_t num_top, SamplerScratch& scratch) {
  MOED_CHECK(in_vocab(token, logits)) << token;
  const LogitsPeak peak = checked_peak(logits);
  const double log_sum = peak.logit + std::log(sum_weights(logits, peak.logit, 1.0F, 0.0F, scratch.block_sums));
  const auto logprob = [&](float logit) { return static_cast<float>(logit - log_sum); };
  ScoredToken scored{.token = token, .logprob = logprob(logits[token]), .top = {}};
  top_logits(logits, num_top, scratch.candidates);
  scored.top.reserve(scratch.candidates.size());
  for (const Candidate& candidate : scratch.candidates) {
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
