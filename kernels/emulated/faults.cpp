#include "kernels/emulated/faults.h"

#include <algorithm>
#include <charconv>

namespace moed {

StatusOr<Faults> Faults::parse(std::string_view text) {
  static constexpr std::string_view kNames[] = {"copy", "launch", "lost", "memory"};
  Faults faults;
  while (!text.empty()) {
    const std::string_view one = text.substr(0, text.find(','));
    text.remove_prefix(std::min(text.size(), one.size() + 1));
    const size_t colon = std::min(one.find(':'), one.size());
    const auto* const kind = std::find(std::begin(kNames), std::end(kNames), one.substr(0, colon));
    const std::string_view number = one.substr(std::min(one.size(), colon + 1));
    int64_t at = 0;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), at);
    if (kind == std::end(kNames) || error != std::errc() || end != number.data() + number.size() || at < 1) {
      return invalid_argument(
          "fault \"" + std::string(one) + "\" is none of copy:N, launch:N, lost:N and memory:N with N from 1",
          "faults");
    }
    faults.at_[kind - std::begin(kNames)] = at;
  }
  return faults;
}

}  // namespace moed
