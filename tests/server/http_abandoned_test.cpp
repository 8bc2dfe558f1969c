#include <gtest/gtest.h>

#include <thread>

#include "fake_service.h"
#include "http_socket.h"
#include "server/http_api.h"
#include "server/http_server.h"

namespace moed {
namespace {

// Answers nothing, and keeps what it was asked.
class SilentService : public FakeService {
 public:
  void tokenize(TokenizeParams params, std::function<void(StatusOr<TokenizeResult>)> done) override {
    const std::lock_guard lock(mutex_);
    params_ = std::move(params);
    done_ = std::move(done);
  }
  bool asked() const {
    const std::lock_guard lock(mutex_);
    return done_ != nullptr;
  }
  bool abandoned() const {
    const std::lock_guard lock(mutex_);
    return params_.abandoned();
  }
  void answer() {
    const std::lock_guard lock(mutex_);
    done_(Status(StatusCode::kCancelled, "the client is gone"));
  }

 private:
  mutable std::mutex mutex_;
  TokenizeParams params_;
  std::function<void(StatusOr<TokenizeResult>)> done_;
};

bool eventually(const std::function<bool()>& holds) {
  for (int i = 0; i < 1000 && !holds(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  return holds();
}

TEST(HttpAbandonedTest, TokenizeLearnsThatItsClientLeft) {
  SilentService service;
  HttpApi api(service, Settings());
  auto server = HttpServer::start({.ping_seconds = 0.1}, api);
  ASSERT_TRUE(server.ok()) << server.status().message();
  {
    HttpSocket client((*server)->port());
    client.send(
        "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n"
        "{\"prompt\":\"a\"}");
    ASSERT_TRUE(eventually([&] { return service.asked(); }));
    EXPECT_FALSE(service.abandoned());
  }
  EXPECT_TRUE(eventually([&] { return service.abandoned(); }));
  service.answer();  // reaches nobody
}

}  // namespace
}  // namespace moed
