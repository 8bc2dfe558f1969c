#include "server/validate.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>

namespace moed {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
constexpr int64_t kJsonCharacterBytes = 6;  // \u0000
constexpr int64_t kChatSlackBytes = 1 << 20;
constexpr double kTemperatureMax = 2.0;    // of a request, as scheduler/request.cpp has it
constexpr double kTopPMin = 1e-6;          // the best token alone; a request's is above 0
constexpr int32_t kCompletionTokens = 16;  // OpenAI's default of /v1/completions

std::string in_message(size_t index, const char* field) {
  return "messages[" + std::to_string(index) + "]" + (*field != '\0' ? "." : "") + field;
}

std::string shown(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// The text parts of a message's content, joined as vLLM joins them.
StatusOr<std::string> join_parts(const Json& parts, size_t index) {
  std::string joined;
  for (size_t i = 0; i < parts.size(); ++i) {
    const std::string param = in_message(index, "content") + "[" + std::to_string(i) + "]";
    const Json& part = parts[i];
    if (!part.is_object() || !part.contains("type") || !part["type"].is_string()) {
      return invalid_argument(param + " must be an object with a type", param);
    }
    if (part["type"] != "text") return invalid_argument(param + ": only parts of type \"text\" are supported", param);
    if (!part.contains("text") || !part["text"].is_string()) {
      return invalid_argument(param + ".text must be a string", param + ".text");
    }
    if (i > 0) joined += "\n";
    joined += part["text"].get<std::string>();
  }
  return joined;
}

Status not_supported(const std::string& what, const std::string& param) {
  return Status(StatusCode::kUnimplemented, what + " is not supported yet", param, "unsupported_parameter");
}

// Templates would print what they make of it: better no answer than one to another question.
Status refuse_tools(const Json& message, size_t index) {
  for (const char* const role : {"tool", "function"}) {
    if (message["role"] == role) {
      return not_supported("role \"" + std::string(role) + "\"", in_message(index, "role"));
    }
  }
  for (const char* const field : {"tool_calls", "tool_call_id", "function_call"}) {
    if (!message.contains(field) || message[field].is_null()) continue;
    if (message[field].is_structured() && message[field].empty()) continue;
    return not_supported(in_message(index, field), in_message(index, field));
  }
  return Status();
}

Status check_message(Json& message, size_t index, const ChatTemplate& chat_template) {
  if (!message.is_object())
    return invalid_argument(in_message(index, "") + " must be an object", in_message(index, ""));
  if (!message.contains("role") || !message["role"].is_string()) {
    return invalid_argument(in_message(index, "role") + " must be a string", in_message(index, "role"));
  }
  if (message.contains("name") && !message["name"].is_string() && !message["name"].is_null()) {
    return invalid_argument(in_message(index, "name") + " must be a string", in_message(index, "name"));
  }
  MOED_RETURN_IF_ERROR(refuse_tools(message, index));
  if (message["role"] == "developer" && !chat_template.knows_developer_role()) message["role"] = "system";
  const bool may_lack_content = message["role"] == "assistant";
  if (!message.contains("content") || message["content"].is_null()) {
    if (!may_lack_content) {
      return invalid_argument(in_message(index, "content") + " is missing", in_message(index, "content"));
    }
    message["content"] = nullptr;
    return Status();
  }
  Json& content = message["content"];
  if (content.is_string()) return Status();
  if (!content.is_array()) {
    return invalid_argument(in_message(index, "content") + " must be a string or an array of parts",
                            in_message(index, "content"));
  }
  MOED_ASSIGN_OR_RETURN(std::string joined, join_parts(content, index));
  if (!chat_template.takes_content_lists()) content = std::move(joined);
  return Status();
}

Status check_range(const char* field, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return Status();
  return invalid_argument(std::string(field) + " must be between " + std::to_string(low) + " and " +
                              std::to_string(high) + ", not " + std::to_string(value),
                          field);
}

Status check_count(const char* field, size_t count, int64_t most, const char* setting) {
  if (static_cast<int64_t>(count) <= most) return Status();
  return invalid_argument(std::string(field) + " holds " + std::to_string(count) + " entries, the limit is " +
                              std::to_string(most) + " (" + setting + ")",
                          field);
}

// Requests without a seed draw one; those with one may give any 64-bit number.
uint64_t fresh_seed() {
  thread_local std::mt19937_64 generator{std::random_device{}()};
  return generator();
}

Status fill_logit_bias(const GenerationParams& params, const ValidationContext& context, SamplingParams& sampling) {
  MOED_RETURN_IF_ERROR(
      check_count("logit_bias", params.logit_bias.size(), context.limits.logit_bias_max, "limits.logit_bias_max"));
  std::vector<std::pair<int32_t, float>> biases;
  for (const auto& [token, bias] : params.logit_bias) {
    MOED_RETURN_IF_ERROR(check_range("logit_bias", token, 0, context.vocab_size - 1));
    biases.emplace_back(static_cast<int32_t>(token), static_cast<float>(bias));
  }
  sampling.logit_bias = std::move(biases);
  return Status();
}

// Each id once, in order: a list may name the vocabulary many times over.
Status fill_allowed(const GenerationParams& params, const ValidationContext& context, SamplingParams& sampling) {
  if (!params.allowed_token_ids.has_value()) return Status();
  if (params.allowed_token_ids->empty()) {
    return invalid_argument("allowed_token_ids must not be empty", "allowed_token_ids");
  }
  std::vector<bool> named(static_cast<size_t>(context.vocab_size));
  for (const int64_t token : *params.allowed_token_ids) {
    MOED_RETURN_IF_ERROR(check_range("allowed_token_ids", token, 0, context.vocab_size - 1));
    named[static_cast<size_t>(token)] = true;
  }
  std::vector<int32_t> allowed;
  for (int32_t token = 0; token < context.vocab_size; ++token) {
    if (named[token]) allowed.push_back(token);
  }
  sampling.allowed_token_ids = std::move(allowed);
  return Status();
}

// Checked before anything is copied: each prompt's request has the list.
Status fill_stop_ids(const GenerationParams& params, const ValidationContext& context, RequestSpec& spec) {
  MOED_RETURN_IF_ERROR(check_count("stop_token_ids", params.stop_token_ids.size(), context.limits.stop_token_ids_max,
                                   "limits.stop_token_ids_max"));
  for (const int64_t token : params.stop_token_ids) {
    MOED_RETURN_IF_ERROR(check_range("stop_token_ids", token, 0, context.vocab_size - 1));
    spec.stop_token_ids.push_back(static_cast<int32_t>(token));
  }
  return Status();
}

Status fill_sampling(const GenerationParams& params, const ValidationContext& context, SamplingParams& sampling) {
  const GenerationDefaults& defaults = context.defaults;
  sampling.temperature = static_cast<float>(params.temperature.value_or(defaults.temperature));
  sampling.top_p = static_cast<float>(params.top_p.value_or(defaults.top_p));
  sampling.min_p = static_cast<float>(params.min_p.value_or(defaults.min_p));
  sampling.presence_penalty = static_cast<float>(params.presence_penalty.value_or(0.0));
  sampling.frequency_penalty = static_cast<float>(params.frequency_penalty.value_or(0.0));
  sampling.repetition_penalty = static_cast<float>(params.repetition_penalty.value_or(defaults.repetition_penalty));
  const int64_t top_k = params.top_k.value_or(defaults.top_k);
  MOED_RETURN_IF_ERROR(check_range("top_k", top_k, -1, kInt32Max));
  sampling.top_k = top_k < 0 ? 0 : static_cast<int32_t>(top_k);
  const int64_t min_tokens = params.min_tokens.value_or(0);
  MOED_RETURN_IF_ERROR(check_range("min_tokens", min_tokens, 0, kInt32Max));
  sampling.min_tokens = static_cast<int32_t>(min_tokens);
  sampling.seed = params.seed.has_value() ? static_cast<uint64_t>(*params.seed) : fresh_seed();
  MOED_RETURN_IF_ERROR(fill_logit_bias(params, context, sampling));
  MOED_RETURN_IF_ERROR(fill_allowed(params, context, sampling));
  const int64_t logprobs = params.logprobs.value_or(-1);
  const int64_t prompt_logprobs = params.prompt_logprobs.value_or(-1);
  MOED_RETURN_IF_ERROR(check_range(params.logprobs_field, logprobs, -1, context.limits.top_logprobs_max));
  MOED_RETURN_IF_ERROR(check_range("prompt_logprobs", prompt_logprobs, -1, context.limits.top_logprobs_max));
  sampling.num_logprobs = static_cast<int32_t>(std::max(logprobs, prompt_logprobs));
  return Status();
}

Status check_stops(const GenerationParams& params, const Settings::Limits& limits) {
  MOED_RETURN_IF_ERROR(check_count("stop", params.stop.size(), limits.stop_max, "limits.stop_max"));
  for (const std::string& stop : params.stop) {
    if (stop.empty()) return invalid_argument("stop must not hold an empty string", "stop");
    if (static_cast<int64_t>(stop.size()) > limits.stop_bytes_max) {
      return invalid_argument("a stop string of " + std::to_string(stop.size()) + " bytes, the limit is " +
                                  std::to_string(limits.stop_bytes_max) + " (limits.stop_bytes_max)",
                              "stop");
    }
  }
  return Status();
}

// As vLLM does it: a word is banned at the beginning of a text and, where that is one word as well, behind a space.
Status fill_bad_words(const GenerationParams& params, const ValidationContext& context, SamplingParams& sampling) {
  const Settings::Limits& limits = context.limits;
  MOED_RETURN_IF_ERROR(check_count("bad_words", params.bad_words.size(), limits.bad_words_max, "limits.bad_words_max"));
  std::vector<std::vector<int32_t>> words;
  for (const std::string& given : params.bad_words) {
    const std::string word = given.substr(std::min(given.find_first_not_of(" \t\r\n"), given.size()));
    if (word.empty()) return invalid_argument("bad_words must not hold an empty word", "bad_words");
    if (static_cast<int64_t>(given.size()) > limits.stop_bytes_max) {
      return invalid_argument("a word of bad_words has " + std::to_string(given.size()) + " bytes, the limit is " +
                                  std::to_string(limits.stop_bytes_max) + " (limits.stop_bytes_max)",
                              "bad_words");
    }
    MOED_ASSIGN_OR_RETURN(std::vector<int32_t> alone, context.tokenizer->encode(word, /*add_special_tokens=*/false));
    MOED_ASSIGN_OR_RETURN(std::vector<int32_t> spaced,
                          context.tokenizer->encode(" " + word, /*add_special_tokens=*/false));
    if (alone.empty()) continue;
    if (spaced.size() == alone.size() && spaced.front() != alone.front()) {
      words.push_back(std::move(spaced));
    }
    words.push_back(std::move(alone));
  }
  sampling.bad_words = std::move(words);
  return Status();
}

// Refuses, before the tokenizer sees it, text of which even the longest tokens would be too many.
Status check_length(const std::string& text, const char* field, const ValidationContext& context) {
  const int64_t longest = std::max(1, context.tokenizer->longest_token_bytes());
  const int64_t tokens = static_cast<int64_t>(text.size()) / longest;
  return tokens > context.max_model_len ? context_overflow(tokens, 0, context.max_model_len, field) : Status();
}

// The same for a chat before its template sees it. Templates leave parts of messages out, and JSON spells some
// characters long: hence the slack.
Status check_chat_length(const std::string& messages_json, const std::string& kwargs_json,
                         const ValidationContext& context) {
  const int64_t token_bytes = std::max<int64_t>(kJsonCharacterBytes, context.tokenizer->longest_token_bytes());
  const auto bytes = static_cast<int64_t>(messages_json.size() + kwargs_json.size());
  if (bytes - kChatSlackBytes <= token_bytes * context.max_model_len) return Status();
  return context_overflow(bytes / token_bytes, 0, context.max_model_len, "messages");
}

// Text that will be truncated may be as long as a body.
StatusOr<std::vector<int32_t>> encode_text(const std::string& text, bool add_special, const GenerationParams& params,
                                           const ValidationContext& context) {
  if (!params.truncate_prompt_tokens.has_value()) {
    MOED_RETURN_IF_ERROR(check_length(text, params.chat ? "messages" : "prompt", context));
  }
  return context.tokenizer->encode(text, add_special);
}

StatusOr<std::vector<int32_t>> check_ids(const std::vector<int64_t>& ids, const ValidationContext& context) {
  std::vector<int32_t> tokens;
  tokens.reserve(ids.size());
  for (const int64_t id : ids) {
    MOED_RETURN_IF_ERROR(check_range("prompt", id, 0, context.vocab_size - 1));
    tokens.push_back(static_cast<int32_t>(id));
  }
  return tokens;
}

struct TokenizedPrompt {
  std::vector<int32_t> tokens;
  std::string text;
};

StatusOr<std::vector<TokenizedPrompt>> chat_prompt(const GenerationParams& params, const ValidationContext& context) {
  if (context.chat_template == nullptr) {
    return invalid_argument("this checkpoint has no chat template; use /v1/completions", "messages");
  }
  ChatTemplateOptions options;
  options.add_generation_prompt = params.add_generation_prompt;
  options.continue_final_message = params.continue_final_message;
  options.kwargs_json = params.template_kwargs_json;
  if (options.continue_final_message && options.add_generation_prompt) {
    return invalid_argument("continue_final_message and add_generation_prompt exclude each other",
                            "continue_final_message");
  }
  if (!params.truncate_prompt_tokens.has_value()) {
    MOED_RETURN_IF_ERROR(check_chat_length(params.messages_json, params.template_kwargs_json, context));
  }
  TokenizedPrompt prompt;
  MOED_ASSIGN_OR_RETURN(prompt.text, render_chat(params.messages_json, options, *context.chat_template));
  MOED_ASSIGN_OR_RETURN(prompt.tokens,
                        encode_text(prompt.text, params.add_special_tokens.value_or(false), params, context));
  return std::vector<TokenizedPrompt>{std::move(prompt)};
}

StatusOr<std::vector<TokenizedPrompt>> completion_prompts(const GenerationParams& params,
                                                          const ValidationContext& context) {
  if (params.prompts.empty()) return invalid_argument("prompt must not be empty", "prompt");
  if (static_cast<int64_t>(params.prompts.size()) > context.limits.prompts_max) {
    return invalid_argument("prompt holds " + std::to_string(params.prompts.size()) + " prompts, the limit is " +
                                std::to_string(context.limits.prompts_max) + " (limits.prompts_max)",
                            "prompt");
  }
  if (static_cast<int64_t>(params.prompts.size()) > context.scheduler.queue_max) {
    return invalid_argument("prompt holds " + std::to_string(params.prompts.size()) +
                                " prompts, more than can wait at once: " + std::to_string(context.scheduler.queue_max) +
                                " (scheduler.queue_max)",
                            "prompt");
  }
  std::vector<TokenizedPrompt> prompts;
  for (const PromptInput& input : params.prompts) {
    TokenizedPrompt prompt;
    if (input.is_ids) {
      MOED_ASSIGN_OR_RETURN(prompt.tokens, check_ids(input.ids, context));
      if (params.echo) {
        MOED_ASSIGN_OR_RETURN(prompt.text, context.tokenizer->decode(prompt.tokens, params.skip_special_tokens));
      }
    } else {
      prompt.text = input.text;
      MOED_ASSIGN_OR_RETURN(prompt.tokens,
                            encode_text(input.text, params.add_special_tokens.value_or(true), params, context));
    }
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

bool wants_prompt_scores(const GenerationParams& params) {
  return params.prompt_logprobs.has_value() || (params.echo && params.logprobs.has_value());
}

int64_t scored_tokens(const GenerationParams& params, int64_t num_prompt, int64_t num_new) {
  return (wants_prompt_scores(params) ? num_prompt : 0) + (params.logprobs.has_value() ? num_new : 0);
}

// How long the answers to one prompt may become for limits.scores_max; at least 1.
int64_t scored_rest(const GenerationParams& params, int64_t num_prompt, const ValidationContext& context) {
  if (!params.logprobs.has_value()) return kInt32Max;
  const int64_t a_token = params.n * (std::max(*params.logprobs, params.prompt_logprobs.value_or(0)) + 1);
  return std::max<int64_t>(1, context.limits.scores_max / a_token - scored_tokens(params, num_prompt, 0));
}

// How many tokens to generate: what was asked for, if it fits; else the door's default within what is left.
StatusOr<int32_t> new_tokens(const GenerationParams& params, int64_t num_prompt, const ValidationContext& context) {
  const char* prompt_field = params.chat ? "messages" : "prompt";
  const int64_t most = context.limits.new_tokens_max > 0 ? context.limits.new_tokens_max : context.max_model_len;
  const int64_t rest = context.max_model_len - num_prompt;
  if (params.max_tokens.has_value()) {
    const bool prompt_alone = params.echo || params.prompt_logprobs.has_value();
    MOED_RETURN_IF_ERROR(check_range(params.max_tokens_field, *params.max_tokens, prompt_alone ? 0 : 1, kInt32Max));
    if (*params.max_tokens > rest) {
      return context_overflow(num_prompt, *params.max_tokens, context.max_model_len,
                              rest <= 0 ? prompt_field : params.max_tokens_field);
    }
    MOED_RETURN_IF_ERROR(check_range(params.max_tokens_field, *params.max_tokens, 0, most));
    return static_cast<int32_t>(*params.max_tokens);
  }
  if (rest <= 0) return context_overflow(num_prompt, 1, context.max_model_len, prompt_field);
  const int64_t wanted = params.chat ? scored_rest(params, num_prompt, context) : kCompletionTokens;
  return static_cast<int32_t>(std::min({rest, most, wanted}));
}

// A batch that the queue could never hold would be told to try again, for ever.
Status check_batch(const ValidGeneration& valid, const Settings::Scheduler& scheduler) {
  if (valid.requests.size() <= 1) return Status();
  int64_t num_tokens = 0;
  for (const RequestSpec& spec : valid.requests) num_tokens += static_cast<int64_t>(spec.prompt.size()) * spec.n;
  if (num_tokens <= scheduler.queue_tokens_max) return Status();
  return invalid_argument("prompt holds " + std::to_string(num_tokens) +
                              " tokens, a copy a choice, more than can wait at once: " +
                              std::to_string(scheduler.queue_tokens_max) + " (scheduler.queue_tokens_max)",
                          "prompt");
}

// An answer holds them all at once, and each takes the memory of a short text.
Status check_scores(const GenerationParams& params, const ValidGeneration& valid, int64_t scores_max) {
  int64_t num_scores = 0;
  for (const RequestSpec& spec : valid.requests) {
    num_scores += scored_tokens(params, static_cast<int64_t>(spec.prompt.size()), spec.max_tokens) * spec.n *
                  (spec.sampling.num_logprobs + 1);
  }
  if (num_scores <= scores_max) return Status();
  const char* field = params.prompt_logprobs.has_value() ? "prompt_logprobs" : params.logprobs_field;
  return invalid_argument(
      std::string(field) + ": the answer could hold " + std::to_string(num_scores) +
          " log-probabilities (scored tokens, alternatives counted, of all choices), the limit is " +
          std::to_string(scores_max) + " (limits.scores_max)",
      field);
}

// Keeps the last tokens, as many as asked for; under echo, their text.
Status truncate(const GenerationParams& params, const ValidationContext& context, TokenizedPrompt& prompt) {
  if (!params.truncate_prompt_tokens.has_value()) return Status();
  const int64_t keep = *params.truncate_prompt_tokens;
  MOED_RETURN_IF_ERROR(check_range("truncate_prompt_tokens", keep, -1, context.max_model_len));
  // -1, as vLLM has it: what fits beside the tokens asked for.
  const int64_t asked = std::clamp<int64_t>(params.max_tokens.value_or(params.chat ? 1 : kCompletionTokens), 0,
                                            context.max_model_len - 1);
  const int64_t limit = keep == -1 ? context.max_model_len - asked : keep;
  if (limit == 0) return invalid_argument("truncate_prompt_tokens must be -1 or at least 1", "truncate_prompt_tokens");
  std::vector<int32_t>& tokens = prompt.tokens;
  const auto size = static_cast<int64_t>(tokens.size());
  if (size <= limit) return Status();
  tokens.erase(tokens.begin(), tokens.begin() + (size - limit));
  if (params.echo) {
    MOED_ASSIGN_OR_RETURN(prompt.text, context.tokenizer->decode(tokens, params.skip_special_tokens));
  }
  return Status();
}

}  // namespace

StatusOr<std::string> render_chat(const std::string& messages_json, const ChatTemplateOptions& options,
                                  const ChatTemplate& chat_template) {
  Json messages = Json::parse(messages_json, nullptr, /*allow_exceptions=*/false);
  if (!messages.is_array() || messages.empty()) {
    return invalid_argument("messages must be an array that is not empty", "messages");
  }
  for (size_t i = 0; i < messages.size(); ++i) MOED_RETURN_IF_ERROR(check_message(messages[i], i, chat_template));
  return chat_template.render(messages.dump(-1, ' ', false, Json::error_handler_t::replace), options);
}

StatusOr<TokenizeResult> tokenize_text(const TokenizeParams& params, const ValidationContext& context) {
  TokenizeResult result;
  result.max_model_len = context.max_model_len;
  std::string text;
  if (params.chat) {
    if (context.chat_template == nullptr) return invalid_argument("this checkpoint has no chat template", "messages");
    MOED_RETURN_IF_ERROR(check_chat_length(params.messages_json, params.template_kwargs_json, context));
    ChatTemplateOptions options;
    options.add_generation_prompt = params.add_generation_prompt;
    options.kwargs_json = params.template_kwargs_json;
    MOED_ASSIGN_OR_RETURN(text, render_chat(params.messages_json, options, *context.chat_template));
  } else {
    text = params.text;
  }
  MOED_RETURN_IF_ERROR(check_length(text, params.chat ? "messages" : "prompt", context));
  MOED_ASSIGN_OR_RETURN(result.tokens,
                        context.tokenizer->encode(text, params.add_special_tokens.value_or(!params.chat)));
  return result;
}

std::string clamp_defaults(GenerationDefaults& defaults) {
  std::string changes;
  const auto clamp = [&](const char* name, double& value, double low, double high) {
    const double within = std::clamp(value, low, high);
    if (within == value) return;
    changes += std::string(changes.empty() ? "" : ", ") + name + " " + shown(value) + " becomes " + shown(within);
    value = within;
  };
  clamp("temperature", defaults.temperature, 0.0, kTemperatureMax);
  clamp("top_p", defaults.top_p, kTopPMin, 1.0);
  clamp("min_p", defaults.min_p, 0.0, 1.0);
  clamp("repetition_penalty", defaults.repetition_penalty, double{kRepetitionPenaltyMin},
        double{kRepetitionPenaltyMax});
  return changes.empty() ? "" : "generation_config.json: what requests may not ask for is no default: " + changes;
}

RequestLimits request_limits(const ValidationContext& context) {
  RequestLimits limits;
  limits.vocab_size = context.vocab_size;
  limits.max_model_len = context.max_model_len;
  limits.n_max = static_cast<int32_t>(context.limits.n_max);
  limits.new_tokens_max =
      context.limits.new_tokens_max > 0 ? static_cast<int32_t>(context.limits.new_tokens_max) : context.max_model_len;
  limits.logprobs_max = static_cast<int32_t>(context.limits.top_logprobs_max);
  limits.logit_bias_max = static_cast<int32_t>(context.limits.logit_bias_max);
  limits.stop_token_ids_max = static_cast<int32_t>(context.limits.stop_token_ids_max);
  return limits;
}

StatusOr<ValidGeneration> validate(const GenerationParams& params, const ValidationContext& context) {
  RequestSpec common;
  MOED_RETURN_IF_ERROR(check_range("n", params.n, 1, context.limits.n_max));
  common.n = static_cast<int32_t>(params.n);
  MOED_RETURN_IF_ERROR(check_range("priority", params.priority, -kInt32Max, kInt32Max));
  if (params.priority != 0 && context.scheduler.scheduling_policy != "priority") {
    return invalid_argument("priority is " + std::to_string(params.priority) +
                                ", but priority scheduling is not enabled (scheduler.scheduling_policy)",
                            "priority");
  }
  common.priority = static_cast<int32_t>(params.priority);
  MOED_RETURN_IF_ERROR(fill_sampling(params, context, common.sampling));
  MOED_RETURN_IF_ERROR(check_stops(params, context.limits));
  MOED_RETURN_IF_ERROR(fill_bad_words(params, context, common.sampling));
  MOED_RETURN_IF_ERROR(fill_stop_ids(params, context, common));
  common.eos_token_ids = context.eos_token_ids;
  common.ignore_eos = params.ignore_eos;

  ValidGeneration valid;
  valid.echo = params.echo;
  valid.prompt_ids = params.return_token_ids;
  valid.prompt_scores = wants_prompt_scores(params);
  valid.text = {params.stop, params.include_stop_str_in_output, params.skip_special_tokens, common.sampling.min_tokens,
                params.logprobs.has_value()};
  common.prompt_logprobs = valid.prompt_scores;

  MOED_ASSIGN_OR_RETURN(auto prompts, params.chat ? chat_prompt(params, context) : completion_prompts(params, context));
  for (TokenizedPrompt& prompt : prompts) {
    MOED_RETURN_IF_ERROR(truncate(params, context, prompt));
    if (prompt.tokens.empty()) {
      return invalid_argument("the prompt has no tokens", params.chat ? "messages" : "prompt");
    }
    RequestSpec spec = common;
    MOED_ASSIGN_OR_RETURN(spec.max_tokens, new_tokens(params, static_cast<int64_t>(prompt.tokens.size()), context));
    spec.prompt = std::move(prompt.tokens);
    const int64_t limit = context.limits.prompt_tokens_max;
    if (limit > 0 && static_cast<int64_t>(spec.prompt.size()) > limit) {
      return invalid_argument("the prompt has " + std::to_string(spec.prompt.size()) + " tokens, the limit is " +
                                  std::to_string(limit) + " (limits.prompt_tokens_max)",
                              params.chat ? "messages" : "prompt");
    }
    valid.requests.push_back(std::move(spec));
    valid.prompt_texts.push_back(params.echo ? std::move(prompt.text) : std::string());
  }
  MOED_RETURN_IF_ERROR(check_batch(valid, context.scheduler));
  MOED_RETURN_IF_ERROR(check_scores(params, valid, context.limits.scores_max));
  return valid;
}

}  // namespace moed
