#pragma once

#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <memory>
#include <utility>

namespace moed {

// Lets any thread wake the coroutine of one answer. Outlives the connection: a late wake does nothing.
class Waker : public std::enable_shared_from_this<Waker> {
 public:
  Waker(std::shared_ptr<boost::asio::io_context> context, const boost::asio::any_io_executor& strand)
      : context_(std::move(context)), timer_(strand) {}

  void wake() {
    if (posted_.exchange(true, std::memory_order_acq_rel)) return;
    boost::asio::post(timer_.get_executor(), [self = shared_from_this()] {
      self->posted_.exchange(false, std::memory_order_acq_rel);
      self->signalled_ = true;
      self->timer_.cancel();
    });
  }

  // On the strand. False: nothing came within `timeout`, or the coroutine was cancelled.
  boost::asio::awaitable<bool> wait(std::chrono::steady_clock::duration timeout) {
    if (!signalled_) {
      timer_.expires_after(timeout);
      co_await timer_.async_wait(boost::asio::as_tuple(boost::asio::use_awaitable));
    }
    const bool was_signalled = signalled_;
    signalled_ = false;
    co_return was_signalled;
  }

 private:
  std::shared_ptr<boost::asio::io_context> context_;  // first member: the timer dies before it
  boost::asio::steady_timer timer_;
  std::atomic<bool> posted_{false};
  bool signalled_ = false;  // strand only
};

}  // namespace moed
