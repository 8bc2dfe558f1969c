#include <arpa/inet.h>
#include <netdb.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "server/serve.h"

namespace moed {
namespace {

constexpr int kTimeoutSeconds = 4;

int connect_to(const std::string& host, const std::string& port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), port.c_str(), &hints, &found) != 0) return -1;
  int fd = -1;
  for (const addrinfo* at = found; at != nullptr && fd < 0; at = at->ai_next) {
    fd = socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC, at->ai_protocol);
    if (fd < 0) continue;
    const timeval timeout{kTimeoutSeconds, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    if (connect(fd, at->ai_addr, at->ai_addrlen) != 0) {
      close(fd);
      fd = -1;
    }
  }
  freeaddrinfo(found);
  return fd;
}

// The status code of GET /health; 0 when there was no answer.
int ask(const std::string& host, const std::string& port) {
  const int fd = connect_to(host, port);
  if (fd < 0) return 0;
  const std::string request = "GET /health HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n";
  char answer[64] = {};
  ssize_t length = 0;
  if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(request.size())) {
    length = recv(fd, answer, sizeof(answer) - 1, MSG_WAITALL);
  }
  close(fd);
  int status = 0;
  return length > 0 && std::sscanf(answer, "HTTP/1.%*d %d", &status) == 1 ? status : 0;
}

}  // namespace

int health(const HealthTarget& target) {
  const std::string port = std::to_string(target.port);
  const int status = ask(target.host, port);
  if (status == 200) return 0;
  std::fprintf(stderr, "moed health: %s:%s %s\n", target.host.c_str(), port.c_str(),
               status == 0 ? "does not answer" : ("answers " + std::to_string(status)).c_str());
  return 1;
}

}  // namespace moed
