#include "text/chat_template.h"

#include "text/ffi_bytes.h"

namespace moed {
namespace {

MoedChatLimits ffi_limits(const ChatTemplateLimits& limits) {
  return {.fuel = limits.fuel,
          .output_bytes = limits.output_bytes_max,
          .memory_bytes = limits.memory_bytes_max,
          .milliseconds = limits.milliseconds_max};
}

bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

}  // namespace

StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::load(const std::string& model_dir, ChatTemplateLimits limits) {
  std::unique_ptr<ChatTemplate> chat(new ChatTemplate);
  const MoedChatLimits bounds = ffi_limits(limits);
  FfiBytes message;
  const int32_t code = moed_chat_load(model_dir.data(), model_dir.size(), &bounds, &chat->handle_, message.out());
  MOED_RETURN_IF_ERROR(ffi_status(code, message));
  MOED_RETURN_IF_ERROR(chat->detect_abilities());
  return chat;
}

StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::from_source(std::string_view source,
                                                                  std::string_view special_tokens_json,
                                                                  ChatTemplateLimits limits) {
  std::unique_ptr<ChatTemplate> chat(new ChatTemplate);
  const MoedChatLimits bounds = ffi_limits(limits);
  FfiBytes message;
  const int32_t code = moed_chat_from_source(source.data(), source.size(), special_tokens_json.data(),
                                             special_tokens_json.size(), &bounds, &chat->handle_, message.out());
  MOED_RETURN_IF_ERROR(ffi_status(code, message));
  MOED_RETURN_IF_ERROR(chat->detect_abilities());
  return chat;
}

ChatTemplate::~ChatTemplate() { moed_chat_free(handle_); }

StatusOr<std::string> ChatTemplate::render(std::string_view messages_json, const ChatTemplateOptions& options) const {
  const MoedChatRequest request = {.messages = messages_json.data(),
                                   .messages_size = messages_json.size(),
                                   .tools = options.tools_json.data(),
                                   .tools_size = options.tools_json.size(),
                                   .kwargs = options.kwargs_json.data(),
                                   .kwargs_size = options.kwargs_json.size(),
                                   .add_generation_prompt = options.add_generation_prompt,
                                   .continue_final_message = options.continue_final_message};
  FfiBytes text, message;
  const int32_t code = moed_chat_render(handle_, &request, text.out(), message.out());
  MOED_RETURN_IF_ERROR(ffi_status(code, message));
  return text.str();
}

// A template that passes any role through (ChatML) renders "developer" too, but its model was not taught the word: the
// template must name it. One that takes lists shows a part's text and not the list itself.
Status ChatTemplate::detect_abilities() {
  FfiBytes source, origin, message;
  MOED_RETURN_IF_ERROR(ffi_status(moed_chat_source(handle_, source.out(), origin.out(), message.out()), message));
  origin_ = origin.str();
  const bool names_developer = contains(source.view(), "'developer'") || contains(source.view(), "\"developer\"");
  if (names_developer) {
    const auto text =
        render(R"([{"role":"developer","content":"MARK1"},{"role":"user","content":"MARK2"}])", ChatTemplateOptions());
    knows_developer_role_ = text.ok() && contains(*text, "MARK1") && contains(*text, "MARK2");
  }
  const auto text = render(R"([{"role":"user","content":[{"type":"text","text":"MARK1"}]}])", ChatTemplateOptions());
  takes_content_lists_ =
      text.ok() && contains(*text, "MARK1") && !contains(*text, "'type'") && !contains(*text, "\"type\"");
  return Status();
}

}  // namespace moed
