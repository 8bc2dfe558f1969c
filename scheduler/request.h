#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "engine/step.h"

namespace moed {

using RequestId = int64_t;

enum class FinishReason : uint8_t { kNone, kStop, kLength, kCancelled, kError };

// Beyond these a penalty says nothing more, and logits leave the range of floats.
inline constexpr float kRepetitionPenaltyMin = 0.01F;
inline constexpr float kRepetitionPenaltyMax = 100.0F;

struct RequestLimits {
  int32_t vocab_size = 0;
  int32_t max_model_len = 0;
  int32_t n_max = 0;
  int32_t new_tokens_max = 0;
  int32_t logprobs_max = 0;
  int32_t logit_bias_max = 0;
  int32_t stop_token_ids_max = 64;
};

// What a door asks for, unchecked.
struct RequestSpec {
  RequestId id = 0;
  std::vector<int32_t> prompt;
  SamplingParams sampling;  // seed: of choice 0; choice c draws from seed + c. forbidden_until_min is filled by make()
  int32_t n = 1;
  int32_t max_tokens = 0;  // new tokens a choice; 0: the prompt alone is computed (and scored, with prompt_logprobs)
  std::vector<int32_t> eos_token_ids;
  std::vector<int32_t> stop_token_ids;
  bool ignore_eos = false;
  bool prompt_logprobs = false;  // does not read the prefix cache
  int32_t priority = 0;          // lower first
  int64_t arrival_us = 0;
};

// kInvalidArgument with detail() "context_length_exceeded" and param() `field`.
Status context_overflow(int64_t prompt_tokens, int64_t new_tokens, int32_t max_model_len, const std::string& field);

// A request that passed every check; the only type the scheduler takes. Both doors come here through server/validate.
class Request {
 public:
  // Errors: kInvalidArgument whose param() is the OpenAI field ("temperature", "logit_bias", ...), with the limit in
  // the message; context overflow has detail() "context_length_exceeded". Checks for NaN and infinities too.
  static StatusOr<Request> make(RequestSpec spec, const RequestLimits& limits);
  const RequestSpec& spec() const { return spec_; }
  RequestSpec release() && { return std::move(spec_); }

 private:
  explicit Request(RequestSpec spec) : spec_(std::move(spec)) {}
  RequestSpec spec_;
};

}  // namespace moed
