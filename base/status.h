#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "base/check.h"

namespace moed {

// What went wrong, in the terms both doors map onto their own codes (HTTP status, gRPC status).
enum class StatusCode : uint8_t {
  kOk,
  kInvalidArgument,    // the caller's fault: 400 / INVALID_ARGUMENT
  kUnauthenticated,    // 401
  kNotFound,           // 404
  kResourceExhausted,  // a queue or limit is full now: 429 + Retry-After
  kUnavailable,        // loading or draining: 503
  kCancelled,          // the client left
  kDeadlineExceeded,
  kUnimplemented,  // known, not supported
  kInternal,       // ours
};

// The outcome of an operation. `message` is one sentence for the person who can mend it and names the field, file or
// limit. It never holds prompt text. Immutable, safe to copy between threads.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message, std::string param = {}, std::string detail = {})
      : code_(code), message_(std::move(message)), param_(std::move(param)), detail_(std::move(detail)) {
    MOED_CHECK(code != StatusCode::kOk) << "an error needs an error code";
  }

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }
  // The request field at fault ("temperature", "messages[2].content"); empty when there is none.
  const std::string& param() const { return param_; }
  // OpenAI's machine-readable `code` ("context_length_exceeded", "model_not_found"); empty when there is none.
  const std::string& detail() const { return detail_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
  std::string param_;
  std::string detail_;
};

inline Status invalid_argument(std::string message, std::string param = {}) {
  return Status(StatusCode::kInvalidArgument, std::move(message), std::move(param));
}
inline Status internal_error(std::string message) { return Status(StatusCode::kInternal, std::move(message)); }

// A value or the reason why there is none.
template <class T>
class [[nodiscard]] StatusOr {
 public:
  StatusOr(T value) : value_(std::move(value)) {}
  StatusOr(Status status) : status_(std::move(status)) {
    MOED_CHECK(!status_.ok()) << "StatusOr needs a value or an error";
  }

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  // REQUIRES: ok()
  T& value() & {
    MOED_CHECK(ok()) << status_.message();
    return *value_;
  }
  const T& value() const& {
    MOED_CHECK(ok()) << status_.message();
    return *value_;
  }
  T&& value() && {
    MOED_CHECK(ok()) << status_.message();
    return std::move(*value_);
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  Status status_;
  std::optional<T> value_;
};

}  // namespace moed

#define MOED_RETURN_IF_ERROR(expression)                                  \
  do {                                                                    \
    if (::moed::Status moed_status_ = (expression); !moed_status_.ok()) { \
      return moed_status_;                                                \
    }                                                                     \
  } while (false)

#define MOED_CONCAT_INNER_(a, b) a##b
#define MOED_CONCAT_(a, b) MOED_CONCAT_INNER_(a, b)
// MOED_ASSIGN_OR_RETURN(auto config, parse_config(json));
#define MOED_ASSIGN_OR_RETURN(target, expression) \
  MOED_ASSIGN_OR_RETURN_IMPL_(MOED_CONCAT_(moed_status_or_, __LINE__), target, expression)
#define MOED_ASSIGN_OR_RETURN_IMPL_(temporary, target, expression) \
  auto temporary = (expression);                                   \
  if (!temporary.ok()) return temporary.status();                  \
  target = std::move(temporary).value()
