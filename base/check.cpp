#include "base/check.h"

#include <cstdio>
#include <cstdlib>

namespace moed {

void fail_check(const char* file, int line, const char* condition, const char* message) noexcept {
  std::fprintf(stderr, "moed: check failed at %s:%d: %s: %s\n", file, line, condition, message);
  std::fflush(stderr);
  std::abort();
}

}  // namespace moed
