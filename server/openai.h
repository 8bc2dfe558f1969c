#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "server/http_server.h"
#include "server/service.h"

namespace moed {

// OpenAI's JSON, and vLLM's extras, into GenerationParams. Pure. Only JSON types, unsupported fields and fields that
// concern the wire alone are checked here; ranges and limits are checked behind Service::start, the same for both
// doors.

// One call of POST /v1/chat/completions or /v1/completions.
struct OpenAiCall {
  GenerationParams params;
  bool stream = false;
  bool include_usage = false;               // stream_options
  bool continuous_usage = false;            // stream_options.continuous_usage_stats, with include_usage
  std::vector<std::string> unknown_fields;  // ignored; at most 16, escaped and cut to 64 bytes, for the log
};

// Errors: kInvalidArgument with param() = the field; kUnimplemented (400 on the wire) for what is known and not
// supported.
StatusOr<OpenAiCall> parse_chat_request(std::string_view body, int64_t json_depth_max);
StatusOr<OpenAiCall> parse_completion_request(std::string_view body, int64_t json_depth_max);
// Every field of a chat's or a completion's body that has a meaning here, served, ignored or refused. docs/API.md lists
// them.
std::set<std::string, std::less<>> request_field_names(bool chat);
StatusOr<TokenizeParams> parse_tokenize_request(std::string_view body, int64_t json_depth_max);

struct DetokenizeCall {
  std::string model;
  std::vector<int64_t> tokens;
};
StatusOr<DetokenizeCall> parse_detokenize_request(std::string_view body, int64_t json_depth_max);

// HTTP status and OpenAI's envelope {"error": {message, type, param, code}}; 429 and 503 carry Retry-After.
HttpReply error_reply(const Status& status);
HttpReply error_reply(int http_status, const std::string& message, const std::string& param = {},
                      const std::string& code = {});
// The envelope alone: what a stream sends when it fails midway.
std::string error_json(const Status& status);
int http_status_of(StatusCode code);

std::string models_json(const ModelInfo& model);
// `name` must be one of the model's.
std::string model_json(const ModelInfo& model, const std::string& name);
std::string tokenize_json(const TokenizeResult& result);
std::string detokenize_json(const std::string& text);

}  // namespace moed
