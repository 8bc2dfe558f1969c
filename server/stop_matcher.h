#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include "base/shared_vector.h"

namespace moed {

// Finds stop strings in text that comes in pieces. Text that may begin one is held; which string stops, and where, does
// not depend on how the text was cut: the first to be complete, of those the one that begins first. Not thread-safe.
class StopMatcher {
 public:
  explicit StopMatcher(SharedVector<std::string> stops) : stops_(std::move(stops)) {}

  struct Result {
    std::string text;  // certain now: no stop string begins in it
    int stop = -1;     // index of the stop string found; the text before it is all released
  };
  // REQUIRES: no stop string was found yet.
  Result push(std::string_view piece);
  // A piece in which no stop string counts that ends there; one that begins there may end in a later piece.
  std::string pass(std::string_view piece);
  // The end of the answer: what was held.
  std::string flush() { return std::exchange(held_, {}); }

  const std::string& stop(int index) const { return stops_[index]; }

 private:
  size_t held_length() const;
  // All but what may begin a stop string.
  std::string release();

  SharedVector<std::string> stops_;
  std::string held_;
};

}  // namespace moed
