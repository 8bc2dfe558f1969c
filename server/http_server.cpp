#include "server/http_server.h"

#include <fcntl.h>

#include <algorithm>
#include <boost/asio.hpp>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>

#include "server/host_name.h"
#include "server/http_connection.h"

namespace moed {

namespace asio = boost::asio;
using asio::awaitable;
using boost::system::error_code;
using tcp = asio::ip::tcp;
using Clock = std::chrono::steady_clock;

namespace {

constexpr auto kTuple = asio::as_tuple(asio::use_awaitable);

// A socket of `endpoint` that listens; the error says why not.
std::optional<tcp::acceptor> listen_on(asio::io_context& context, const tcp::endpoint& endpoint, error_code& error) {
  tcp::acceptor acceptor(asio::make_strand(context));  // a strand, because shutdown closes it from another thread
  acceptor.open(endpoint.protocol(), error);
  if (!error) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error && endpoint.address().is_v6()) {
    acceptor.set_option(asio::ip::v6_only(!endpoint.address().is_unspecified()), error);
  }
  if (!error) acceptor.bind(endpoint, error);
  if (!error) acceptor.listen(1024, error);
  if (error) return std::nullopt;
  ::fcntl(acceptor.native_handle(), F_SETFD, FD_CLOEXEC);
  return acceptor;
}

}  // namespace

struct HttpServer::State {
  std::shared_ptr<asio::io_context> context = std::make_shared<asio::io_context>();
  HttpShared shared;
  std::vector<std::unique_ptr<tcp::acceptor>> acceptors;
  std::vector<std::string> addresses;
  int port = 0;
  std::optional<asio::executor_work_guard<asio::io_context::executor_type>> work;
  std::vector<std::thread> threads;

  Status listen();
  awaitable<void> accept(tcp::acceptor& acceptor);
};

Status HttpServer::State::listen() {
  const HttpServerOptions& options = shared.options;
  const std::string where = host_and_port(options.host, options.port);
  error_code error;
  tcp::resolver resolver(*context);
  const std::string host = options.host == "localhost" ? "127.0.0.1" : without_brackets(options.host);
  const auto found = resolver.resolve(host, std::to_string(options.port), tcp::resolver::passive, error);
  if (error || found.empty()) {
    return Status(StatusCode::kUnavailable, "cannot listen on " + where + ": " + error.message(), "host");
  }
  const tcp::endpoint wanted = found.begin()->endpoint();
  auto first = listen_on(*context, wanted, error);
  if (!first)
    return Status(StatusCode::kUnavailable, "cannot listen on " + where + ": " + error.message(), "http_port");
  port = first->local_endpoint().port();
  acceptors.push_back(std::make_unique<tcp::acceptor>(std::move(*first)));
  if (wanted.address() == asio::ip::address_v4::loopback()) {
    // Clients that say "localhost" may try ::1 first. A machine without IPv6 has no ::1: that is no error.
    auto second = listen_on(*context, {asio::ip::address_v6::loopback(), static_cast<uint16_t>(port)}, error);
    if (second) acceptors.push_back(std::make_unique<tcp::acceptor>(std::move(*second)));
  }
  for (const auto& acceptor : acceptors) {
    const tcp::endpoint endpoint = acceptor->local_endpoint();
    addresses.push_back(host_and_port(endpoint.address().to_string(), port));
  }
  return Status();
}

awaitable<void> HttpServer::State::accept(tcp::acceptor& acceptor) {
  while (acceptor.is_open()) {
    const auto strand = asio::make_strand(*context);
    auto [error, socket] = co_await acceptor.async_accept(strand, kTuple);
    if (error == asio::error::operation_aborted || error == asio::error::bad_descriptor) co_return;
    if (error) {  // no descriptors left, mostly: wait until some are closed
      asio::steady_timer pause(co_await asio::this_coro::executor, std::chrono::milliseconds(100));
      co_await pause.async_wait(kTuple);
      continue;
    }
    error_code ignored;
    socket.set_option(tcp::no_delay(true), ignored);
    int64_t count = 0;
    {
      const std::lock_guard lock(shared.mutex);
      count = static_cast<int64_t>(shared.connections.size());
    }
    const bool over_limit = count >= shared.options.connections_max;
    serve_connection(std::move(socket), context, shared, over_limit);
  }
}

StatusOr<std::unique_ptr<HttpServer>> HttpServer::start(const HttpServerOptions& options, HttpHandler& handler) {
  auto state = std::make_unique<State>();
  state->shared.options = options;
  state->shared.handler = &handler;
  MOED_RETURN_IF_ERROR(state->listen());
  state->work.emplace(asio::make_work_guard(*state->context));
  for (const auto& acceptor : state->acceptors) {
    State* const raw = state.get();
    tcp::acceptor* const listening = acceptor.get();
    auto loop = [raw, listening]() -> awaitable<void> { co_await raw->accept(*listening); };
    asio::co_spawn(listening->get_executor(), std::move(loop), asio::detached);
  }
  for (int i = 0; i < std::max(1, options.num_threads); ++i) {
    state->threads.emplace_back([context = state->context.get()] { context->run(); });
  }
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(state)));
}

HttpServer::HttpServer(std::unique_ptr<State> state) : state_(std::move(state)) {}
HttpServer::~HttpServer() { shutdown(0); }

int HttpServer::port() const { return state_->port; }
std::vector<std::string> HttpServer::addresses() const { return state_->addresses; }

int64_t HttpServer::num_connections() const {
  const std::lock_guard lock(state_->shared.mutex);
  return static_cast<int64_t>(state_->shared.connections.size());
}

void HttpServer::shutdown(double grace_seconds) {
  if (state_->threads.empty()) return;
  HttpShared& shared = state_->shared;
  shared.closing.store(true);
  for (const auto& acceptor : state_->acceptors) {
    asio::post(acceptor->get_executor(), [raw = acceptor.get()] {
      error_code ignored;
      raw->close(ignored);
    });
  }
  const auto deadline = Clock::now() + std::chrono::duration<double>(grace_seconds);
  std::unique_lock lock(shared.mutex);
  bool cut = false;
  while (!shared.connections.empty()) {
    if (!cut && Clock::now() >= deadline) cut = true;
    for (HttpConnection* const connection : shared.connections) connection->close(!cut);
    shared.none_left.wait_for(lock, std::chrono::milliseconds(50));
  }
  lock.unlock();
  state_->work.reset();
  for (std::thread& thread : state_->threads) thread.join();
  state_->threads.clear();
  shared.workers.join();
}

}  // namespace moed
