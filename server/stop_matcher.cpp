#include "server/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace moed {

StopMatcher::Result StopMatcher::push(std::string_view piece) {
  held_ += piece;
  Result result;
  size_t best_begin = 0;
  size_t best_end = std::string::npos;
  for (int i = 0; i < static_cast<int>(stops_.size()); ++i) {
    const size_t begin = held_.find(stops_[i]);
    if (begin == std::string::npos) continue;
    const size_t end = begin + stops_[i].size();
    if (end < best_end || (end == best_end && begin < best_begin)) {
      best_begin = begin;
      best_end = end;
      result.stop = i;
    }
  }
  if (result.stop < 0) {
    result.text = release();
  } else {
    result.text = held_.substr(0, best_begin);
    held_.clear();
  }
  return result;
}

std::string StopMatcher::pass(std::string_view piece) {
  held_ += piece;
  return release();
}

std::string StopMatcher::release() {
  const size_t released = held_.size() - held_length();
  std::string text = held_.substr(0, released);
  held_.erase(0, released);
  return text;
}

// The longest end of what is held that begins some stop string.
size_t StopMatcher::held_length() const {
  size_t longest = 0;
  for (const std::string& stop : stops_) {
    for (size_t length = std::min(held_.size(), stop.size() - 1); length > longest; --length) {
      if (held_.compare(held_.size() - length, length, stop, 0, length) == 0) {
        longest = length;
        break;
      }
    }
  }
  return longest;
}

}  // namespace moed
