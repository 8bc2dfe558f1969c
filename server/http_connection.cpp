#include "server/http_connection.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <boost/asio.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/read_size.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <ctime>
#include <utility>

#include "base/clock.h"
#include "base/log.h"
#include "server/http_waker.h"
#include "server/http_wire.h"

namespace moed {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::awaitable;
using boost::system::error_code;
using tcp = asio::ip::tcp;
using Clock = std::chrono::steady_clock;
using Parser = http::request_parser<http::string_body>;

namespace {

using namespace asio::experimental::awaitable_operators;  // NOLINT: operator||

constexpr auto kTuple = asio::as_tuple(asio::use_awaitable);
constexpr size_t kWriteBytes = 256 << 10;      // one write, and so what a slow client must take in write_seconds
constexpr size_t kPipelineBytes = 64 << 10;    // read ahead of the answer under way
constexpr size_t kInlineBodyBytes = 64 << 10;  // larger bodies are parsed off the I/O threads
constexpr int64_t kLingerBytes = 256ll << 20;  // of a refused body, thrown away so that the client sees the answer
constexpr auto kLingerTime = std::chrono::seconds(5);
constexpr auto kStandingTime = std::chrono::milliseconds(250);  // between two looks at a socket that is not read

Clock::duration seconds(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

// The share of HttpShared::reading_bytes that one body holds.
class BodyShare {
 public:
  explicit BodyShare(HttpShared& shared) : shared_(shared) {}
  ~BodyShare() { release(); }
  BodyShare(const BodyShare&) = delete;
  BodyShare& operator=(const BodyShare&) = delete;

  // False, holding as much as before, when all bodies together would hold more than the limit.
  bool grow_to(int64_t bytes) {
    const int64_t more = bytes - bytes_;
    if (shared_.reading_bytes.fetch_add(more) + more > shared_.options.reading_bytes_max) {
      shared_.reading_bytes -= more;
      return false;
    }
    bytes_ = bytes;
    return true;
  }
  void release() { shared_.reading_bytes -= std::exchange(bytes_, 0); }

 private:
  HttpShared& shared_;
  int64_t bytes_ = 0;
};

class Connection final : public HttpConnection, public std::enable_shared_from_this<Connection> {
 public:
  Connection(tcp::socket socket, std::shared_ptr<asio::io_context> context, HttpShared& shared)
      : stream_(std::move(socket)),
        context_(std::move(context)),
        shared_(shared),
        body_share_(shared),
        buffer_(static_cast<size_t>(shared.options.header_bytes_max) + 2 * kPipelineBytes) {
    const std::lock_guard lock(shared_.mutex);
    shared_.connections.insert(this);
  }
  ~Connection() override {
    const std::lock_guard lock(shared_.mutex);
    shared_.connections.erase(this);
    if (shared_.connections.empty()) shared_.none_left.notify_all();
  }

  awaitable<void> run(bool over_limit);

  void close(bool idle_only) override {
    asio::post(stream_.get_executor(), [weak = weak_from_this(), idle_only] {
      const auto self = weak.lock();
      if (!self || (idle_only && self->busy_)) return;
      self->cut_ = true;
      self->stream_.close();
    });
  }

 private:
  enum class Next { kRequest, kClose, kLinger };

  awaitable<Next> serve_one();
  awaitable<bool> wait_for_request();
  awaitable<Next> exchange(HttpRequest& request);
  awaitable<Next> read_head(Parser& parser, HttpRequest& request);
  awaitable<error_code> receive_some(Parser& parser);
  awaitable<error_code> receive_head(Parser& parser);
  awaitable<Next> read_body(Parser& parser, HttpRequest& request);
  awaitable<error_code> receive_body(Parser& parser);
  awaitable<Next> refuse(int status, std::string message, HttpRequest& request);
  awaitable<Next> answer(HttpRequest& request);
  awaitable<bool> pump(HttpTask& task, HttpRequest& request, Waker& waker);
  awaitable<bool> pump_answer(HttpTask& task, HttpRequest& request, Waker& waker);
  awaitable<bool> pump_stream(HttpTask& task, Waker& waker);
  awaitable<void> client_gone();
  awaitable<void> socket_gone();
  void answered() { outcome_.end = HttpEnd::kAnswered; }
  awaitable<bool> send(HttpReply reply, HttpRequest& request, bool streaming);
  awaitable<bool> write(std::string_view bytes);
  awaitable<void> linger();
  void cut_by(const std::exception& exception) {
    spdlog::error("http: a request was ended by an exception: {}", exception.what());
    cut_ = true;
  }
  void set_end() {
    if (cut_ && outcome_.end != HttpEnd::kAnswered) outcome_.end = HttpEnd::kCut;
  }
  bool keep_alive() const { return keep_alive_ && !shared_.closing.load(std::memory_order_relaxed); }

  beast::tcp_stream stream_;
  std::shared_ptr<asio::io_context> context_;
  HttpShared& shared_;
  BodyShare body_share_;
  beast::flat_buffer buffer_;
  bool busy_ = false;
  bool keep_alive_ = false;  // of the request under way
  bool http_1_0_ = false;
  bool cut_ = false;  // the server gave the connection up
  HttpOutcome outcome_;
};

// Whether the other side of operator|| has ended this coroutine. To be asked after each wait: it is told once.
awaitable<bool> is_cancelled() {
  const asio::cancellation_state state = co_await asio::this_coro::cancellation_state;
  co_return state.cancelled() != asio::cancellation_type::none;
}

awaitable<void> Connection::run(bool over_limit) {
  co_await asio::this_coro::throw_if_cancelled(false);
  Next next = Next::kRequest;
  if (over_limit) {
    HttpRequest unread;
    next = co_await refuse(503, "too many connections; the limit is connections_max", unread);
    shared_.handler->finished(unread, outcome_);
  } else {
    while (next == Next::kRequest) next = co_await serve_one();
  }
  if (next == Next::kLinger) co_await linger();
  error_code ignored;
  stream_.socket().shutdown(tcp::socket::shutdown_both, ignored);
  stream_.close();
}

// True when the first byte of a request is in the buffer.
awaitable<bool> Connection::wait_for_request() {
  busy_ = false;
  if (shared_.closing.load()) co_return false;
  if (buffer_.size() > 0) co_return true;
  stream_.expires_after(seconds(shared_.options.idle_seconds));
  const auto [error, count] = co_await stream_.async_read_some(buffer_.prepare(4096), kTuple);
  if (error) co_return false;
  buffer_.commit(count);
  co_return true;
}

HttpRequest head_of(const Parser& parser) {
  HttpRequest request;
  const auto& message = parser.get();
  request.method = std::string(message.method_string());
  split_target(std::string(message.target()), request);
  for (const auto& field : message) {
    request.headers.emplace_back(lower_case(std::string_view(field.name_string().data(), field.name_string().size())),
                                 std::string(field.value()));
  }
  return request;
}

// The parser takes any other coding for no body: what is one would be read as the next request.
bool has_known_framing(const HttpRequest& request) {
  return std::all_of(request.headers.begin(), request.headers.end(), [](const auto& header) {
    return header.first != "transfer-encoding" || lower_case(header.second) == "chunked";
  });
}

awaitable<Connection::Next> Connection::serve_one() {
  if (!co_await wait_for_request()) co_return Next::kClose;
  busy_ = true;
  outcome_ = HttpOutcome();
  const int64_t begin_us = now_us();
  HttpRequest request;
  Next next = Next::kClose;
  try {
    next = co_await exchange(request);
  } catch (const std::exception& exception) {
    cut_by(exception);
  }
  set_end();
  outcome_.us = now_us() - begin_us;
  if (outcome_.status != 0 || !request.method.empty()) shared_.handler->finished(request, outcome_);
  co_return next;
}

awaitable<Connection::Next> Connection::exchange(HttpRequest& request) {
  Parser parser;
  if (const Next next = co_await read_head(parser, request); next != Next::kRequest) co_return next;
  if (std::optional<HttpReply> refusal = shared_.handler->admit(request)) {
    const bool unread = parser.chunked() || parser.content_length().value_or(0) > 0;
    if (unread) keep_alive_ = false;
    if (!co_await send(std::move(*refusal), request, false)) co_return Next::kClose;
    co_return unread ? Next::kLinger : keep_alive() ? Next::kRequest : Next::kClose;
  }
  if (const Next next = co_await read_body(parser, request); next != Next::kRequest) co_return next;
  co_return co_await answer(request);
}

awaitable<Connection::Next> Connection::read_head(Parser& parser, HttpRequest& request) {
  const HttpServerOptions& options = shared_.options;
  parser.header_limit(static_cast<uint32_t>(options.header_bytes_max));
  parser.body_limit(boost::none);  // lengths are checked after the route
  keep_alive_ = false;
  // A timer of its own: the stream's would close the socket, and the client would not learn why.
  asio::steady_timer deadline(stream_.get_executor(), seconds(options.header_seconds));
  stream_.expires_never();
  const auto outcome = co_await (receive_head(parser) || deadline.async_wait(kTuple));
  const error_code error = outcome.index() == 1 ? make_error_code(asio::error::timed_out) : std::get<0>(outcome);
  const bool malformed = error.category() == make_error_code(http::error::bad_method).category();
  if (error == http::error::end_of_stream || error == http::error::partial_message ||
      (error && !malformed && error != asio::error::timed_out)) {
    co_return Next::kClose;
  }
  request = head_of(parser);
  if (error == asio::error::timed_out) {
    co_return co_await refuse(408, "the request's head did not arrive within header_seconds", request);
  }
  if (error == http::error::header_limit || error == http::error::buffer_overflow) {
    co_return co_await refuse(431, "the request's headers are larger than header_bytes_max", request);
  }
  if (error) co_return co_await refuse(400, "not an HTTP/1.1 request: " + error.message(), request);
  if (!has_known_framing(request)) {
    co_return co_await refuse(400, "Transfer-Encoding must be chunked, and that alone", request);
  }
  keep_alive_ = parser.keep_alive();
  http_1_0_ = parser.get().version() < 11;
  co_return Next::kRequest;
}

// Parses what has come, after a wait for more where that is not enough. Beast's own loop would go on, and its caller
// wait for ever, after a cancellation that meets the end of a read.
awaitable<error_code> Connection::receive_some(Parser& parser) {
  co_await asio::this_coro::throw_if_cancelled(false);
  for (;;) {
    error_code error = http::error::need_more;
    if (buffer_.size() > 0) buffer_.consume(parser.put(buffer_.data(), error));
    if (error != http::error::need_more) co_return error;
    const size_t room = beast::read_size(buffer_, kPipelineBytes);
    if (room == 0) co_return make_error_code(http::error::buffer_overflow);
    const auto [failed, count] = co_await stream_.async_read_some(buffer_.prepare(room), kTuple);
    if (co_await is_cancelled()) co_return make_error_code(asio::error::operation_aborted);
    if (failed == asio::error::eof) {
      co_return make_error_code(parser.got_some() ? http::error::partial_message : http::error::end_of_stream);
    }
    if (failed) co_return failed;
    buffer_.commit(count);
  }
}

awaitable<error_code> Connection::receive_head(Parser& parser) {
  co_await asio::this_coro::throw_if_cancelled(false);
  error_code error;
  while (!error && !parser.is_header_done()) error = co_await receive_some(parser);
  co_return error;
}

awaitable<Connection::Next> Connection::read_body(Parser& parser, HttpRequest& request) {
  const HttpServerOptions& options = shared_.options;
  const auto limit = static_cast<uint64_t>(options.body_bytes_max);
  const std::string too_long =
      "the request's body is larger than " + std::to_string(options.body_bytes_max) + " bytes (body_bytes_max)";
  if (parser.content_length().value_or(0) > limit) co_return co_await refuse(413, too_long, request);
  parser.body_limit(limit);
  if (lower_case(request.header("expect")) == "100-continue" && !parser.is_done()) {
    if (!co_await write("HTTP/1.1 100 Continue\r\n\r\n")) co_return Next::kClose;
  }
  asio::steady_timer deadline(stream_.get_executor(), seconds(options.body_seconds));
  stream_.expires_never();
  auto outcome = co_await (receive_body(parser) || deadline.async_wait(kTuple));
  if (outcome.index() == 1) {
    body_share_.release();
    co_return co_await refuse(408, "the request's body did not arrive within body_seconds", request);
  }
  const error_code error = std::get<0>(outcome);
  if (error) body_share_.release();
  if (error == asio::error::no_buffer_space) {
    co_return co_await refuse(429, "too many bytes of requests are being received at once (limits.reading_bytes_max)",
                              request);
  }
  if (error == http::error::body_limit) co_return co_await refuse(413, too_long, request);
  if (error.category() == make_error_code(http::error::bad_method).category() &&
      error != http::error::partial_message && error != http::error::end_of_stream) {
    co_return co_await refuse(400, "the request's body is not well-formed: " + error.message(), request);
  }
  if (error) co_return Next::kClose;
  request.body = std::move(parser.get().body());
  co_return Next::kRequest;
}

// What has arrived counts, not what was announced: a client that sends nothing holds nothing.
awaitable<error_code> Connection::receive_body(Parser& parser) {
  co_await asio::this_coro::throw_if_cancelled(false);
  while (!parser.is_done()) {
    const error_code error = co_await receive_some(parser);
    if (error) co_return error;
    if (!body_share_.grow_to(static_cast<int64_t>(parser.get().body().size()))) {
      co_return make_error_code(asio::error::no_buffer_space);
    }
  }
  co_return error_code();
}

awaitable<Connection::Next> Connection::refuse(int status, std::string message, HttpRequest& request) {
  keep_alive_ = false;
  const bool sent = co_await send(shared_.handler->refuse(status, message), request, false);
  co_return sent ? Next::kLinger : Next::kClose;
}

// Leaves `request` without its body.
awaitable<Connection::Next> Connection::answer(HttpRequest& request) {
  const auto waker = std::make_shared<Waker>(context_, stream_.get_executor());
  const auto wake = [waker] { waker->wake(); };
  std::string body = std::exchange(request.body, {});
  HttpRequest whole = request;
  whole.body = std::move(body);
  std::unique_ptr<HttpTask> task;
  if (whole.body.size() > kInlineBodyBytes) {
    HttpHandler* const handler = shared_.handler;
    auto parse = [handler, &whole, &wake]() -> awaitable<std::unique_ptr<HttpTask>> {
      co_return handler->handle(std::move(whole), wake);
    };
    task = co_await asio::co_spawn(shared_.workers, parse, asio::use_awaitable);
  } else {
    task = shared_.handler->handle(std::move(whole), wake);
  }
  body_share_.release();
  auto outcome = co_await (pump(*task, request, *waker) || client_gone());
  const bool complete = outcome.index() == 0 && std::get<0>(outcome);
  set_end();
  outcome_.notes = task->notes(outcome_.end);
  task.reset();
  co_return complete&& keep_alive() ? Next::kRequest : Next::kClose;
}

// An exception must not get out: operator|| would go on waiting for the client to leave.
awaitable<bool> Connection::pump(HttpTask& task, HttpRequest& request, Waker& waker) {
  co_await asio::this_coro::throw_if_cancelled(false);
  try {
    co_return co_await pump_answer(task, request, waker);
  } catch (const std::exception& exception) {
    cut_by(exception);
    co_return false;
  }
}

awaitable<bool> Connection::pump_answer(HttpTask& task, HttpRequest& request, Waker& waker) {
  std::optional<HttpReply> reply = task.reply();
  while (!reply) {
    co_await waker.wait(std::chrono::hours(1));
    if (co_await is_cancelled()) co_return false;
    reply = task.reply();
  }
  const bool streaming = task.streaming();
  if (!co_await send(std::move(*reply), request, streaming)) co_return false;
  if (!streaming) co_return true;  // GCC 12 miscompiles a co_await behind ||
  if (co_await is_cancelled()) co_return false;
  co_return co_await pump_stream(task, waker);
}

awaitable<bool> Connection::pump_stream(HttpTask& task, Waker& waker) {
  const bool chunked = !http_1_0_;
  const auto silence = seconds(shared_.options.ping_seconds);
  auto ping_at = Clock::now() + silence;
  std::string piece;
  for (bool more = true; more;) {
    piece.clear();
    more = task.read(piece);
    if (more && piece.empty()) {
      if (co_await is_cancelled()) co_return false;
      const bool woken = co_await waker.wait(ping_at - Clock::now());
      if (co_await is_cancelled()) co_return false;
      if (woken && Clock::now() < ping_at) continue;  // it may have been woken for text that is held
      piece = task.ping();
      ping_at = Clock::now() + silence;
    }
    if (piece.empty()) continue;
    if (chunked) piece = chunk_of(piece);
    if (!co_await write(piece)) co_return false;
    if (!more) break;
    if (co_await is_cancelled()) co_return false;
    ping_at = Clock::now() + silence;
  }
  if (!chunked || task.failed()) keep_alive_ = false;
  if (chunked) {
    if (!co_await write("0\r\n\r\n")) co_return false;
  }
  answered();
  co_return true;
}

// Ends when the client closed or reset, or the answer is out. Bytes of a pipelined request are kept for it.
awaitable<void> Connection::client_gone() {
  co_await asio::this_coro::throw_if_cancelled(false);
  tcp::socket& socket = stream_.socket();
  while (buffer_.size() < kPipelineBytes) {
    if (co_await is_cancelled()) co_return;
    const auto [error] = co_await socket.async_wait(tcp::socket::wait_read, kTuple);
    if (error) co_return;
    // The answer's end cancels a wait, but not one that the next request has just ended.
    if (co_await is_cancelled()) co_return;
    const auto space = buffer_.prepare(4096);
    const ssize_t count = ::recv(socket.native_handle(), space.data(), space.size(), MSG_DONTWAIT);
    if (count == 0) co_return;
    if (count > 0) {
      buffer_.commit(static_cast<size_t>(count));
    } else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
      co_return;
    }
  }
  co_await socket_gone();
}

// The same for a connection that has sent so much ahead that no more is read: the end of what it sends stays behind
// that, but the socket knows of it.
awaitable<void> Connection::socket_gone() {
  tcp::socket& socket = stream_.socket();
  asio::steady_timer pause(co_await asio::this_coro::executor);
  while (socket.is_open()) {
    if (co_await is_cancelled()) co_return;
    pollfd standing{socket.native_handle(), POLLRDHUP, 0};
    if (::poll(&standing, 1, 0) > 0) co_return;
    pause.expires_after(kStandingTime);
    co_await pause.async_wait(kTuple);
  }
}

awaitable<bool> Connection::send(HttpReply reply, HttpRequest& request, bool streaming) {
  shared_.handler->finish_reply(request, reply);
  outcome_.status = reply.status;
  if (streaming && http_1_0_) keep_alive_ = false;
  const Framing framing{.streaming = streaming,
                        .chunked = streaming && !http_1_0_,
                        .keep_alive = keep_alive(),
                        .http_1_0 = http_1_0_,
                        .head_only = request.method == "HEAD"};
  const std::string bytes = reply_bytes(reply, framing, std::time(nullptr));
  if (!co_await write(bytes)) co_return false;
  if (!streaming) answered();
  co_return true;
}

// True when all is written, even if the client left at once: its last bytes and its end may be seen in either order.
awaitable<bool> Connection::write(std::string_view bytes) {
  while (!bytes.empty()) {
    const size_t count = std::min(bytes.size(), kWriteBytes);
    stream_.expires_after(seconds(shared_.options.write_seconds));
    const auto [error, written] = co_await asio::async_write(stream_, asio::buffer(bytes.data(), count), kTuple);
    stream_.expires_never();
    if (error == beast::error::timeout) cut_ = true;
    if (error) co_return false;
    bytes.remove_prefix(count);
    if (bytes.empty()) co_return true;
    if (co_await is_cancelled()) co_return false;
  }
  co_return true;
}

// Closing with unread bytes would reset the connection, and the client might never see the answer.
awaitable<void> Connection::linger() {
  error_code ignored;
  stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
  stream_.expires_after(kLingerTime);
  std::vector<char> scratch(64 << 10);
  for (int64_t left = kLingerBytes; left > 0;) {
    const auto [error, count] = co_await stream_.async_read_some(asio::buffer(scratch), kTuple);
    if (error) co_return;
    left -= static_cast<int64_t>(count);
  }
}

}  // namespace

void serve_connection(tcp::socket socket, std::shared_ptr<asio::io_context> context, HttpShared& shared,
                      bool over_limit) {
  const auto strand = socket.get_executor();
  const auto connection = std::make_shared<Connection>(std::move(socket), std::move(context), shared);
  auto run = [connection, over_limit]() -> awaitable<void> { co_await connection->run(over_limit); };
  asio::co_spawn(strand, std::move(run), [](std::exception_ptr failure) {
    if (!failure) return;
    try {
      std::rethrow_exception(failure);
    } catch (const std::exception& exception) {
      spdlog::error("http: connection ended by an exception: {}", exception.what());
    }
  });
}

}  // namespace moed
