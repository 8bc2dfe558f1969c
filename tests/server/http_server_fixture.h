#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "http_socket.h"
#include "server/http_server.h"

namespace moed {

using namespace std::chrono_literals;  // NOLINT

// Serves: /echo (the body), /slow (after 50 ms, from another thread), /never, /stream/N (N events, one a millisecond),
// /silent (a stream of nothing), /held (one that is woken for nothing), /flood (a stream without end), /broken (a
// stream that fails), /large (32 MB at once), /throw (an exception).
class TestHandler : public HttpHandler {
 public:
  std::atomic<int> alive{0}, handled{0}, bodies_seen{0};

  std::optional<HttpReply> admit(HttpRequest& request) override {
    if (request.path == "/missing") return HttpReply{.status = 404, .body = "no such route"};
    return std::nullopt;
  }
  HttpReply refuse(int status, const std::string& message) override {
    return HttpReply{.status = status, .content_type = "text/plain", .body = message};
  }
  void finish_reply(HttpRequest& request, HttpReply& reply) override {
    reply.headers.emplace_back("X-Path", request.path);
  }
  void finished(const HttpRequest& request, const HttpOutcome& outcome) override {
    const std::lock_guard lock(mutex_);
    ended_ += request.method + " " + request.path + " " + std::to_string(outcome.status) + outcome.notes +
              kEnds[static_cast<int>(outcome.end)] + "\n";
    least_us_ = std::min(least_us_, outcome.us);
  }
  // "METHOD PATH STATUS NOTES", and who ended it but for an answer, of each request; a line each.
  std::string ended() const {
    const std::lock_guard lock(mutex_);
    return ended_;
  }
  int64_t least_us() const {
    const std::lock_guard lock(mutex_);
    return least_us_;
  }
  std::unique_ptr<HttpTask> handle(HttpRequest request, std::function<void()> wake) override {
    ++handled;
    if (!request.body.empty()) ++bodies_seen;
    return std::make_unique<Task>(*this, std::move(request), std::move(wake));
  }

 private:
  class Task : public HttpTask {
   public:
    Task(TestHandler& owner, HttpRequest request, std::function<void()> wake)
        : owner_(owner), request_(std::move(request)), wake_(std::move(wake)) {
      ++owner_.alive;
      if (request_.path == "/held") {
        worker_ = std::thread([this] {
          for (; !stop_; std::this_thread::sleep_for(5ms)) wake_();
        });
      }
      if (request_.path == "/slow" || request_.path.starts_with("/stream/")) {
        worker_ = std::thread([this] {
          std::this_thread::sleep_for(request_.path == "/slow" ? 50ms : 1ms);
          const int events = request_.path == "/slow" ? 1 : std::stoi(request_.path.substr(8));
          for (int i = 0; i < events && !stop_; ++i) {
            {
              const std::lock_guard lock(mutex_);
              ready_ += "data: " + std::to_string(i) + "\n\n";
            }
            wake_();
            std::this_thread::sleep_for(1ms);
          }
          finished_ = true;
          wake_();
        });
      }
    }
    ~Task() override {
      stop_ = true;
      if (worker_.joinable()) worker_.join();
      --owner_.alive;
    }
    bool streaming() const override {
      return request_.path.starts_with("/stream/") || request_.path == "/flood" || request_.path == "/silent" ||
             request_.path == "/held" || request_.path == "/broken";
    }
    std::string_view ping() const override { return ": ping\n\n"; }
    bool failed() const override { return request_.path == "/broken"; }
    std::string notes(HttpEnd) const override { return " task=" + request_.path.substr(1); }
    std::optional<HttpReply> reply() override {
      if (request_.path == "/never") return std::nullopt;
      if (request_.path == "/throw") throw std::runtime_error("of this test");
      if (request_.path == "/large") return HttpReply{.content_type = "text/plain", .body = std::string(32 << 20, 'x')};
      if (streaming()) return HttpReply{.content_type = "text/event-stream"};
      if (request_.path == "/slow" && !finished_) return std::nullopt;
      return HttpReply{.content_type = "text/plain", .body = request_.path == "/echo" ? request_.body : request_.path};
    }
    bool read(std::string& out) override {
      if (request_.path == "/flood") {
        out.append(64 << 10, 'x');
        return true;
      }
      if (request_.path == "/silent") return true;
      if (request_.path == "/broken") {
        out += "data: error\n\n";
        return false;
      }
      const bool finished = finished_;
      const std::lock_guard lock(mutex_);
      out += std::exchange(ready_, {});
      return !finished;
    }

   private:
    TestHandler& owner_;
    HttpRequest request_;
    std::function<void()> wake_;
    std::thread worker_;
    std::mutex mutex_;
    std::string ready_;
    std::atomic<bool> stop_{false}, finished_{false};
  };

  static constexpr const char* kEnds[] = {"", " left", " cut"};  // by HttpEnd
  mutable std::mutex mutex_;
  std::string ended_;
  int64_t least_us_ = INT64_MAX;
};

class HttpServerTest : public testing::Test {
 protected:
  void start(HttpServerOptions options = {}) {
    auto server = HttpServer::start(options, handler_);
    ASSERT_TRUE(server.ok()) << server.status().message();
    server_ = std::move(server).value();
  }
  bool eventually(const std::function<bool()>& holds, double seconds = 5) {
    for (int i = 0; i < seconds * 200; ++i) {
      if (holds()) return true;
      std::this_thread::sleep_for(5ms);
    }
    return holds();
  }
  static std::string post(const std::string& path, const std::string& body, const std::string& headers = "") {
    return "POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: " + std::to_string(body.size()) + "\r\n" +
           headers + "\r\n" + body;
  }
  static std::string get(const std::string& path, const std::string& headers = "") {
    return "GET " + path + " HTTP/1.1\r\nHost: x\r\n" + headers + "\r\n";
  }
  static std::string body_of(const std::string& reply) { return reply.substr(reply.find("\r\n\r\n") + 4); }

  TestHandler handler_;
  std::unique_ptr<HttpServer> server_;
};

}  // namespace moed
