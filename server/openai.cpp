#include "server/openai.h"

#include <charconv>

#include "server/openai_json.h"

namespace moed {

namespace {

bool is_empty(const WireJson& value) {
  if (value.is_boolean()) return !value.get<bool>();
  return value.is_string() ? value.get_ref<const std::string&>().empty() : value.is_structured() && value.empty();
}

// Fields that would change the answer and are not served: anything but absence (emptiness, false) is refused.
void refuse_present(BodyFields& fields, std::initializer_list<const char*> names) {
  for (const char* const name : names) {
    const WireJson* const value = fields.find(name);
    if (value != nullptr && !is_empty(*value)) fields.refuse(name);
  }
}

void refuse_true(BodyFields& fields, std::initializer_list<const char*> names) {
  for (const char* const name : names) {
    bool value = false;
    fields.read(name, value);
    if (value) fields.refuse(name);
  }
}

void read_strings(BodyFields& fields, const char* name, const char* wanted, std::vector<std::string>& target) {
  const WireJson* const value = fields.find(name);
  if (value == nullptr) return;
  if (!value->is_array()) return fields.fail(name, wanted);
  for (const WireJson& item : *value) {
    if (!item.is_string()) return fields.fail(name, wanted);
    target.push_back(item.get<std::string>());
  }
}

void read_stop(BodyFields& fields, std::vector<std::string>& stop) {
  const WireJson* const value = fields.find("stop");
  if (value != nullptr && value->is_string()) {
    stop.push_back(value->get<std::string>());
    return;
  }
  read_strings(fields, "stop", "must be a string or an array of strings", stop);
}

void read_logit_bias(BodyFields& fields, std::vector<std::pair<int64_t, double>>& bias) {
  const WireJson* const value = fields.find("logit_bias");
  if (value == nullptr) return;
  if (!value->is_object()) return fields.fail("logit_bias", "must be an object of token ids and numbers");
  for (const auto& [key, number] : value->items()) {
    int64_t token = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token);
    if (error != std::errc() || end != key.data() + key.size() || !number.is_number()) {
      return fields.fail("logit_bias", "must be an object of token ids and numbers");
    }
    bias.emplace_back(token, number.get<double>());
  }
}

void read_stream(BodyFields& fields, OpenAiCall& call) {
  fields.read("stream", call.stream);
  const WireJson* const options = fields.find("stream_options");
  if (options == nullptr) return;
  if (!options->is_object()) return fields.fail("stream_options", "must be an object");
  if (!call.stream) return fields.fail("stream_options", "needs stream to be true");
  BodyFields inner(*options, "stream_options.");
  inner.read("include_usage", call.include_usage);
  inner.read("continuous_usage_stats", call.continuous_usage);
  call.continuous_usage = call.continuous_usage && call.include_usage;  // as in vLLM
  if (!inner.status().ok()) fields.fail("stream_options", inner.status().message());
}

void read_response_format(BodyFields& fields) {
  const WireJson* const value = fields.find("response_format");
  if (value == nullptr) return;
  if (!value->is_object() || !value->contains("type") || !(*value)["type"].is_string()) {
    return fields.fail("response_format", "must be an object with a type");
  }
  if ((*value)["type"] != "text")
    fields.refuse("response_format", "response_format other than text is not supported yet");
}

// What both endpoints share.
void read_common(BodyFields& fields, OpenAiCall& call) {
  GenerationParams& params = call.params;
  fields.read("model", params.model);
  fields.read("temperature", params.temperature);
  fields.read("top_p", params.top_p);
  fields.read("min_p", params.min_p);
  fields.read("top_k", params.top_k);
  fields.read("presence_penalty", params.presence_penalty);
  fields.read("frequency_penalty", params.frequency_penalty);
  fields.read("repetition_penalty", params.repetition_penalty);
  fields.read("seed", params.seed);
  fields.read("max_tokens", params.max_tokens);
  fields.read("min_tokens", params.min_tokens);
  fields.read("n", params.n);
  read_stop(fields, params.stop);
  fields.read("include_stop_str_in_output", params.include_stop_str_in_output);
  fields.read("stop_token_ids", params.stop_token_ids);
  fields.read("ignore_eos", params.ignore_eos);
  fields.read("skip_special_tokens", params.skip_special_tokens);
  fields.read("add_special_tokens", params.add_special_tokens);
  fields.read("truncate_prompt_tokens", params.truncate_prompt_tokens);
  fields.read("priority", params.priority);
  fields.read("prompt_logprobs", params.prompt_logprobs);
  read_logit_bias(fields, params.logit_bias);
  read_strings(fields, "bad_words", "must be an array of strings", params.bad_words);
  fields.read("return_token_ids", params.return_token_ids);
  if (fields.find("allowed_token_ids") != nullptr) {
    std::vector<int64_t> allowed;
    fields.read("allowed_token_ids", allowed);
    params.allowed_token_ids = std::move(allowed);
  }
  read_stream(fields, call);
  read_response_format(fields);
  if (params.prompt_logprobs.value_or(0) < 0) fields.fail("prompt_logprobs", "must not be negative");
  if (call.stream && params.prompt_logprobs.value_or(0) > 0) fields.fail("prompt_logprobs", "cannot be streamed");
  if (call.stream) params.prompt_logprobs.reset();  // 0, as in vLLM: nothing to show
  refuse_true(fields, {"use_beam_search", "return_tokens_as_token_ids"});
  refuse_present(fields, {"structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
                          "structural_tag", "json_schema", "grammar", "logits_processors", "kv_transfer_params"});
  for (const char* const name : {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                                 "request_id", "spaces_between_special_tokens"}) {
    fields.ignore(name);
  }
}

void read_tools(BodyFields& fields) {
  for (const char* const name : {"tools", "functions"}) {
    const WireJson* const tools = fields.find(name);
    if (tools != nullptr && !tools->is_array()) fields.fail(name, "must be an array");
    if (tools != nullptr && !tools->empty()) fields.refuse(name);
  }
  for (const char* const name : {"tool_choice", "function_call"}) {
    const WireJson* const choice = fields.find(name);
    if (choice != nullptr && *choice != "none") fields.refuse(name);
  }
  fields.ignore("parallel_tool_calls");
}

void read_chat_logprobs(BodyFields& fields, GenerationParams& params) {
  bool wanted = false;
  std::optional<int64_t> top;
  fields.read("logprobs", wanted);
  fields.read("top_logprobs", top);
  if (top && !wanted) return fields.fail("top_logprobs", "needs logprobs to be true");
  if (top && *top < 0) return fields.fail("top_logprobs", "must not be negative");
  if (wanted) params.logprobs = top.value_or(0);
  params.logprobs_field = "top_logprobs";
}

StatusOr<std::vector<int64_t>> token_ids(const WireJson& array, const std::string& param) {
  std::vector<int64_t> ids;
  ids.reserve(array.size());
  for (const WireJson& item : array) {
    const std::optional<int64_t> id = as_integer(item);
    if (!id) return invalid_argument(param + " must hold token ids alone", param);
    ids.push_back(*id);
  }
  return ids;
}

// A string, strings, token ids or lists of token ids.
Status read_prompts(BodyFields& fields, std::vector<PromptInput>& prompts) {
  const WireJson* const value = fields.find("prompt");
  const char* const kWanted = "prompt must be a string, an array of strings, of token ids, or of arrays of token ids";
  if (value == nullptr) return invalid_argument("prompt is missing", "prompt");
  if (value->is_string()) {
    prompts.push_back({.text = value->get<std::string>()});
    return Status();
  }
  if (!value->is_array() || value->empty()) return invalid_argument(kWanted, "prompt");
  if (value->front().is_number()) {
    MOED_ASSIGN_OR_RETURN(auto ids, token_ids(*value, "prompt"));
    prompts.push_back({.ids = std::move(ids), .is_ids = true});
    return Status();
  }
  for (size_t i = 0; i < value->size(); ++i) {
    const WireJson& item = (*value)[i];
    const std::string param = "prompt[" + std::to_string(i) + "]";
    if (item.is_string()) {
      prompts.push_back({.text = item.get<std::string>()});
    } else if (item.is_array() && !item.empty()) {
      MOED_ASSIGN_OR_RETURN(auto ids, token_ids(item, param));
      prompts.push_back({.ids = std::move(ids), .is_ids = true});
    } else {
      return invalid_argument(std::string(kWanted) + "; " + param + " is none", param);
    }
  }
  return Status();
}

void read_messages(BodyFields& fields, std::string& messages_json) {
  const WireJson* const messages = fields.find("messages");
  if (messages == nullptr) return fields.fail("messages", "is missing");
  if (!messages->is_array() || messages->empty()) return fields.fail("messages", "must be an array that is not empty");
  messages_json = dump_json(*messages);
}

StatusOr<OpenAiCall> read_chat(BodyFields& fields) {
  OpenAiCall call;
  call.params.chat = true;
  read_messages(fields, call.params.messages_json);
  read_common(fields, call);
  if (fields.find("max_completion_tokens") != nullptr) {  // the newer name wins
    fields.read("max_completion_tokens", call.params.max_tokens);
    call.params.max_tokens_field = "max_completion_tokens";
  }
  read_chat_logprobs(fields, call.params);
  read_tools(fields);
  fields.read_object("chat_template_kwargs", call.params.template_kwargs_json);
  fields.read("add_generation_prompt", call.params.add_generation_prompt);
  fields.read("continue_final_message", call.params.continue_final_message);
  refuse_present(fields, {"chat_template", "documents", "audio", "mm_processor_kwargs"});
  refuse_true(fields, {"echo"});
  fields.ignore("reasoning_effort");
  if (!fields.status().ok()) return fields.status();
  call.unknown_fields = fields.unknown();
  return call;
}

StatusOr<OpenAiCall> read_completion(BodyFields& fields) {
  OpenAiCall call;
  MOED_RETURN_IF_ERROR(read_prompts(fields, call.params.prompts));
  read_common(fields, call);
  fields.read("echo", call.params.echo);
  fields.read("logprobs", call.params.logprobs);
  if (call.params.logprobs && *call.params.logprobs < 0) fields.fail("logprobs", "must not be negative");
  refuse_present(fields, {"suffix", "prompt_embeds"});
  std::optional<int64_t> best_of;
  fields.read("best_of", best_of);
  if (best_of && *best_of != 1 && *best_of != call.params.n) {
    fields.refuse("best_of", "best_of other than 1 or n is not supported");
  }
  if (!fields.status().ok()) return fields.status();
  call.unknown_fields = fields.unknown();
  return call;
}

struct ErrorKind {
  int http_status;
  const char* type;
  const char* code;  // when the error has none of its own
};

ErrorKind error_kind(int http_status) {
  switch (http_status) {
    case 401:
      return {401, "invalid_request_error", "invalid_api_key"};
    case 404:
      return {404, "invalid_request_error", "not_found"};
    case 405:
      return {405, "invalid_request_error", "method_not_allowed"};
    case 408:
      return {408, "timeout_error", "request_timeout"};
    case 413:
      return {413, "invalid_request_error", "request_too_large"};
    case 415:
      return {415, "invalid_request_error", "unsupported_media_type"};
    case 429:
      return {429, "rate_limit_error", "queue_full"};
    case 431:
      return {431, "invalid_request_error", "headers_too_large"};
    case 503:
      return {503, "service_unavailable_error", "unavailable"};
    case 500:
      return {500, "server_error", "internal_error"};
    default:
      return {400, "invalid_request_error", "invalid_request"};
  }
}

WireJson envelope(int http_status, const std::string& message, const std::string& param, const std::string& code) {
  const ErrorKind kind = error_kind(http_status);
  WireJson error = WireJson::object();
  error["message"] = message;
  error["type"] = kind.type;
  error["param"] = param.empty() ? WireJson() : WireJson(param);
  error["code"] = code.empty() ? kind.code : code;
  WireJson out = WireJson::object();
  out["error"] = std::move(error);
  return out;
}

WireJson model_entry(const ModelInfo& model, const std::string& name) {
  WireJson out = WireJson::object();
  out["id"] = name;
  out["object"] = "model";
  out["created"] = model.created_s;
  out["owned_by"] = "moed";
  out["root"] = model.root;
  out["parent"] = nullptr;
  out["max_model_len"] = model.max_model_len;
  return out;
}

}  // namespace

