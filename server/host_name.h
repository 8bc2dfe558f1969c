#pragma once

#include <cstdint>
#include <string>

namespace moed {

// "[::1]" -> "::1": resolvers take no brackets. Other hosts stay as they are.
std::string without_brackets(std::string host);
// "127.0.0.1:8000", "[::1]:8000"; takes "[::1]" as well.
std::string host_and_port(const std::string& host, int64_t port);
// The address by which a daemon that listens on `host` is reached from its own machine: of one that listens on every
// address, loopback.
std::string reached_at(std::string host);

}  // namespace moed
