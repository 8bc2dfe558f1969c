#include <algorithm>

#include "text/tokenizer.h"
#include "text/utf8.h"

namespace moed {
namespace {

constexpr size_t kPromptTailTokens = 6;
// A tokenizer that still gives no whole character after so many tokens never will.
constexpr size_t kHeldTokensMax = 64;
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

}  // namespace

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens, std::span<const int32_t> prompt_tail)
    : tokenizer_(tokenizer), skip_special_tokens_(skip_special_tokens) {
  if (tokenizer.is_byte_level()) return;
  for (const int32_t id : prompt_tail.last(std::min(prompt_tail.size(), kPromptTailTokens))) {
    if (tokenizer.has_token(id)) window_.push_back(id);
  }
  context_tokens_ = window_.size();
}

StatusOr<std::string> Detokenizer::push(int32_t token) {
  if (token < 0) return invalid_argument("token id " + std::to_string(token) + " is negative");
  if (!tokenizer_.has_token(token)) return std::string();
  if (skip_special_tokens_ && tokenizer_.is_special(token)) return std::string();
  if (!tokenizer_.is_byte_level()) {
    window_.push_back(token);
    return window_text(window_.size() - context_tokens_ >= kHeldTokensMax);
  }
  pending_ += tokenizer_.bytes_view(token);
  const size_t held = incomplete_utf8_suffix(pending_);
  std::string text = replace_invalid_utf8(std::string_view(pending_).substr(0, pending_.size() - held));
  pending_.erase(0, pending_.size() - held);
  return text;
}

StatusOr<std::string> Detokenizer::flush() {
  if (!tokenizer_.is_byte_level()) return window_text(true);
  std::string text = replace_invalid_utf8(pending_);
  pending_.clear();
  return text;
}

// The text that the held tokens add to the context's; empty, and nothing sent, while it ends in what may be a part of a
// character. The context is the tokens sent last: enough for decoders that look at a neighbour.
StatusOr<std::string> Detokenizer::window_text(bool force) {
  const std::span<const int32_t> window(window_);
  if (window.size() == context_tokens_) return std::string();
  MOED_ASSIGN_OR_RETURN(const std::string before,
                        tokenizer_.decode(window.first(context_tokens_), skip_special_tokens_));
  MOED_ASSIGN_OR_RETURN(std::string text, tokenizer_.decode(window, skip_special_tokens_));
  if (!force && (text.size() <= before.size() || text.ends_with(kReplacement))) return std::string();
  if (text.starts_with(before)) {
    text.erase(0, before.size());
  } else {
    // A broken byte-fallback run replaced what was sent.
    MOED_ASSIGN_OR_RETURN(text, tokenizer_.decode(window.subspan(context_tokens_), skip_special_tokens_));
  }
  window_.erase(window_.begin(), window_.begin() + static_cast<std::ptrdiff_t>(context_tokens_));
  context_tokens_ = window_.size();
  return text;
}

}  // namespace moed