StatusOr<OpenAiCall> parse_chat_request(std::string_view body, int64_t json_depth_max) {
  MOED_ASSIGN_OR_RETURN(const WireJson json, parse_body(body, json_depth_max));
  BodyFields fields(json);
  return read_chat(fields);
}

StatusOr<OpenAiCall> parse_completion_request(std::string_view body, int64_t json_depth_max) {
  MOED_ASSIGN_OR_RETURN(const WireJson json, parse_body(body, json_depth_max));
  BodyFields fields(json);
  return read_completion(fields);
}

std::set<std::string, std::less<>> request_field_names(bool chat) {
  const WireJson json = {{"prompt", "a"}};
  BodyFields fields(json);
  if (chat) {
    (void)read_chat(fields);
  } else {
    (void)read_completion(fields);
  }
  return fields.known();
}

StatusOr<TokenizeParams> parse_tokenize_request(std::string_view body, int64_t json_depth_max) {
  MOED_ASSIGN_OR_RETURN(const WireJson json, parse_body(body, json_depth_max));
  BodyFields fields(json);
  TokenizeParams params;
  fields.read("model", params.model);
  fields.read("add_special_tokens", params.add_special_tokens);
  fields.read("add_generation_prompt", params.add_generation_prompt);
  fields.read_object("chat_template_kwargs", params.template_kwargs_json);
  refuse_true(fields, {"continue_final_message", "return_token_strs"});
  refuse_present(fields, {"tools", "chat_template"});
  if (fields.find("messages") != nullptr) {
    params.chat = true;
    read_messages(fields, params.messages_json);
  } else if (fields.find("prompt") == nullptr) {
    fields.fail("prompt", "is missing");
  }
  fields.read("prompt", params.text);
  if (!fields.status().ok()) return fields.status();
  return params;
}

