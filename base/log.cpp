#include "base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>

namespace moed {

void init_log(const std::string& level, bool json) {
  auto logger = spdlog::stderr_color_mt("moed");
  logger->set_pattern(json ? R"({"time":"%Y-%m-%dT%H:%M:%S.%e%z","level":"%l","message":"%v"})"
                           : "%Y-%m-%d %H:%M:%S.%e %^%l%$ %v");
  logger->set_level(spdlog::level::from_str(level));
  spdlog::set_default_logger(std::move(logger));
}

}  // namespace moed
