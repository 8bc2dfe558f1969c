#pragma once

#include <grpcpp/support/status.h>

#include <string>

#include "moed.pb.h"
#include "server/service.h"

namespace moed {

// Messages of proto/moed.proto to and from the doors' seam. Pure.

grpc::Status to_grpc(const Status& status);
// "RESOURCE_EXHAUSTED", of those that to_grpc gives; else "UNKNOWN".
const char* code_name(grpc::StatusCode code);

// kInvalidArgument names the field.
StatusOr<GenerationParams> to_params(const v1::ChatCompletionRequest& request, int64_t json_depth_max);
StatusOr<GenerationParams> to_params(const v1::GenerateRequest& request);
StatusOr<TokenizeParams> to_params(const v1::TokenizeRequest& request);

// What of a call its answers depend on.
struct AnswerShape {
  std::string id, model;
  int64_t created_s = 0;
  int64_t num_top = 0;  // alternatives beside a token; tokens are sent when `logprobs`
  bool logprobs = false;
  bool echo = false;
  int64_t num_prompt_top = 0;
  bool prompt_logprobs = false;
};

void fill_usage(const Usage& usage, v1::Usage* target);
// Adds a delta to a unary answer; its choices are made as needed.
void add_delta(const Delta& delta, const AnswerShape& shape, v1::ChatCompletionResponse& response);
// `first`: the choice's first piece. False: nothing to send.
bool make_chunk(const Delta& delta, const AnswerShape& shape, bool first, v1::ChatCompletionChunk& chunk);
bool make_chunk(const Delta& delta, const AnswerShape& shape, bool first, v1::GenerateChunk& chunk);
// The stream's last message.
void make_last(const Usage& usage, const AnswerShape& shape, v1::ChatCompletionChunk& chunk);
void make_last(const Usage& usage, const AnswerShape& shape, v1::GenerateChunk& chunk);

}  // namespace moed
