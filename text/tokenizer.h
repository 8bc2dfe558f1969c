#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

struct MoedTokenizer;  // text/text_ffi.h

namespace moed {

// A checkpoint's tokenizer (Hugging Face tokenizer.json). Immutable after load: any thread may call any method.
class Tokenizer {
 public:
  // Reads `model_dir`/tokenizer.json, and from tokenizer_config.json (if there) which tokens are special. Symbolic
  // links are followed. Errors name the file: kNotFound when tokenizer.json is absent, kInvalidArgument when it cannot
  // be used.
  static StatusOr<std::unique_ptr<Tokenizer>> load(const std::string& model_dir);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // `text` must be UTF-8. `add_special_tokens` adds what the checkpoint's post-processor adds (a BOS, as a rule);
  // special tokens spelled out in `text` are recognised either way.
  StatusOr<std::vector<int32_t>> encode(std::string_view text, bool add_special_tokens) const;

  // The text of `ids` as Hugging Face decodes it: bytes that are not UTF-8 become U+FFFD. An id outside [0, vocab_size)
  // is kInvalidArgument.
  StatusOr<std::string> decode(std::span<const int32_t> ids, bool skip_special_tokens) const;

  std::optional<int32_t> token_to_id(std::string_view token) const;
  // The spelling in the vocabulary ("Ġthe", "<|im_end|>"); empty when `id` names no token.
  std::string id_to_token(int32_t id) const;
  // The raw bytes of one token, byte-level spelling and byte fallback undone; maybe a part of a character. Empty when
  // `id` names no token.
  std::string token_bytes(int32_t id) const;
  bool is_special(int32_t id) const;
  bool has_token(int32_t id) const;
  // Largest id + 1. A model's logits may have more rows.
  int32_t vocab_size() const { return static_cast<int32_t>(offsets_.size()) - 1; }
  int32_t longest_token_bytes() const { return longest_token_bytes_; }
  // True when the text of a sequence is the concatenation of its tokens' bytes (byte-level BPE).
  bool is_byte_level() const { return byte_level_; }

 private:
  Tokenizer() = default;
  Status read_vocabulary();
  std::string_view bytes_view(int32_t id) const;
  friend class Detokenizer;

  MoedTokenizer* handle_ = nullptr;
  std::string bytes_;              // all tokens' bytes, one after the other
  std::vector<uint32_t> offsets_;  // [vocab_size + 1] into bytes_
  std::vector<uint8_t> flags_;     // [vocab_size]; bit 0: names a token, bit 1: special
  int32_t longest_token_bytes_ = 0;
  bool byte_level_ = false;
};

// Turns the tokens of one answer into text as they come. What `push` and `flush` return, joined, equals
// `Tokenizer::decode` of the answer; each piece is whole UTF-8 characters and is never taken back. (One exception: a
// byte-fallback run that turns out not to be UTF-8 keeps the characters already sent, where `decode` would replace the
// whole run.) Not thread-safe; the Tokenizer must outlive it.
class Detokenizer {
 public:
  // `prompt_tail`: the last tokens of the prompt (a handful is enough; may be empty). Tokenizers that spell a space at
  // the start of a word need them to tell whether the answer's first word begins with one.
  Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens, std::span<const int32_t> prompt_tail);

  // Ids that name no token (the padded rows of a model) add nothing; a negative one is kInvalidArgument.
  // The text that became certain with `token`; often empty, since a character may take several tokens.
  StatusOr<std::string> push(int32_t token);
  // What is left at the end of the answer; a broken tail becomes U+FFFD. After it, only push() of a new answer's
  // tokens.
  StatusOr<std::string> flush();

 private:
  StatusOr<std::string> window_text(bool force);

  const Tokenizer& tokenizer_;
  bool skip_special_tokens_;
  std::string pending_;          // byte-level: bytes that may begin a character
  std::vector<int32_t> window_;  // others: context [0, context_tokens_) whose text was sent, then tokens held
  size_t context_tokens_ = 0;
};

}  // namespace moed
