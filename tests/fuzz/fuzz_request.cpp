// Bodies of the HTTP door; the first byte chooses the route. What is refused becomes an answer that is JSON, and says
// nothing that is not UTF-8.
#include "server/openai.h"
#include "server/openai_json.h"
#include "tests/fuzz/fuzz.h"

namespace moed {
namespace {

constexpr int64_t kDepthMax = 64;

void check_error(const Status& status) {
  check_refusal(status);
  const auto envelope = WireJson::parse(error_json(status), nullptr, false);
  MOED_CHECK(envelope.is_object() && envelope["error"]["message"].is_string()) << "no envelope";
  const HttpReply reply = error_reply(status);
  MOED_CHECK(reply.status == 400 || reply.status == 404) << "status " << reply.status;
}

void check_call(const StatusOr<OpenAiCall>& call) {
  if (!call.ok()) return check_error(call.status());
  const GenerationParams& params = call->params;
  if (params.chat) MOED_CHECK(WireJson::parse(params.messages_json, nullptr, false).is_array()) << "messages";
  MOED_CHECK(WireJson::parse(params.template_kwargs_json, nullptr, false).is_object()) << "kwargs";
  MOED_CHECK(params.chat || !params.prompts.empty()) << "no prompt";
  MOED_CHECK(call->unknown_fields.size() <= 16) << call->unknown_fields.size() << " unknown fields";
  for (const std::string& name : call->unknown_fields) {
    MOED_CHECK(name.size() <= 4 * 64) << "a name of " << name.size() << " bytes";
    for (const char c : name) MOED_CHECK(c >= 0x20 && c < 0x7f) << "a name for the log";
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view body = input_text(data + 1, size - 1);
  switch (data[0] % 4) {
    case 0:
      check_call(parse_chat_request(body, kDepthMax));
      break;
    case 1:
      check_call(parse_completion_request(body, kDepthMax));
      break;
    case 2:
      if (const auto call = parse_tokenize_request(body, kDepthMax); !call.ok()) check_error(call.status());
      break;
    default:
      if (const auto call = parse_detokenize_request(body, kDepthMax); !call.ok()) check_error(call.status());
  }
  return 0;
}

}  // namespace moed
