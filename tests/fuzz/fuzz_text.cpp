// The Rust crate behind its C interface. The first byte chooses: a template ('0') before a zero byte and messages
// behind it, a text to tokens and back ('1'), tokens to text ('2').
#include "tests/fuzz/fuzz.h"
#include "tests/text/tokenizer_fixture.h"
#include "text/chat_template.h"
#include "text/utf8.h"

namespace moed {
namespace {

void render(std::string_view text) {
  const size_t cut = text.find('\0');
  const std::string_view messages =
      cut == std::string_view::npos ? R"([{"role":"user","content":"hi"}])" : text.substr(cut + 1);
  ChatTemplateLimits limits;
  limits.fuel = 20'000;
  limits.output_bytes_max = 1 << 16;
  limits.memory_bytes_max = 64 << 20;
  limits.milliseconds_max = 2'000;
  const auto chat = ChatTemplate::from_source(text.substr(0, cut), R"({"bos_token":"<s>"})", limits);
  if (!chat.ok()) return check_refusal(chat.status());
  for (const bool continued : {false, true}) {
    ChatTemplateOptions options;
    options.add_generation_prompt = !continued;
    options.continue_final_message = continued;
    const auto prompt = (*chat)->render(messages, options);
    if (!prompt.ok()) {
      check_refusal(prompt.status());
      continue;
    }
    MOED_CHECK(prompt->size() <= limits.output_bytes_max) << prompt->size() << " bytes";
    MOED_CHECK(replace_invalid_utf8(*prompt) == *prompt) << "a prompt that is not UTF-8";
  }
}

void to_tokens_and_back(const Tokenizer& tokenizer, std::string_view text) {
  const auto ids = tokenizer.encode(text, false);
  const bool utf8 = replace_invalid_utf8(text) == text;
  MOED_CHECK(ids.ok() == utf8) << "encode: " << (ids.ok() ? "taken" : ids.status().message());
  if (!ids.ok()) return check_refusal(ids.status());
  const auto back = tokenizer.decode(*ids, false);
  MOED_CHECK(back.ok() && *back == text) << "decode of encode";
}

void to_text(const Tokenizer& tokenizer, std::string_view bytes) {
  std::vector<int32_t> ids;
  std::string raw;
  for (const char byte : bytes) {
    ids.push_back(static_cast<uint8_t>(byte));
    raw += byte;
  }
  Detokenizer detokenizer(tokenizer, false, {});
  std::string text;
  for (const int32_t id : ids) {
    const std::string piece = detokenizer.push(id).value();
    MOED_CHECK(replace_invalid_utf8(piece) == piece) << "a piece that is not UTF-8";
    text += piece;
  }
  text += detokenizer.flush().value();
  MOED_CHECK(text == replace_invalid_utf8(raw)) << "streamed";
  MOED_CHECK(text == tokenizer.decode(ids, false).value()) << "decoded";
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(byte_level_tokenizer());
  if (size == 0) return 0;
  const std::string_view text = input_text(data + 1, size - 1);
  switch (data[0] % 3) {
    case 0:
      render(text);
      break;
    case 1:
      to_tokens_and_back(*tokenizer, text);
      break;
    default:
      to_text(*tokenizer, text);
  }
  return 0;
}

}  // namespace moed
