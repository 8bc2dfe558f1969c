#include "server/request_id.h"

#include <algorithm>
#include <random>

#include "base/log.h"

namespace moed {

namespace {

// Not std::isalnum, which asks the locale.
bool may_stand(char c) {
  return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
}

}  // namespace

std::string request_id_or_fresh(std::string_view given, int64_t bytes_max) {
  const bool good = !given.empty() && static_cast<int64_t>(given.size()) <= bytes_max &&
                    std::all_of(given.begin(), given.end(), may_stand);
  return good ? std::string(given) : fresh_request_id();
}

std::string fresh_request_id() {
  thread_local std::mt19937_64 random{std::random_device{}()};
  return fmt::format("{:016x}{:016x}", random(), random());
}

}  // namespace moed
