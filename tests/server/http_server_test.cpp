#include "server/http_server.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "http_server_fixture.h"
#include "server/http_wire.h"

namespace moed {
namespace {

TEST_F(HttpServerTest, KeepsTheConnectionAndEchoesPlainAndChunkedBodies) {
  start();
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send(post("/echo", "hello")));
  const std::string first = client.read_reply();
  EXPECT_TRUE(first.starts_with("HTTP/1.1 200 OK\r\n")) << first;
  EXPECT_NE(first.find("X-Path: /echo\r\n"), std::string::npos);
  EXPECT_EQ(body_of(first), "hello");
  ASSERT_TRUE(client.send(
      "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"));
  EXPECT_EQ(body_of(client.read_reply()), "abcde");
  const std::string large(300 << 10, 'z');  // off the I/O threads
  ASSERT_TRUE(client.send(post("/echo", large)));
  EXPECT_EQ(body_of(client.read_reply()), large);
}

TEST_F(HttpServerTest, AnswersPipelinedRequestsInOrder) {
  start();
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send(get("/slow") + get("/b") + post("/echo", "c") + get("/slow") + get("/e")));
  for (const char* const expected : {"/slow", "/b", "c", "/slow", "/e"})
    EXPECT_EQ(body_of(client.read_reply()), expected);
}

// A client that is quick to ask again meets the end of the answer before: neither may be lost.
TEST_F(HttpServerTest, RequestsThatMeetTheEndOfTheAnswerBeforeAreServed) {
  start();
  std::vector<std::thread> clients;
  for (int client = 0; client < 4; ++client) {
    clients.emplace_back([this] {
      HttpSocket socket(server_->port());
      for (int i = 0; i < 5000; ++i) {
        socket.send(get("/x"));
        const std::string reply = socket.read_reply();
        ASSERT_TRUE(reply.ends_with("/x")) << "request " << i << ": " << reply;
      }
    });
  }
  for (std::thread& client : clients) client.join();
}

TEST_F(HttpServerTest, StreamsInChunksAndKeepsTheConnectionAfterwards) {
  start();
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send(get("/stream/20")));
  const std::string reply = client.read_until("\r\n0\r\n\r\n");
  EXPECT_NE(reply.find("Transfer-Encoding: chunked"), std::string::npos);
  size_t at = 0;
  for (int i = 0; i < 20; ++i) {
    at = reply.find("data: " + std::to_string(i) + "\n\n", at);
    ASSERT_NE(at, std::string::npos) << i << " in " << reply;
  }
  ASSERT_TRUE(client.send(get("/after")));
  EXPECT_EQ(body_of(client.read_reply()), "/after");
  EXPECT_TRUE(eventually([&] { return handler_.alive == 0; }));
}

TEST_F(HttpServerTest, PingsASilentStream) {
  start({.ping_seconds = 0.05});
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send(get("/silent")));
  EXPECT_NE(client.read_until(": ping\n\n\r\n").find("8\r\n: ping"), std::string::npos);
  EXPECT_EQ(client.read_until(": ping\n\n\r\n"), "8\r\n: ping\n\n\r\n");
}

TEST_F(HttpServerTest, AnOldClientGetsItsStreamUnchunked) {
  start();
  HttpSocket old(server_->port());
  ASSERT_TRUE(old.send("GET /stream/3 HTTP/1.0\r\n\r\n"));
  const std::string reply = old.read_all();
  EXPECT_TRUE(old.closed());
  EXPECT_EQ(reply.find("chunked"), std::string::npos);
  EXPECT_EQ(body_of(reply), "data: 0\n\ndata: 1\n\ndata: 2\n\n");
}

TEST_F(HttpServerTest, ClientsThatLeaveEndTheirTasks) {
  start();
  for (const char* const path : {"/never", "/stream/100000", "/silent", "/flood"}) {
    HttpSocket client(server_->port());
    ASSERT_TRUE(client.send(get(path)));
    ASSERT_TRUE(eventually([&] { return handler_.alive == 1; })) << path;
    std::this_thread::sleep_for(20ms);
    client.close();
    EXPECT_TRUE(eventually([&] { return handler_.alive == 0; })) << path;
  }
  // Seen even with a pipelined request waiting behind the answer.
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send(get("/never") + get("/b")));
  ASSERT_TRUE(eventually([&] { return handler_.alive == 1; }));
  client.close();
  EXPECT_TRUE(eventually([&] { return handler_.alive == 0; }));
}

