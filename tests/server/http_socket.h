#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <string_view>
#include <utility>

namespace moed {

// A raw TCP client of 127.0.0.1, for bytes that no HTTP library would send.
class HttpSocket {
 public:
  explicit HttpSocket(int port) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = ::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
  }
  ~HttpSocket() { close(); }
  HttpSocket(const HttpSocket&) = delete;
  HttpSocket& operator=(const HttpSocket&) = delete;

  bool connected() const { return connected_; }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  void close_writing() { ::shutdown(fd_, SHUT_WR); }
  void set_receive_buffer(int bytes) { ::setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes)); }
  bool send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t count = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (count <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(count));
    }
    return true;
  }

  // What arrived until `marker` is in it, the server closed, or the time is over. Keeps what follows the marker.
  std::string read_until(std::string_view marker, double seconds = 10) {
    const auto end = deadline(seconds);
    for (;;) {
      if (const size_t found = held_.find(marker); found != std::string::npos) {
        std::string out = held_.substr(0, found + marker.size());
        held_.erase(0, out.size());
        return out;
      }
      if (!receive(end)) return std::exchange(held_, {});
    }
  }
  // All that comes until the server closes; `closed()` tells whether it did.
  std::string read_all(double seconds = 10) {
    const auto end = deadline(seconds);
    while (receive(end)) {
    }
    return std::exchange(held_, {});
  }
  // One answer with a Content-Length: head and body.
  std::string read_reply(double seconds = 10) {
    std::string head = read_until("\r\n\r\n", seconds);
    const size_t at = head.find("Content-Length: ");
    if (at == std::string::npos) return head;
    const size_t length = std::stoul(head.substr(at + 16));
    const auto end = deadline(seconds);
    while (held_.size() < length && receive(end)) {
    }
    head += held_.substr(0, length);
    held_.erase(0, length);
    return head;
  }
  bool closed() const { return closed_; }

 private:
  using Clock = std::chrono::steady_clock;
  static Clock::time_point deadline(double seconds) {
    return Clock::now() + std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
  }

  bool receive(Clock::time_point end) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
    if (left.count() <= 0 || closed_) return false;
    pollfd waiting{fd_, POLLIN, 0};
    if (::poll(&waiting, 1, static_cast<int>(left.count())) <= 0) return false;
    char bytes[16384];
    const ssize_t count = ::recv(fd_, bytes, sizeof(bytes), 0);
    if (count <= 0) {
      closed_ = true;
      return false;
    }
    held_.append(bytes, static_cast<size_t>(count));
    return true;
  }

  int fd_;
  bool connected_ = false;
  bool closed_ = false;
  std::string held_;
};

}  // namespace moed
