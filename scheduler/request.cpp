#include "scheduler/request.h"

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>

namespace moed {
namespace {

std::string number(float value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", static_cast<double>(value));
  return text;
}

// NaN fails it, as every comparison with NaN is false.
Status check_range(float value, float min, float max, const char* name) {
  if (value >= min && value <= max) return Status();
  return invalid_argument(
      std::string(name) + " must be between " + number(min) + " and " + number(max) + ", not " + number(value), name);
}

Status check_count(int64_t value, int64_t min, int64_t max, const char* name) {
  if (value >= min && value <= max) return Status();
  return invalid_argument(std::string(name) + " must be between " + std::to_string(min) + " and " +
                              std::to_string(max) + ", not " + std::to_string(value),
                          name);
}

Status check_ids(const std::vector<int32_t>& ids, int32_t vocab_size, const char* name) {
  for (const int32_t id : ids) {
    if (id >= 0 && id < vocab_size) continue;
    return invalid_argument(std::string(name) + " holds token id " + std::to_string(id) + "; the vocabulary has " +
                                std::to_string(vocab_size),
                            name);
  }
  return Status();
}

Status check_sampling(const SamplingParams& sampling, const RequestLimits& limits) {
  MOED_RETURN_IF_ERROR(check_range(sampling.temperature, 0.0F, 2.0F, "temperature"));
  MOED_RETURN_IF_ERROR(check_range(sampling.top_p, 0.0F, 1.0F, "top_p"));
  if (sampling.top_p == 0.0F) return invalid_argument("top_p must be above 0", "top_p");
  MOED_RETURN_IF_ERROR(check_range(sampling.min_p, 0.0F, 1.0F, "min_p"));
  if (sampling.top_k < 0) {
    return invalid_argument("top_k must be 0 (all tokens) or more, not " + std::to_string(sampling.top_k), "top_k");
  }
  MOED_RETURN_IF_ERROR(check_range(sampling.presence_penalty, -2.0F, 2.0F, "presence_penalty"));
  MOED_RETURN_IF_ERROR(check_range(sampling.frequency_penalty, -2.0F, 2.0F, "frequency_penalty"));
  MOED_RETURN_IF_ERROR(
      check_range(sampling.repetition_penalty, kRepetitionPenaltyMin, kRepetitionPenaltyMax, "repetition_penalty"));
  MOED_RETURN_IF_ERROR(check_count(sampling.num_logprobs, -1, limits.logprobs_max, "logprobs"));
  MOED_RETURN_IF_ERROR(
      check_count(static_cast<int64_t>(sampling.logit_bias.size()), 0, limits.logit_bias_max, "logit_bias"));
  for (const auto& [token, bias] : sampling.logit_bias) {
    if (token < 0 || token >= limits.vocab_size) {
      return invalid_argument("logit_bias names token id " + std::to_string(token) + "; the vocabulary has " +
                                  std::to_string(limits.vocab_size),
                              "logit_bias");
    }
    MOED_RETURN_IF_ERROR(check_range(bias, -100.0F, 100.0F, "logit_bias"));
  }
  return check_ids(sampling.allowed_token_ids, limits.vocab_size, "allowed_token_ids");
}

Status check_length(const RequestSpec& spec, const RequestLimits& limits) {
  const auto num_prompt = static_cast<int64_t>(spec.prompt.size());
  if (num_prompt == 0) return invalid_argument("the prompt is empty", "prompt");
  MOED_RETURN_IF_ERROR(check_count(spec.max_tokens, 0, limits.new_tokens_max, "max_tokens"));
  if (num_prompt + spec.max_tokens > limits.max_model_len) {
    return context_overflow(num_prompt, spec.max_tokens, limits.max_model_len,
                            num_prompt >= limits.max_model_len ? "prompt" : "max_tokens");
  }
  if (spec.sampling.min_tokens < 0 || spec.sampling.min_tokens > spec.max_tokens) {
    return invalid_argument("min_tokens must be between 0 and max_tokens (" + std::to_string(spec.max_tokens) +
                                "), not " + std::to_string(spec.sampling.min_tokens),
                            "min_tokens");
  }
  return Status();
}

Status check_stops(const RequestSpec& spec, const RequestLimits& limits) {
  MOED_RETURN_IF_ERROR(
      check_count(static_cast<int64_t>(spec.stop_token_ids.size()), 0, limits.stop_token_ids_max, "stop_token_ids"));
  return check_ids(spec.stop_token_ids, limits.vocab_size, "stop_token_ids");
}

}  // namespace

Status context_overflow(int64_t prompt_tokens, int64_t new_tokens, int32_t max_model_len, const std::string& field) {
  return Status(StatusCode::kInvalidArgument,
                "This model's maximum context length is " + std::to_string(max_model_len) +
                    " tokens. However, you requested " + std::to_string(prompt_tokens + new_tokens) + " tokens (" +
                    std::to_string(prompt_tokens) + " in the prompt, " + std::to_string(new_tokens) +
                    " to generate). Please shorten the prompt or ask for fewer tokens.",
                field, "context_length_exceeded");
}

StatusOr<Request> Request::make(RequestSpec spec, const RequestLimits& limits) {
  MOED_RETURN_IF_ERROR(check_length(spec, limits));
  MOED_RETURN_IF_ERROR(check_count(spec.n, 1, limits.n_max, "n"));
  MOED_RETURN_IF_ERROR(check_ids(spec.prompt, limits.vocab_size, "prompt"));
  MOED_RETURN_IF_ERROR(check_sampling(spec.sampling, limits));
  MOED_RETURN_IF_ERROR(check_stops(spec, limits));

  std::vector<int32_t> forbidden;
  if (spec.sampling.min_tokens > 0) {
    forbidden = spec.stop_token_ids;
    if (!spec.ignore_eos) forbidden.insert(forbidden.end(), spec.eos_token_ids.begin(), spec.eos_token_ids.end());
    std::ranges::sort(forbidden);
    forbidden.erase(std::ranges::unique(forbidden).begin(), forbidden.end());
  }
  // A checkpoint may name an EOS that its logits do not reach.
  std::erase_if(forbidden, [&](int32_t id) { return id < 0 || id >= limits.vocab_size; });
  const auto is_forbidden = [&](int32_t id) { return std::ranges::binary_search(forbidden, id); };
  const std::vector<int32_t>& allowed = spec.sampling.allowed_token_ids;
  if (!forbidden.empty() && !allowed.empty() && std::ranges::all_of(allowed, is_forbidden)) {
    return invalid_argument("allowed_token_ids holds only tokens that min_tokens forbids", "allowed_token_ids");
  }
  spec.sampling.forbidden_until_min = std::move(forbidden);
  return Request(std::move(spec));
}

}  // namespace moed