StatusOr<DetokenizeCall> parse_detokenize_request(std::string_view body, int64_t json_depth_max) {
  MOED_ASSIGN_OR_RETURN(const WireJson json, parse_body(body, json_depth_max));
  BodyFields fields(json);
  DetokenizeCall call;
  fields.read("model", call.model);
  if (fields.find("tokens") == nullptr) fields.fail("tokens", "is missing");
  fields.read("tokens", call.tokens);
  if (!fields.status().ok()) return fields.status();
  return call;
}

int http_status_of(StatusCode code) {
  switch (code) {
    case StatusCode::kOk:
      return 200;
    case StatusCode::kInvalidArgument:
    case StatusCode::kUnimplemented:
      return 400;
    case StatusCode::kUnauthenticated:
      return 401;
    case StatusCode::kNotFound:
      return 404;
    case StatusCode::kResourceExhausted:
      return 429;
    case StatusCode::kUnavailable:
    case StatusCode::kCancelled:
      return 503;
    case StatusCode::kDeadlineExceeded:
      return 408;
    case StatusCode::kInternal:
      return 500;
  }
  return 500;
}

HttpReply error_reply(int http_status, const std::string& message, const std::string& param, const std::string& code) {
  HttpReply reply{.status = http_status, .body = dump_json(envelope(http_status, message, param, code))};
  if (http_status == 429 || http_status == 503) reply.headers.emplace_back("Retry-After", "1");
  if (http_status == 401) reply.headers.emplace_back("WWW-Authenticate", "Bearer");
  return reply;
}

HttpReply error_reply(const Status& status) {
  return error_reply(http_status_of(status.code()), status.message(), status.param(), status.detail());
}

std::string error_json(const Status& status) {
  return dump_json(envelope(http_status_of(status.code()), status.message(), status.param(), status.detail()));
}

std::string models_json(const ModelInfo& model) {
  WireJson list = WireJson::array();
  for (const std::string& name : model.names) list.push_back(model_entry(model, name));
  WireJson out = WireJson::object();
  out["object"] = "list";
  out["data"] = std::move(list);
  return dump_json(out);
}

std::string model_json(const ModelInfo& model, const std::string& name) { return dump_json(model_entry(model, name)); }

std::string tokenize_json(const TokenizeResult& result) {
  WireJson out = WireJson::object();
  out["count"] = result.tokens.size();
  out["max_model_len"] = result.max_model_len;
  out["tokens"] = result.tokens;
  out["token_strs"] = nullptr;
  return dump_json(out);
}

std::string detokenize_json(const std::string& text) {
  WireJson out = WireJson::object();
  out["prompt"] = text;
  return dump_json(out);
}

}  // namespace moed
