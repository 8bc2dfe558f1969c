#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "text/text_ffi.h"

namespace moed {

// Owns what a function of text_ffi.h put out.
class FfiBytes {
 public:
  FfiBytes() = default;
  ~FfiBytes() {
    if (bytes_.data != nullptr) moed_text_bytes_free(&bytes_);
  }
  FfiBytes(const FfiBytes&) = delete;
  FfiBytes& operator=(const FfiBytes&) = delete;

  MoedTextBytes* out() { return &bytes_; }
  std::string_view view() const { return {reinterpret_cast<const char*>(bytes_.data), bytes_.size}; }
  std::string str() const { return std::string(view()); }
  // The bytes as values of a native type.
  template <class T>
  std::vector<T> values() const {
    std::vector<T> result(bytes_.size / sizeof(T));
    if (!result.empty()) __builtin_memcpy(result.data(), bytes_.data, result.size() * sizeof(T));
    return result;
  }

 private:
  MoedTextBytes bytes_{};
};

// The Status that a function of text_ffi.h returned.
Status ffi_status(int32_t code, const FfiBytes& message);

}  // namespace moed
