#include "server/host_name.h"

#include <utility>

namespace moed {

std::string without_brackets(std::string host) {
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') return host.substr(1, host.size() - 2);
  return host;
}

std::string host_and_port(const std::string& host, int64_t port) {
  const std::string bare = without_brackets(host);
  return (bare.find(':') == std::string::npos ? bare : "[" + bare + "]") + ":" + std::to_string(port);
}

std::string reached_at(std::string host) {
  host = without_brackets(std::move(host));
  if (host == "0.0.0.0") return "127.0.0.1";
  return host == "::" ? "::1" : host;
}

}  // namespace moed
