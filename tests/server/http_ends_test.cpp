// Who ends an answer, and how the server learns of it.
#include <gtest/gtest.h>

#include "http_server_fixture.h"
#include "server/http_wire.h"

namespace moed {
namespace {

class HttpEndsTest : public HttpServerTest {
 protected:
  void expect_ended(const std::string& lines) {
    EXPECT_TRUE(eventually([&] { return handler_.ended() == lines; }, 10)) << handler_.ended();
  }
};

TEST_F(HttpEndsTest, AStreamThatIsWokenForNothingIsPinged) {
  start({.ping_seconds = 0.1});
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send(get("/held")));
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 5; ++i) EXPECT_NE(client.read_until(": ping\n\n\r\n", 5).find(": ping"), std::string::npos);
  const auto took = std::chrono::steady_clock::now() - begin;
  EXPECT_GE(took, 450ms) << "a ping follows silence, not a wake";
}

TEST_F(HttpEndsTest, AStreamThatFailsClosesTheConnection) {
  start();
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send(get("/broken")));
  EXPECT_TRUE(client.read_all(5).ends_with("data: error\n\n\r\n0\r\n\r\n"));
  EXPECT_TRUE(client.closed());
  expect_ended("GET /broken 200 task=broken\n");
}

// More than is read ahead: what follows is not read, and the end neither.
TEST_F(HttpEndsTest, AClientThatLeavesBehindManyPipelinedBytesIsSeen) {
  start();
  for (const bool half : {false, true}) {
    HttpSocket client(server_->port());
    ASSERT_TRUE(client.send(get("/never") + std::string(70 << 10, 'x')));
    ASSERT_TRUE(eventually([&] { return handler_.alive == 1; }));
    std::this_thread::sleep_for(50ms);
    if (half) {
      client.close_writing();
    } else {
      client.close();
    }
    EXPECT_TRUE(eventually([&] { return handler_.alive == 0; }));
  }
  expect_ended("GET /never 0 task=never left\nGET /never 0 task=never left\n");
}

TEST_F(HttpEndsTest, ManyPipelinedBytesWaitForTheAnswerBefore) {
  start();
  HttpSocket client(server_->port());
  const std::string large(200 << 10, 'z');
  ASSERT_TRUE(client.send(get("/stream/300") + post("/echo", large)));
  EXPECT_NE(client.read_until("\r\n0\r\n\r\n").find("data: 299\n"), std::string::npos);
  EXPECT_EQ(body_of(client.read_reply()), large);
}

TEST_F(HttpEndsTest, ShutdownCutsAConnectionWithManyPipelinedBytes) {
  start();
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send(get("/never") + std::string(70 << 10, 'x')));
  ASSERT_TRUE(eventually([&] { return handler_.alive == 1; }));
  std::this_thread::sleep_for(50ms);
  server_->shutdown(0.1);
  expect_ended("GET /never 0 task=never cut\n");
}

// A body of another coding would be read as the next request.
TEST_F(HttpEndsTest, TransferCodingsOtherThanChunkedAreRefused) {
  start();
  const std::string hidden = get("/hidden");
  for (const char* const codings : {"gzip", "chunked, identity", "gzip, chunked", "identity", "xchunked", "chunked;q=1",
                                    "gzip\r\nTransfer-Encoding: chunked", ""}) {
    HttpSocket client(server_->port());
    ASSERT_TRUE(client.send("POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: " + std::string(codings) +
                            "\r\n\r\n" + hidden));
    client.close_writing();
    const std::string reply = client.read_all();
    EXPECT_TRUE(reply.starts_with("HTTP/1.1 400 ")) << codings << ": " << reply;
    EXPECT_NE(reply.find("Transfer-Encoding"), std::string::npos) << reply;
    EXPECT_NE(reply.find("Connection: close\r\n"), std::string::npos) << reply;
    EXPECT_EQ(reply.find("/hidden"), std::string::npos) << codings << ": " << reply;
  }
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send("POST /echo HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"));
  EXPECT_EQ(body_of(client.read_reply()), "abc");
}

TEST_F(HttpEndsTest, TheLogKnowsWhoEndedAnAnswer) {
  start({.write_seconds = 0.3});
  std::string expected;
  {
    HttpSocket client(server_->port());  // takes none of the one write that is left
    client.set_receive_buffer(4096);
    ASSERT_TRUE(client.send(get("/large")));
    expect_ended(expected += "GET /large 200 task=large cut\n");
  }
  {
    HttpSocket client(server_->port());
    client.set_receive_buffer(4096);
    ASSERT_TRUE(client.send(get("/large")));
    client.read_until("\r\n\r\n");
  }
  expect_ended(expected += "GET /large 200 task=large left\n");
  {
    HttpSocket client(server_->port());
    ASSERT_TRUE(client.send("POST /echo HTTP/1.1\r\nContent-Length: 5\r\n\r\nabc"));
    std::this_thread::sleep_for(50ms);
  }
  expect_ended(expected += "POST /echo 0 left\n");
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send(get("/throw")));
  EXPECT_EQ(client.read_all(), "");
  EXPECT_TRUE(client.closed());
  expect_ended(expected += "GET /throw 0 task=throw cut\n");
  HttpSocket streamed(server_->port());
  HttpSocket waits(server_->port());
  ASSERT_TRUE(streamed.send(get("/silent")));
  streamed.read_until("\r\n\r\n");
  ASSERT_TRUE(waits.send(get("/never")));
  ASSERT_TRUE(eventually([&] { return handler_.alive == 2; }));
  server_->shutdown(0.1);
  const std::string ended = handler_.ended();
  EXPECT_NE(ended.find("GET /silent 200 task=silent cut\n"), std::string::npos) << ended;
  EXPECT_NE(ended.find("GET /never 0 task=never cut\n"), std::string::npos) << ended;
}

TEST(HttpWire, HeaderNames) {
  for (const char* const good : {"a", "content-type, x-stainless-lang", "A,b ,\tc", "x-a_b.c!"}) {
    EXPECT_TRUE(is_header_names(good)) << good;
  }
  for (const char* const bad : {"", ",", "a,", ",a", "a b", "a:b", "a\r\nb", "a,,b", "a;b", "\"a\"", "a\xc3\xa9"}) {
    EXPECT_FALSE(is_header_names(bad)) << bad;
  }
}

}  // namespace
}  // namespace moed
