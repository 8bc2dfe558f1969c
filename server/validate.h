#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "model/architectures.h"
#include "scheduler/request.h"
#include "server/choice_text.h"
#include "server/service.h"
#include "server/settings.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace moed {

// What validation knows of the model and the limits. Immutable while serving; what it points to outlives it.
struct ValidationContext {
  const Tokenizer* tokenizer = nullptr;
  const ChatTemplate* chat_template = nullptr;  // null: the checkpoint has none, chat is refused
  GenerationDefaults defaults;
  std::vector<int32_t> eos_token_ids;
  int32_t vocab_size = 0;
  int32_t max_model_len = 0;
  Settings::Limits limits;
  Settings::Scheduler scheduler;
};

// A call that passed every check: one Request a prompt, in order, ids and arrival times still to be set.
struct ValidGeneration {
  std::vector<RequestSpec> requests;
  std::vector<std::string> prompt_texts;  // when the prompt's text comes back (echo)
  ChoiceTextOptions text;
  bool echo = false;
  bool prompt_scores = false;  // prompt tokens are returned with their scores
  bool prompt_ids = false;     // prompt tokens are returned
};

// The one place where requests of both doors are checked, templated and tokenised. Runs on the text pool; pure but for
// the random seed of requests that give none. Errors: as api.md says, param() naming the field.
StatusOr<ValidGeneration> validate(const GenerationParams& params, const ValidationContext& context);

// The prompt of a chat: content parts joined or passed on as the template wants, roles checked, rendered.
StatusOr<std::string> render_chat(const std::string& messages_json, const ChatTemplateOptions& options,
                                  const ChatTemplate& chat_template);

// A door's tokenise call: bounded and templated as a generation's prompt is. Runs on the text pool.
StatusOr<TokenizeResult> tokenize_text(const TokenizeParams& params, const ValidationContext& context);

// Brings a checkpoint's defaults within what requests may ask for, or every request that leaves them out would be
// refused. Returns a line for the log, empty when nothing was changed.
std::string clamp_defaults(GenerationDefaults& defaults);

RequestLimits request_limits(const ValidationContext& context);

}  // namespace moed
