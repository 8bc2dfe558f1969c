#include "text/tokenizer.h"

#include <algorithm>

#include "text/ffi_bytes.h"

namespace moed {

StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::load(const std::string& model_dir) {
  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer);
  FfiBytes message;
  const int32_t code = moed_tokenizer_load(model_dir.data(), model_dir.size(), &tokenizer->handle_, message.out());
  MOED_RETURN_IF_ERROR(ffi_status(code, message));
  if (Status status = tokenizer->read_vocabulary(); !status.ok()) {
    return Status(status.code(), model_dir + "/" + status.message());
  }
  return tokenizer;
}

Tokenizer::~Tokenizer() { moed_tokenizer_free(handle_); }

Status Tokenizer::read_vocabulary() {
  FfiBytes bytes, offsets, flags, message;
  const int32_t code = moed_tokenizer_vocabulary(handle_, bytes.out(), offsets.out(), flags.out(), message.out());
  MOED_RETURN_IF_ERROR(ffi_status(code, message));
  bytes_ = bytes.str();
  offsets_ = offsets.values<uint32_t>();
  flags_ = flags.values<uint8_t>();
  byte_level_ = moed_tokenizer_is_byte_level(handle_) != 0;
  for (size_t id = 0; id + 1 < offsets_.size(); ++id) {
    longest_token_bytes_ = std::max(longest_token_bytes_, static_cast<int32_t>(offsets_[id + 1] - offsets_[id]));
  }
  return Status();
}

StatusOr<std::vector<int32_t>> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  FfiBytes ids, message;
  const int32_t code =
      moed_tokenizer_encode(handle_, text.data(), text.size(), add_special_tokens, ids.out(), message.out());
  MOED_RETURN_IF_ERROR(ffi_status(code, message));
  return ids.values<int32_t>();
}

StatusOr<std::string> Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size()) {
      return invalid_argument("token id " + std::to_string(id) + " is not in the vocabulary (0 to " +
                              std::to_string(vocab_size() - 1) + ")");
    }
  }
  FfiBytes text, message;
  const int32_t code = moed_tokenizer_decode(handle_, reinterpret_cast<const uint32_t*>(ids.data()), ids.size(),
                                             skip_special_tokens, text.out(), message.out());
  MOED_RETURN_IF_ERROR(ffi_status(code, message));
  return text.str();
}

std::optional<int32_t> Tokenizer::token_to_id(std::string_view token) const {
  uint32_t id = 0;
  FfiBytes message;
  if (moed_tokenizer_token_to_id(handle_, token.data(), token.size(), &id, message.out()) != MOED_TEXT_OK) return {};
  return static_cast<int32_t>(id);
}

std::string Tokenizer::id_to_token(int32_t id) const {
  if (!has_token(id)) return {};
  FfiBytes token, message;
  if (moed_tokenizer_id_to_token(handle_, static_cast<uint32_t>(id), token.out(), message.out()) != MOED_TEXT_OK) {
    return {};
  }
  return token.str();
}

std::string_view Tokenizer::bytes_view(int32_t id) const {
  if (!has_token(id)) return {};
  return std::string_view(bytes_).substr(offsets_[id], offsets_[id + 1] - offsets_[id]);
}

std::string Tokenizer::token_bytes(int32_t id) const { return std::string(bytes_view(id)); }

bool Tokenizer::is_special(int32_t id) const { return id >= 0 && id < vocab_size() && (flags_[id] & 2) != 0; }

bool Tokenizer::has_token(int32_t id) const { return id >= 0 && id < vocab_size() && (flags_[id] & 1) != 0; }

}  // namespace moed
