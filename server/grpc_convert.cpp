#include "server/grpc_convert.h"

#include <algorithm>

#include "server/openai_json.h"

namespace moed {

namespace {

std::string messages_json(const google::protobuf::RepeatedPtrField<v1::ChatMessage>& messages) {
  WireJson out = WireJson::array();
  for (const v1::ChatMessage& message : messages) {
    WireJson item = WireJson::object();
    item["role"] = message.role();
    item["content"] = message.has_content() ? WireJson(message.content()) : WireJson();
    if (message.has_name()) item["name"] = message.name();
    out.push_back(std::move(item));
  }
  return dump_json(out);
}

template <class T>
std::vector<int64_t> ids_of(const T& field) {
  return std::vector<int64_t>(field.begin(), field.end());
}

void read_sampling(const v1::SamplingOptions& from, GenerationParams& to) {
  if (from.has_temperature()) to.temperature = from.temperature();
  if (from.has_top_p()) to.top_p = from.top_p();
  if (from.has_top_k()) to.top_k = from.top_k();
  if (from.has_min_p()) to.min_p = from.min_p();
  if (from.has_presence_penalty()) to.presence_penalty = from.presence_penalty();
  if (from.has_frequency_penalty()) to.frequency_penalty = from.frequency_penalty();
  if (from.has_repetition_penalty()) to.repetition_penalty = from.repetition_penalty();
  if (from.has_seed()) to.seed = from.seed();
  if (from.has_max_tokens()) to.max_tokens = from.max_tokens();
  if (from.has_min_tokens()) to.min_tokens = from.min_tokens();
  if (from.has_n()) to.n = from.n();
  to.stop.assign(from.stop().begin(), from.stop().end());
  to.include_stop_str_in_output = from.include_stop_str_in_output();
  to.stop_token_ids = ids_of(from.stop_token_ids());
  to.ignore_eos = from.ignore_eos();
  if (from.has_skip_special_tokens()) to.skip_special_tokens = from.skip_special_tokens();
  to.logit_bias.assign(from.logit_bias().begin(), from.logit_bias().end());
  std::sort(to.logit_bias.begin(), to.logit_bias.end());  // a protobuf map has no order
  if (from.allowed_token_ids_size() > 0) to.allowed_token_ids = ids_of(from.allowed_token_ids());
  to.bad_words.assign(from.bad_words().begin(), from.bad_words().end());
  if (from.has_logprobs()) to.logprobs = from.logprobs();
  if (from.has_prompt_logprobs()) to.prompt_logprobs = from.prompt_logprobs();
  if (from.has_truncate_prompt_tokens()) to.truncate_prompt_tokens = from.truncate_prompt_tokens();
  to.priority = from.priority();
}

// A negative count would read as "none" further on.
Status check_counts(const GenerationParams& params) {
  if (params.logprobs.value_or(0) < 0) return invalid_argument("logprobs must not be negative", "logprobs");
  if (params.prompt_logprobs.value_or(0) < 0)
    return invalid_argument("prompt_logprobs must not be negative", "prompt_logprobs");
  return Status();
}

v1::FinishReason to_proto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    default:
      return v1::FINISH_REASON_UNSPECIFIED;
  }
}

void fill_tokens(const std::vector<TokenText>& tokens, int64_t num_top,
                 google::protobuf::RepeatedPtrField<v1::Token>* target) {
  for (const TokenText& token : tokens) {
    v1::Token& out = *target->Add();
    out.set_token_id(token.token);
    out.set_token(token.bytes);
    if (token.logprob) out.set_logprob(*token.logprob);
    for (size_t i = 0; i < token.top.size() && static_cast<int64_t>(i) < num_top; ++i) {
      v1::TokenAlternative& other = *out.add_top();
      other.set_token_id(token.top[i].token);
      other.set_token(token.top[i].bytes);
      other.set_logprob(token.top[i].logprob);
    }
  }
}

