#pragma once

#include <spdlog/spdlog.h>

namespace moed {

// The daemon's log goes to stderr, one line an event. Prompt and answer text never enter it unless a setting asks.
// level: trace, debug, info, warn, error.
void init_log(const std::string& level, bool json);

}  // namespace moed
