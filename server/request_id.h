#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace moed {

// The id of a request, for its answer and the log: `given`, the client's own, when it is 1 to `bytes_max` bytes of
// [A-Za-z0-9._-]; else a fresh one, 32 hex digits. Any thread.
std::string request_id_or_fresh(std::string_view given, int64_t bytes_max);
std::string fresh_request_id();

}  // namespace moed
