#pragma once

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>

#include "server/http_server.h"

namespace moed {

// One client of the HTTP server, as the server sees it.
class HttpConnection {
 public:
  virtual ~HttpConnection() = default;
  // From any thread, under HttpShared::mutex: closes now, or (`idle_only`) if no request is being served.
  virtual void close(bool idle_only) = 0;
};

// What connections share with the server; outlives them.
struct HttpShared {
  HttpServerOptions options;
  HttpHandler* handler = nullptr;
  boost::asio::thread_pool workers{1};
  std::atomic<bool> closing{false};
  std::atomic<int64_t> reading_bytes{0};  // held by bodies that are being received or parsed
  std::mutex mutex;
  std::condition_variable none_left;
  std::set<HttpConnection*> connections;  // those that live; under mutex
};

// Serves `socket`, whose executor is a strand of `context`, until it closes. `over_limit`: only tells it so, with 503.
void serve_connection(boost::asio::ip::tcp::socket socket, std::shared_ptr<boost::asio::io_context> context,
                      HttpShared& shared, bool over_limit);

}  // namespace moed