// One that says it has gone by closing its half, and is sent more than it is slow to take.
TEST_F(HttpServerTest, AHalfClosedConnectionEndsItsTask) {
  start();
  for (int i = 0; i < 20; ++i) {
    HttpSocket client(server_->port());
    ASSERT_TRUE(client.send(get("/flood")));
    client.read_until("xxxx");
    client.close_writing();
    const auto end = std::chrono::steady_clock::now() + 3s;
    while (!client.closed() && std::chrono::steady_clock::now() < end) client.read_until("\r\n", 1);
    ASSERT_TRUE(client.closed()) << i;
    EXPECT_TRUE(eventually([&] { return handler_.alive == 0; }));
  }
}

TEST_F(HttpServerTest, ASlowReaderIsDropped) {
  start({.write_seconds = 0.2});
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send(get("/flood")));
  ASSERT_TRUE(eventually([&] { return handler_.alive == 1; }));
  EXPECT_TRUE(eventually([&] { return handler_.alive == 0; }, 10));
}

TEST_F(HttpServerTest, RefusesBeforeTheBodyIsRead) {
  start({.body_bytes_max = 1000});
  {
    HttpSocket client(server_->port());  // route before length
    ASSERT_TRUE(client.send("POST /missing HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n"));
    EXPECT_TRUE(client.read_reply().starts_with("HTTP/1.1 404 "));
  }
  {
    HttpSocket client(server_->port());
    ASSERT_TRUE(client.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\nExpect: 100-continue\r\n\r\n"));
    EXPECT_TRUE(client.read_reply().starts_with("HTTP/1.1 413 ")) << "length before 100-continue";
  }
  {
    HttpSocket client(server_->port());
    ASSERT_TRUE(client.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"));
    EXPECT_EQ(client.read_until("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
    ASSERT_TRUE(client.send("abc"));
    EXPECT_EQ(body_of(client.read_reply()), "abc");
  }
  {
    HttpSocket client(server_->port());  // chunked, too long
    ASSERT_TRUE(client.send("POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n" +
                            std::string(1024, 'a')));
    EXPECT_TRUE(client.read_reply().starts_with("HTTP/1.1 413 "));
  }
  EXPECT_EQ(handler_.bodies_seen, 1);
}

TEST_F(HttpServerTest, AllBodiesTogetherAreBounded) {
  start({.body_bytes_max = 2 << 20, .reading_bytes_max = 3 << 20});
  const auto begin = [&](HttpSocket& client, size_t bytes) {
    return client.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n" + std::string(bytes, 'a'));
  };
  HttpSocket silent(server_->port()), first(server_->port()), second(server_->port());
  ASSERT_TRUE(begin(silent, 0));  // announces and holds nothing
  ASSERT_TRUE(begin(first, 1'900'000));
  std::this_thread::sleep_for(300ms);
  ASSERT_TRUE(begin(second, 1'900'000));
  const std::string refused = second.read_reply();
  EXPECT_TRUE(refused.starts_with("HTTP/1.1 429 ")) << refused;
  EXPECT_NE(refused.find("limits.reading_bytes_max"), std::string::npos);
  ASSERT_TRUE(first.send(std::string(100'000, 'a')));
  EXPECT_EQ(body_of(first.read_reply()).size(), 2'000'000u);
  // All was given back: one after another, twice the limit passes.
  for (int i = 0; i < 3; ++i) {
    HttpSocket client(server_->port());
    ASSERT_TRUE(begin(client, 2'000'000));
    EXPECT_TRUE(client.read_reply().starts_with("HTTP/1.1 200 ")) << i;
  }
  // By a client that leaves in the middle, too.
  for (int i = 0; i < 3; ++i) {
    HttpSocket client(server_->port());
    ASSERT_TRUE(begin(client, 1'900'000));
    std::this_thread::sleep_for(50ms);
  }
  ASSERT_TRUE(eventually([&] { return server_->num_connections() <= 3; }));
  HttpSocket last(server_->port());
  ASSERT_TRUE(begin(last, 2'000'000));
  EXPECT_TRUE(last.read_reply().starts_with("HTTP/1.1 200 "));
}

TEST_F(HttpServerTest, ALargeRefusedUploadStillSeesItsAnswer) {
  start({.body_bytes_max = 1000});
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n"));
  const std::string piece(1 << 20, 'a');
  for (int i = 0; i < 47; ++i) ASSERT_TRUE(client.send(piece)) << i;
  EXPECT_TRUE(client.read_reply().starts_with("HTTP/1.1 413 "));
}

TEST_F(HttpServerTest, HeadLimitsAndNonsense) {
  start({.header_bytes_max = 2000, .header_seconds = 0.3, .body_seconds = 0.3});
  {
    HttpSocket client(server_->port());
    ASSERT_TRUE(client.send(get("/a", "X-Long: " + std::string(3000, 'a') + "\r\n")));
    EXPECT_TRUE(client.read_reply().starts_with("HTTP/1.1 431 "));
  }
  for (const char* const nonsense :
       {"\x16\x03\x01 TLS?\r\n\r\n", "GET /a HTTP/1.1\r\nbad header\r\n\r\n", "GET  HTTP/9.9\r\n\r\n",
        "POST /echo HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        "POST /echo HTTP/1.1\r\nContent-Length: -1\r\n\r\n"}) {
    HttpSocket client(server_->port());
    ASSERT_TRUE(client.send(nonsense));
    EXPECT_TRUE(client.read_reply().starts_with("HTTP/1.1 400 ")) << nonsense;
  }
  {
    HttpSocket client(server_->port());  // bad chunk size
    ASSERT_TRUE(client.send("POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n"));
    EXPECT_TRUE(client.read_reply().starts_with("HTTP/1.1 400 "));
  }
  {
    HttpSocket client(server_->port());
    ASSERT_TRUE(client.send("GET /a HTTP/1.1\r\nHost:"));
    const std::string reply = client.read_reply(3);
    EXPECT_TRUE(reply.starts_with("HTTP/1.1 408 ")) << reply;
    EXPECT_NE(reply.find("Connection: close\r\n"), std::string::npos);
    EXPECT_NE(reply.find("header_seconds"), std::string::npos);
  }
  {
    HttpSocket client(server_->port());
    ASSERT_TRUE(client.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc"));
    EXPECT_TRUE(client.read_reply(3).starts_with("HTTP/1.1 408 "));
  }
  HttpSocket client(server_->port());
  ASSERT_TRUE(client.send(get("/a")));
  EXPECT_EQ(body_of(client.read_reply()), "/a") << "the server goes on";
}

// One that sent a byte of a request is told what was wrong, one that sent none is not.
TEST_F(HttpServerTest, IdleConnectionsAreClosedInSilence) {
  start({.header_seconds = 0.4, .idle_seconds = 0.3});
  HttpSocket fresh(server_->port()), kept(server_->port()), slow(server_->port());
  ASSERT_TRUE(kept.send(get("/a")));
  EXPECT_EQ(body_of(kept.read_reply()), "/a");
  ASSERT_TRUE(slow.send(get("/a") + "G"));
  EXPECT_EQ(body_of(slow.read_reply()), "/a");
  for (HttpSocket* const idle : {&fresh, &kept}) {
    EXPECT_EQ(idle->read_all(3), "");
    EXPECT_TRUE(idle->closed());
  }
  EXPECT_TRUE(slow.read_reply(3).starts_with("HTTP/1.1 408 "));
}

// A deadline that falls upon the end of a read counts: no client holds its connection by luck.
TEST_F(HttpServerTest, HeadsThatTrickleAcrossTheDeadlineAreTold) {
  start({.header_bytes_max = 1 << 20, .header_seconds = 0.05});
  std::vector<std::thread> clients;
  for (int client = 0; client < 4; ++client) {
    clients.emplace_back([&] {
      for (int i = 0; i < 10; ++i) {
        std::vector<std::unique_ptr<HttpSocket>> sockets;
        for (int socket = 0; socket < 4; ++socket) {
          sockets.push_back(std::make_unique<HttpSocket>(server_->port()));
          sockets.back()->send("GET /a HTTP/1.1\r\nX: ");
        }
        const auto end = std::chrono::steady_clock::now() + 100ms;
        while (std::chrono::steady_clock::now() < end) {
          for (const auto& socket : sockets) socket->send("a");
        }
        for (const auto& socket : sockets) {
          const std::string reply = socket->read_reply(3);
          ASSERT_TRUE(reply.starts_with("HTTP/1.1 408 ")) << "round " << i << ": " << reply;
        }
      }
    });
  }
  for (std::thread& client : clients) client.join();
}

// A head that comes in time may come in pieces, and so may the next one.
TEST_F(HttpServerTest, HeadsInPiecesAreServed) {
  start({.header_seconds = 2});
  HttpSocket client(server_->port());
  for (int i = 0; i < 2; ++i) {
    for (const char c : post("/echo", "body")) {
      ASSERT_TRUE(client.send(std::string(1, c)));
      std::this_thread::sleep_for(1ms);
    }
    EXPECT_EQ(body_of(client.read_reply()), "body");
  }
}

TEST_F(HttpServerTest, EachRequestIsToldOfOnce) {
  start({.body_bytes_max = 1000,
         .connections_max = 2,
         .header_bytes_max = 2000,
         .header_seconds = 0.3,
         .body_seconds = 0.3,
         .idle_seconds = 0.3});
  std::string expected;
  const auto ask = [&](const std::string& bytes, const std::string& line) {
    HttpSocket client(server_->port());
    client.send(bytes);
    client.read_reply(3);
    client.close();
    expected += line + "\n";
    EXPECT_TRUE(eventually([&] { return handler_.ended() == expected; })) << handler_.ended();
    ASSERT_TRUE(eventually([&] { return server_->num_connections() == 0; }));
  };
  ask(get("/a?secret=1"), "GET /a 200 task=a");
  ask("GET /missing HTTP/1.1\r\nHost: x\r\n\r\n", "GET /missing 404");
  ask("POST /missing HTTP/1.1\r\nContent-Length: 99\r\n\r\n", "POST /missing 404");
  ask("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n", "POST /echo 413");
  ask("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc", "POST /echo 408");
  ask("POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "POST /echo 400");
  ask("GET /long HTTP/1.1\r\nX: " + std::string(3000, 'a') + "\r\n\r\n", "GET /long 431");
  ask("GET /slow HTTP/1.1\r\nHost:", "GET /slow 408");
  ask("nonsense\r\n\r\n", "  400");
  {
    HttpSocket client(server_->port());
    client.send(get("/stream/3"));
    client.read_until("\r\n0\r\n\r\n");
  }
  expected += "GET /stream/3 200 task=stream/3\n";
  EXPECT_TRUE(eventually([&] { return handler_.ended() == expected; })) << handler_.ended();
  EXPECT_GE(handler_.least_us(), 0);
  EXPECT_LT(handler_.least_us(), 300'000);
  {
    HttpSocket leaves(server_->port());  // before its answer
    leaves.send(get("/never"));
    ASSERT_TRUE(eventually([&] { return handler_.alive == 1; }));
  }
  expected += "GET /never 0 task=never left\n";
  EXPECT_TRUE(eventually([&] { return handler_.ended() == expected; })) << handler_.ended();
  HttpSocket silent(server_->port());  // no request, no line
  EXPECT_EQ(silent.read_all(3), "");
  std::vector<std::unique_ptr<HttpSocket>> held;
  for (int i = 0; i < 2; ++i) {
    held.push_back(std::make_unique<HttpSocket>(server_->port()));
    held.back()->send(get("/never"));
  }
  ASSERT_TRUE(eventually([&] { return handler_.alive == 2; }));
  HttpSocket extra(server_->port());
  EXPECT_TRUE(extra.read_reply(3).starts_with("HTTP/1.1 503 "));
  expected += "  503\n";
  EXPECT_TRUE(eventually([&] { return handler_.ended() == expected; })) << handler_.ended();
}

TEST_F(HttpServerTest, ConnectionsBeyondTheLimitAreTurnedAway) {
  start({.connections_max = 3});
  std::vector<std::unique_ptr<HttpSocket>> clients;
  for (int i = 0; i < 3; ++i) {
    clients.push_back(std::make_unique<HttpSocket>(server_->port()));
    ASSERT_TRUE(clients.back()->send(get("/a")));
    EXPECT_EQ(body_of(clients.back()->read_reply()), "/a");
  }
  HttpSocket extra(server_->port());
  EXPECT_TRUE(extra.read_reply().starts_with("HTTP/1.1 503 "));
  clients.clear();
  ASSERT_TRUE(eventually([&] { return server_->num_connections() < 3; }, 8));
  HttpSocket again(server_->port());
  ASSERT_TRUE(again.send(get("/b")));
  EXPECT_EQ(body_of(again.read_reply()), "/b");
}

TEST_F(HttpServerTest, ShutdownLetsAnswersEndAndCutsTheRest) {
  start();
  HttpSocket idle(server_->port());
  HttpSocket ending(server_->port());
  HttpSocket endless(server_->port());
  ASSERT_TRUE(ending.send(get("/stream/100")));
  ASSERT_TRUE(endless.send(get("/never")));
  ASSERT_TRUE(eventually([&] { return handler_.alive == 2; }));
  const auto begin = std::chrono::steady_clock::now();
  server_->shutdown(1.0);
  const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  EXPECT_GT(took, 0.9);
  EXPECT_LT(took, 4.0);
  EXPECT_NE(ending.read_all().find("data: 99\n"), std::string::npos);
  EXPECT_EQ(idle.read_all(), "");
  EXPECT_TRUE(idle.closed());
  EXPECT_EQ(handler_.alive, 0);
  EXPECT_FALSE(HttpSocket(server_->port()).connected());
}

TEST_F(HttpServerTest, ReportsThePortAndRefusesOneInUse) {
  start();
  EXPECT_GT(server_->port(), 0);
  EXPECT_EQ(server_->addresses().front(), "127.0.0.1:" + std::to_string(server_->port()));
  const auto second = HttpServer::start({.port = server_->port()}, handler_);
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.status().message().find(std::to_string(server_->port())), std::string::npos);
}

TEST_F(HttpServerTest, HostsMayHaveBrackets) {
  start({.host = "[127.0.0.1]"});
  EXPECT_EQ(server_->addresses().front(), "127.0.0.1:" + std::to_string(server_->port()));
  const auto v6 = HttpServer::start({.host = "[::1]"}, handler_);
  if (v6.ok()) {  // a machine with IPv6
    EXPECT_EQ((*v6)->addresses().front(), "[::1]:" + std::to_string((*v6)->port()));
  } else {
    EXPECT_EQ(v6.status().message().find("[["), std::string::npos) << v6.status().message();
  }
}

TEST_F(HttpServerTest, ManyStreamsAtOnce) {
  start();
  std::vector<std::thread> threads;
  std::atomic<int> complete{0};
  for (int i = 0; i < 32; ++i) {
    threads.emplace_back([&, i] {
      HttpSocket client(server_->port());
      client.send(get("/stream/50"));
      if (i % 4 == 3) {
        client.read_until("data: 5\n");
        return;  // leaves
      }
      if (client.read_until("\r\n0\r\n\r\n", 30).find("data: 49\n") != std::string::npos) ++complete;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(complete, 24);
  EXPECT_TRUE(eventually([&] { return handler_.alive == 0; }));
}

TEST(HttpWire, Targets) {
  HttpRequest request;
  split_target("/v1/models/a%2Fb?x=1&y", request);
  EXPECT_EQ(request.path, "/v1/models/a%2Fb");
  EXPECT_EQ(request.query, "x=1&y");
  EXPECT_EQ(percent_decoded("a%2Fb%zz%4"), "a/b%zz%4");
  split_target("http://host:1/path?q", request);
  EXPECT_EQ(request.path, "/path");
  split_target("http://host", request);
  EXPECT_EQ(request.path, "/");
}

TEST(HttpWire, HeaderValuesCannotBreakOut) {
  const HttpReply reply{.headers = {{"X-Id", "a\r\nSet-Cookie: b"}}, .body = "x"};
  EXPECT_EQ(reply_bytes(reply, {}, 0).find("\nSet-Cookie"), std::string::npos);
}

}  // namespace
}  // namespace moed