template <class T>
void fill_end(const Delta& delta, T& target) {
  if (delta.finish == FinishReason::kNone) return;
  target.set_finish_reason(to_proto(delta.finish));
  target.set_stop_text(delta.stop_text);
  if (delta.stop_token >= 0) target.set_stop_token_id(delta.stop_token);
}

}  // namespace

grpc::Status to_grpc(const Status& status) {
  const auto code = [&] {
    switch (status.code()) {
      case StatusCode::kOk:
        return grpc::StatusCode::OK;
      case StatusCode::kInvalidArgument:
        return grpc::StatusCode::INVALID_ARGUMENT;
      case StatusCode::kUnauthenticated:
        return grpc::StatusCode::UNAUTHENTICATED;
      case StatusCode::kNotFound:
        return grpc::StatusCode::NOT_FOUND;
      case StatusCode::kResourceExhausted:
        return grpc::StatusCode::RESOURCE_EXHAUSTED;
      case StatusCode::kUnavailable:
        return grpc::StatusCode::UNAVAILABLE;
      case StatusCode::kCancelled:
        return grpc::StatusCode::CANCELLED;
      case StatusCode::kDeadlineExceeded:
        return grpc::StatusCode::DEADLINE_EXCEEDED;
      case StatusCode::kUnimplemented:
        return grpc::StatusCode::UNIMPLEMENTED;
      case StatusCode::kInternal:
        return grpc::StatusCode::INTERNAL;
    }
    return grpc::StatusCode::UNKNOWN;
  }();
  return {code, status.message()};
}

const char* code_name(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::OK:
      return "OK";
    case grpc::StatusCode::CANCELLED:
      return "CANCELLED";
    case grpc::StatusCode::INVALID_ARGUMENT:
      return "INVALID_ARGUMENT";
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return "DEADLINE_EXCEEDED";
    case grpc::StatusCode::NOT_FOUND:
      return "NOT_FOUND";
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return "RESOURCE_EXHAUSTED";
    case grpc::StatusCode::UNIMPLEMENTED:
      return "UNIMPLEMENTED";
    case grpc::StatusCode::INTERNAL:
      return "INTERNAL";
    case grpc::StatusCode::UNAVAILABLE:
      return "UNAVAILABLE";
    case grpc::StatusCode::UNAUTHENTICATED:
      return "UNAUTHENTICATED";
    default:
      return "UNKNOWN";
  }
}

StatusOr<GenerationParams> to_params(const v1::ChatCompletionRequest& request, int64_t json_depth_max) {
  GenerationParams params;
  params.chat = true;
  params.model = request.model();
  params.request_id = request.request_id();
  params.messages_json = messages_json(request.messages());
  if (!request.chat_template_kwargs_json().empty()) {
    const auto object = parse_body(request.chat_template_kwargs_json(), json_depth_max);
    if (!object.ok()) {
      return invalid_argument("chat_template_kwargs_json must be a JSON object", "chat_template_kwargs_json");
    }
    params.template_kwargs_json = request.chat_template_kwargs_json();
  }
  if (request.has_add_generation_prompt()) params.add_generation_prompt = request.add_generation_prompt();
  params.continue_final_message = request.continue_final_message();
  if (request.has_add_special_tokens()) params.add_special_tokens = request.add_special_tokens();
  read_sampling(request.sampling(), params);
  MOED_RETURN_IF_ERROR(check_counts(params));
  return params;
}

StatusOr<GenerationParams> to_params(const v1::GenerateRequest& request) {
  GenerationParams params;
  params.model = request.model();
  params.request_id = request.request_id();
  switch (request.prompt_case()) {
    case v1::GenerateRequest::kText:
      params.prompts.push_back({.text = request.text()});
      break;
    case v1::GenerateRequest::kTokenIds:
      params.prompts.push_back({.ids = ids_of(request.token_ids().ids()), .is_ids = true});
      break;
    default:
      return invalid_argument("prompt: text or token_ids must be set", "prompt");
  }
  if (request.has_add_special_tokens()) params.add_special_tokens = request.add_special_tokens();
  params.echo = request.echo();
  read_sampling(request.sampling(), params);
  MOED_RETURN_IF_ERROR(check_counts(params));
  return params;
}

