#pragma once

#include <cstdint>
#include <sstream>

namespace moed {

// Ends the process after one line with file, line, condition and message: for our own bugs and for devices that fail
// after start-up. The supervisor restarts the daemon; nothing half-broken goes on serving.
[[noreturn]] void fail_check(const char* file, int line, const char* condition, const char* message) noexcept;

// Collects the message of a failed check and dies with it.
class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition) : file_(file), line_(line), condition_(condition) {}
  CheckFailure(const CheckFailure&) = delete;
  CheckFailure& operator=(const CheckFailure&) = delete;
  [[noreturn]] ~CheckFailure() { fail_check(file_, line_, condition_, message_.str().c_str()); }
  std::ostream& stream() { return message_; }

 private:
  const char* file_;
  int line_;
  const char* condition_;
  std::ostringstream message_;
};

// Gives the failing arm of MOED_CHECK the type void, so that it is an expression.
struct CheckVoidify {
  void operator&(std::ostream&) const {}
};

}  // namespace moed

// MOED_CHECK(slot < num_slots) << "slot " << slot;   Always on, in release builds too.
#define MOED_CHECK(condition)                       \
  __builtin_expect(static_cast<bool>(condition), 1) \
      ? (void)0                                     \
      : ::moed::CheckVoidify() & ::moed::CheckFailure(__FILE__, __LINE__, #condition).stream()
