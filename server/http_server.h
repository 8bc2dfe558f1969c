#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

namespace moed {

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

struct HttpRequest {
  std::string method;   // "GET"
  std::string path;     // as sent, percent-encoding kept; without the query
  std::string query;    // what follows '?'
  HttpHeaders headers;  // names in lower case
  std::string body;     // chunks joined; empty until admitted
  std::string id;       // the handler may set it; the server only carries it
  // Of the first header of that name (lower case); empty when there is none.
  std::string_view header(std::string_view name) const;
};

// An answer, or (body empty) the head of a stream.
struct HttpReply {
  int status = 200;
  std::string content_type = "application/json";
  HttpHeaders headers;  // further ones; lengths, Date and Connection are the server's
  std::string body;
};

// Who ended a request: the server by its whole answer; the client, that left before; or the server, that cut it off.
enum class HttpEnd : uint8_t { kAnswered, kLeft, kCut };

// One answer in the making. All calls come on the connection's strand, one at a time. Destroyed at the end, or as soon
// as the client is gone: the destructor then cancels the work.
class HttpTask {
 public:
  virtual ~HttpTask() = default;
  // Empty while it is not known; asked again after each wake.
  virtual std::optional<HttpReply> reply() = 0;
  // After reply(): whether the body follows through read().
  virtual bool streaming() const { return false; }
  // Appends what is ready to `out` (nothing: asked again after the next wake). False: this was the last.
  virtual bool read(std::string& out) {
    (void)out;
    return false;
  }
  // After the last read(): the stream broke off, and the connection is closed behind it.
  virtual bool failed() const { return false; }
  // Written when a stream has been silent for `ping_seconds`.
  virtual std::string_view ping() const { return {}; }
  // What the log shall say of it besides, as " name=value ..."; asked once, at the end.
  virtual std::string notes(HttpEnd end) const {
    (void)end;
    return {};
  }
};

// How a request ended, for the log.
struct HttpOutcome {
  int status = 0;  // that of the answer's head; 0: there was none
  HttpEnd end = HttpEnd::kLeft;
  int64_t us = 0;     // since the first byte of the request
  std::string notes;  // the task's
};

// What the server serves. Called from several I/O threads at once; must not block and throws nothing.
class HttpHandler {
 public:
  virtual ~HttpHandler() = default;
  // Before the body is read (`request.body` is empty): route, method, authorisation, content type. A reply refuses.
  virtual std::optional<HttpReply> admit(HttpRequest& request) = 0;
  // `wake`: call it from any thread, also after the task died, whenever reply() or read() may have news. Never returns
  // null.
  virtual std::unique_ptr<HttpTask> handle(HttpRequest request, std::function<void()> wake) = 0;
  // An answer for what the server itself refuses: 400, 408, 413, 431, 503.
  virtual HttpReply refuse(int status, const std::string& message) = 0;
  // Just before any reply is written. `request` is empty but for what could be read of it: method and path of a head
  // that was too long, say.
  virtual void finish_reply(HttpRequest& request, HttpReply& reply) {
    (void)request;
    (void)reply;
  }
  // Once for each request that was answered, or whose head was read.
  virtual void finished(const HttpRequest& request, const HttpOutcome& outcome) {
    (void)request;
    (void)outcome;
  }
};

struct HttpServerOptions {
  std::string host = "127.0.0.1";  // a loopback host also listens on ::1 where that exists
  int port = 0;                    // 0: any free one
  int num_threads = 2;
  int64_t body_bytes_max = 32 << 20;
  int64_t reading_bytes_max = 256 << 20;  // of all bodies being received or parsed; a request beyond is answered 429
  int64_t connections_max = 4096;         // more are answered 503 and closed
  int64_t header_bytes_max = 32 << 10;
  double header_seconds = 10;  // from the first byte of a request to the end of its head; then 408
  double body_seconds = 30;    // of the whole body; then 408
  double idle_seconds = 75;    // a connection without a byte of a request is closed
  double write_seconds = 30;   // a client that takes no byte for so long is dropped
  double ping_seconds = 10;    // a stream that has written nothing for so long is pinged
};

// HTTP/1.1: keep-alive, pipelining answered in order, chunked bodies, 100-continue, streams with back-pressure. A
// client that leaves, in a plain answer or a stream, destroys its task. Checks run in this order: head,
// HttpHandler::admit, length, 100-continue, body.
class HttpServer {
 public:
  // Listens when it returns. `handler` must outlive the server. kUnavailable, naming host and port, when they cannot be
  // bound.
  static StatusOr<std::unique_ptr<HttpServer>> start(const HttpServerOptions& options, HttpHandler& handler);
  // As shutdown(0).
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  int port() const;
  // "127.0.0.1:8000", "[::1]:8000"
  std::vector<std::string> addresses() const;
  int64_t num_connections() const;
  // Stops listening and closes idle connections, lets answers under way end for so long, then cuts them. Idempotent;
  // one thread.
  void shutdown(double grace_seconds);

 private:
  struct State;
  explicit HttpServer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace moed