StatusOr<TokenizeParams> to_params(const v1::TokenizeRequest& request) {
  TokenizeParams params;
  params.model = request.model();
  switch (request.input_case()) {
    case v1::TokenizeRequest::kText:
      params.text = request.text();
      break;
    case v1::TokenizeRequest::kChat:
      params.chat = true;
      params.messages_json = messages_json(request.chat().messages());
      break;
    default:
      return invalid_argument("input: text or chat must be set", "input");
  }
  if (request.has_add_special_tokens()) params.add_special_tokens = request.add_special_tokens();
  if (request.has_add_generation_prompt()) params.add_generation_prompt = request.add_generation_prompt();
  return params;
}

void fill_usage(const Usage& usage, v1::Usage* target) {
  target->set_prompt_tokens(usage.prompt_tokens);
  target->set_completion_tokens(usage.completion_tokens);
  target->set_total_tokens(usage.prompt_tokens + usage.completion_tokens);
  target->set_cached_tokens(usage.cached_tokens);
}

void add_delta(const Delta& delta, const AnswerShape& shape, v1::ChatCompletionResponse& response) {
  while (response.choices_size() <= delta.choice) {
    v1::ChatChoice& made = *response.add_choices();
    made.set_index(response.choices_size() - 1);
    made.mutable_message()->set_role("assistant");
    made.mutable_message()->set_content("");
  }
  v1::ChatChoice& choice = *response.mutable_choices(delta.choice);
  choice.mutable_message()->mutable_content()->append(delta.text);
  if (shape.logprobs) fill_tokens(delta.tokens, shape.num_top, choice.mutable_tokens());
  fill_end(delta, choice);
}

bool make_chunk(const Delta& delta, const AnswerShape& shape, bool first, v1::ChatCompletionChunk& chunk) {
  const bool has_scores = shape.logprobs && !delta.tokens.empty();
  if (!first && delta.text.empty() && !has_scores && delta.finish == FinishReason::kNone) return false;
  chunk.set_id(shape.id);
  chunk.set_created(shape.created_s);
  chunk.set_model(shape.model);
  v1::ChatChunkChoice& choice = *chunk.mutable_choice();
  choice.set_index(delta.choice);
  if (first) choice.set_role("assistant");
  choice.set_content(delta.text);
  if (has_scores) fill_tokens(delta.tokens, shape.num_top, choice.mutable_tokens());
  fill_end(delta, choice);
  return true;
}

bool make_chunk(const Delta& delta, const AnswerShape& shape, bool first, v1::GenerateChunk& chunk) {
  const bool has_prompt = first && delta.has_prompt;
  if (!has_prompt && delta.text.empty() && delta.token_ids.empty() && delta.finish == FinishReason::kNone) return false;
  chunk.set_index(delta.choice);
  chunk.set_text(delta.text);
  chunk.mutable_token_ids()->Assign(delta.token_ids.begin(), delta.token_ids.end());
  if (shape.logprobs) fill_tokens(delta.tokens, shape.num_top, chunk.mutable_tokens());
  if (has_prompt && shape.echo) chunk.set_prompt_text(delta.prompt_text);
  if (has_prompt && shape.prompt_logprobs)
    fill_tokens(delta.prompt_tokens, shape.num_prompt_top, chunk.mutable_prompt_tokens());
  fill_end(delta, chunk);
  return true;
}

void make_last(const Usage& usage, const AnswerShape& shape, v1::ChatCompletionChunk& chunk) {
  chunk.set_id(shape.id);
  chunk.set_created(shape.created_s);
  chunk.set_model(shape.model);
  fill_usage(usage, chunk.mutable_usage());
}

void make_last(const Usage& usage, const AnswerShape& shape, v1::GenerateChunk& chunk) {
  (void)shape;
  fill_usage(usage, chunk.mutable_usage());
}

}  // namespace moed
