#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"

struct MoedChatTemplate;  // text/text_ffi.h

namespace moed {

// Templates come with checkpoints and are not trusted: each rendering is bounded.
struct ChatTemplateLimits {
  uint64_t fuel = 2'000'000;                 // template instructions
  uint64_t output_bytes_max = 16ull << 20;   // of the rendered prompt
  uint64_t memory_bytes_max = 512ull << 20;  // what one rendering may hold
  uint64_t milliseconds_max = 10'000;        // of one rendering; real templates take microseconds
};

struct ChatTemplateOptions {
  bool add_generation_prompt = true;
  // The last message is left open for the model to go on with; excludes add_generation_prompt.
  bool continue_final_message = false;
  std::string kwargs_json = "{}";  // JSON object: further variables of the template (chat_template_kwargs)
  std::string tools_json;          // JSON array, or empty for none
};

// A checkpoint's chat template (Jinja, as transformers runs it). Immutable after load: any thread may render.
class ChatTemplate {
 public:
  // From `model_dir`/chat_template.jinja, else tokenizer_config.json's chat_template: a string, or a list of {name,
  // template} of which "tool_use" serves requests with tools and "default" the others. kNotFound when the checkpoint
  // has none; kInvalidArgument, naming file and line, when it does not parse.
  static StatusOr<std::unique_ptr<ChatTemplate>> load(const std::string& model_dir, ChatTemplateLimits limits = {});
  // A template given as text: for tests and tools. `special_tokens_json`: {"bos_token": "<s>", ...}.
  static StatusOr<std::unique_ptr<ChatTemplate>> from_source(std::string_view source,
                                                             std::string_view special_tokens_json = "{}",
                                                             ChatTemplateLimits limits = {});
  ~ChatTemplate();
  ChatTemplate(const ChatTemplate&) = delete;
  ChatTemplate& operator=(const ChatTemplate&) = delete;

  // The prompt. `messages_json`: the request's array of messages. kInvalidArgument with the template's own words when
  // it calls raise_exception, with the limit's name when it runs past one.
  StatusOr<std::string> render(std::string_view messages_json, const ChatTemplateOptions& options) const;

  // Whether a "developer" message may be passed as it is; otherwise the caller makes it a "system" message.
  bool knows_developer_role() const { return knows_developer_role_; }
  // Whether a message's content may be a list of parts; otherwise the caller joins the text parts.
  bool takes_content_lists() const { return takes_content_lists_; }
  // Where it came from: a path.
  const std::string& origin() const { return origin_; }

 private:
  ChatTemplate() = default;
  Status detect_abilities();

  MoedChatTemplate* handle_ = nullptr;
  std::string origin_;
  bool knows_developer_role_ = false;
  bool takes_content_lists_ = false;
};

}  // namespace moed
