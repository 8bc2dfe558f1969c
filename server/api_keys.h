#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace moed {

// The keys that open the doors, kept as SHA-256 digests and compared in constant time. Immutable.
class ApiKeys {
 public:
  // One key a line of `file` (empty path: none), and `key` (empty: none). Errors name the file.
  static StatusOr<ApiKeys> load(const std::string& file, const std::string& key);
  bool empty() const { return digests_.empty(); }
  bool accepts(std::string_view presented) const;

 private:
  using Digest = std::array<unsigned char, 32>;
  static Digest digest(std::string_view text);
  std::vector<Digest> digests_;
};

}  // namespace moed
