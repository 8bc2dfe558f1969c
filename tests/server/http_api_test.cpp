#include "server/http_api.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "fake_service.h"
#include "http_socket.h"

namespace moed {
namespace {

using Json = nlohmann::json;

class HttpApiTest : public testing::Test {
 protected:
  void SetUp() override { start(Settings()); }
  void start(const Settings& settings) {
    server_.reset();
    api_ = std::make_unique<HttpApi>(service_, settings);
    auto server = HttpServer::start({.ping_seconds = 0.1}, *api_);
    ASSERT_TRUE(server.ok()) << server.status().message();
    server_ = std::move(server).value();
  }
  std::string send(const std::string& method, const std::string& path, const std::string& body = "",
                   const std::string& headers = "") {
    HttpSocket client(server_->port());
    std::string head = method + " " + path + " HTTP/1.1\r\nHost: x\r\n" + headers;
    if (method == "POST") {
      if (headers.find("Content-Type") == std::string::npos) head += "Content-Type: application/json\r\n";
      head += "Content-Length: " + std::to_string(body.size()) + "\r\n";
    }
    client.send(head + "\r\n" + body);
    if (method == "HEAD") return client.read_all(0.3);  // its length is that of a body which does not come
    std::string reply = client.read_reply();
    if (reply.find("Transfer-Encoding: chunked") != std::string::npos) reply += client.read_until("\r\n0\r\n\r\n");
    return reply;
  }
  static int status_of(const std::string& reply) { return reply.size() > 12 ? std::stoi(reply.substr(9, 3)) : 0; }
  static Json json_of(const std::string& reply) {
    return Json::parse(reply.substr(reply.find("\r\n\r\n") + 4), nullptr, false);
  }
  bool eventually(const std::function<bool()>& holds) {
    for (int i = 0; i < 1000 && !holds(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return holds();
  }

  const std::string chat_ = R"({"model":"fake","messages":[{"role":"user","content":"hi"}]})";
  const std::string stream_ = R"({"stream":true,"messages":[{"role":"user","content":"hi"}]})";
  FakeService service_;
  std::unique_ptr<HttpApi> api_;
  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpApiTest, ChatPlain) {
  const std::string reply = send("POST", "/v1/chat/completions", chat_, "X-Request-Id: my-id.1\r\n");
  EXPECT_EQ(status_of(reply), 200);
  EXPECT_NE(reply.find("X-Request-Id: my-id.1\r\n"), std::string::npos);
  const Json json = json_of(reply);
  EXPECT_EQ(json["choices"][0]["message"]["content"], "Hello wonderful world");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(json["model"], "fake");
  EXPECT_EQ(json["id"], "chatcmpl-my-id.1");
  EXPECT_EQ(json["usage"]["completion_tokens"], 3);
  EXPECT_EQ(service_.last_params().request_id, "my-id.1");
  EXPECT_TRUE(eventually([&] { return service_.alive == 0; }));
  EXPECT_EQ(service_.cancelled, 0);
}

TEST_F(HttpApiTest, ChatStream) {
  const std::string reply = send("POST", "/v1/chat/completions", stream_);
  EXPECT_EQ(status_of(reply), 200);
  EXPECT_NE(reply.find("Content-Type: text/event-stream"), std::string::npos);
  EXPECT_NE(reply.find(R"("delta":{"role":"assistant","content":""})"), std::string::npos);
  EXPECT_NE(reply.find(R"({"content":" wonderful"})"), std::string::npos);
  EXPECT_NE(reply.find("data: [DONE]\n\n"), std::string::npos);
  EXPECT_NE(reply.find(R"("model":"fake")"), std::string::npos) << "ours when none was named";
}

TEST_F(HttpApiTest, Completions) {
  const Json json =
      json_of(send("POST", "/v1/completions", R"({"prompt":["a","b"],"n":2,"echo":true,"logprobs":1,"max_tokens":2})"));
  ASSERT_EQ(json["choices"].size(), 4u);
  EXPECT_EQ(json["choices"][3]["index"], 3);
  EXPECT_EQ(json["choices"][3]["text"], "Say:Hello wonderful");
  EXPECT_EQ(json["choices"][3]["finish_reason"], "length");
  EXPECT_TRUE(json["choices"][0]["logprobs"]["token_logprobs"][0].is_null());
}

TEST_F(HttpApiTest, RefusalsBecomeTheEnvelope) {
  service_.refusal = Status(StatusCode::kResourceExhausted, "the queue is full");
  for (const std::string& body : {chat_, stream_}) {
    const std::string reply = send("POST", "/v1/chat/completions", body);
    EXPECT_EQ(status_of(reply), 429);
    EXPECT_NE(reply.find("Retry-After: "), std::string::npos);
    EXPECT_EQ(json_of(reply)["error"]["message"], "the queue is full");
  }
  service_.refusal = Status(StatusCode::kInvalidArgument, "This model's maximum context length is 5 tokens", "messages",
                            "context_length_exceeded");
  EXPECT_EQ(json_of(send("POST", "/v1/chat/completions", chat_))["error"]["code"], "context_length_exceeded");
  EXPECT_EQ(status_of(send("POST", "/v1/chat/completions", "{}")), 400);
  const std::string unknown = send("POST", "/v1/completions", R"({"prompt":"a","model":"other"})");
  EXPECT_EQ(status_of(unknown), 404);
  EXPECT_EQ(json_of(unknown)["error"]["code"], "model_not_found");
}

TEST_F(HttpApiTest, FailuresMidway) {
  service_.fail_after = 2;
  EXPECT_EQ(status_of(send("POST", "/v1/chat/completions", chat_)), 503);
  const std::string reply = send("POST", "/v1/chat/completions", stream_);
  EXPECT_EQ(status_of(reply), 200);
  EXPECT_NE(reply.find(R"(data: {"error":{"message":"the server is draining")"), std::string::npos);
  EXPECT_EQ(reply.find("[DONE]"), std::string::npos);
  HttpSocket client(server_->port());
  client.send("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: " +
              std::to_string(stream_.size()) + "\r\n\r\n" + stream_);
  EXPECT_TRUE(client.read_all(5).ends_with("\r\n0\r\n\r\n"));
  EXPECT_TRUE(client.closed());
}

// The head goes out before the first token; comments keep proxies from giving the silence up.
TEST_F(HttpApiTest, AStreamThatIsSilentIsPinged) {
  service_.token_us = 450'000;
  const std::string body = R"({"messages":[{"role":"user","content":"hi"}],"max_tokens":1,"stream":true})";
  HttpSocket client(server_->port());
  client.send("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: " +
              std::to_string(body.size()) + "\r\n\r\n" + body);
  EXPECT_NE(client.read_until("\r\n\r\n", 0.3).find("text/event-stream"), std::string::npos);
  const std::string before = client.read_until("data: ");
  EXPECT_NE(before.find(": ping\n\n\r\n8\r\n: ping\n\n"), std::string::npos) << before;
  EXPECT_NE(client.read_until("[DONE]").find("Hello"), std::string::npos);
}

TEST_F(HttpApiTest, ClientsThatLeaveCancel) {
  service_.token_us = 20000;
  for (const std::string& more : {std::string(R"(,"stream":true})"), std::string("}")}) {
    const int before = service_.cancelled;
    const std::string body = R"({"messages":[{"role":"user","content":"hi"}],"max_tokens":1000)" + more;
    HttpSocket client(server_->port());
    client.send("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: " +
                std::to_string(body.size()) + "\r\n\r\n" + body);
    ASSERT_TRUE(eventually([&] { return service_.alive == 1; }));
    client.close();
    EXPECT_TRUE(eventually([&] { return service_.alive == 0; }));
    EXPECT_EQ(service_.cancelled, before + 1);
  }
}

TEST_F(HttpApiTest, OrderOfChecks) {
  service_.key = "secret";
  const std::string text = "Content-Type: text/plain\r\n";
  const std::string key = "Authorization: Bearer secret\r\n";
  EXPECT_EQ(status_of(send("POST", "/nothing", "{}", text)), 404);
  const std::string method = send("DELETE", "/v1/chat/completions");
  EXPECT_EQ(status_of(method), 405);
  EXPECT_NE(method.find("Allow: POST\r\n"), std::string::npos);
  EXPECT_EQ(status_of(send("POST", "/v1/chat/completions", "{}", text)), 401);
  EXPECT_EQ(status_of(send("POST", "/v1/chat/completions", "{}", text + "Authorization: Bearer wrong\r\n")), 401);
  EXPECT_EQ(status_of(send("POST", "/v1/chat/completions", "{}", text + key)), 415);
  EXPECT_EQ(status_of(send("POST", "/v1/chat/completions", "{}", key + "Content-Encoding: gzip\r\n")), 415);
  EXPECT_EQ(status_of(send("POST", "/v1/chat/completions", "{}", key)), 400);
  EXPECT_EQ(
      status_of(send("POST", "/v1/chat/completions", chat_, key + "Content-Type: Application/JSON; charset=utf-8\r\n")),
      200);
  // Length comes after these, and nobody is asked to send a body that will not be read.
  const std::string huge = "Expect: 100-continue\r\nContent-Length: 999999999999\r\n";
  const auto head = [&](const std::string& headers) {
    HttpSocket client(server_->port());
    client.send("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + headers + huge + "\r\n");
    return status_of(client.read_reply());
  };
  EXPECT_EQ(head("Content-Type: application/json\r\n"), 401);
  EXPECT_EQ(head(text + key), 415);
  EXPECT_EQ(head("Content-Type: application/json\r\n" + key), 413);
  EXPECT_EQ(status_of(send("GET", "/v1/models")), 401);
  EXPECT_EQ(status_of(send("GET", "/metrics")), 401);
  for (const char* const open : {"/live", "/health", "/ready"}) EXPECT_EQ(status_of(send("GET", open)), 200) << open;
  EXPECT_EQ(service_.started, 1);
}

TEST_F(HttpApiTest, GetRoutes) {
  const Json models = json_of(send("GET", "/v1/models"));
  EXPECT_EQ(models["data"].size(), 2u);
  EXPECT_EQ(json_of(send("GET", "/v1/models/org/fake"))["id"], "org/fake");
  EXPECT_EQ(json_of(send("GET", "/v1/models/org%2Ffake?x=1"))["id"], "org/fake");
  EXPECT_EQ(status_of(send("GET", "/v1/models/../../etc/passwd")), 404);
  EXPECT_EQ(json_of(send("GET", "/info"))["build"], "test");
  EXPECT_NE(send("GET", "/metrics").find("Content-Type: text/plain; version=0.0.4"), std::string::npos);
  const std::string head = send("HEAD", "/health");
  EXPECT_EQ(status_of(head), 200);
  EXPECT_TRUE(head.ends_with("\r\n\r\n")) << head;
  EXPECT_NE(head.find("Content-Length: 18\r\n"), std::string::npos) << "of {\"status\":\"ready\"}: " << head;
  const std::string wrong = send("PUT", "/v1/models");
  EXPECT_EQ(status_of(wrong), 405);
  EXPECT_NE(wrong.find("Allow: GET, HEAD\r\n"), std::string::npos);
  EXPECT_EQ(status_of(send("HEAD", "/v1/chat/completions")), 405);
}

TEST_F(HttpApiTest, HealthFollowsTheState) {
  service_.health_value = {.state = ServerState::kLoading, .loaded_bytes = 5, .total_bytes = 9};
  EXPECT_EQ(status_of(send("GET", "/live")), 200);
  EXPECT_EQ(status_of(send("GET", "/health")), 503);
  const std::string loading = send("GET", "/ready");
  EXPECT_EQ(status_of(loading), 503);
  EXPECT_EQ(json_of(loading)["total_bytes"], 9);
  service_.health_value.state = ServerState::kDraining;
  EXPECT_EQ(status_of(send("GET", "/health")), 200);
  EXPECT_EQ(status_of(send("GET", "/ready")), 503);
  service_.health_value.alive = false;
  EXPECT_EQ(status_of(send("GET", "/live")), 503);
  EXPECT_EQ(status_of(send("GET", "/health")), 503);
  service_.health_value = {.state = ServerState::kReady, .alive = false};
  for (const char* const path : {"/live", "/health", "/ready"}) EXPECT_EQ(status_of(send("GET", path)), 503) << path;
}

TEST_F(HttpApiTest, TokenizeAndBack) {
  EXPECT_EQ(json_of(send("POST", "/tokenize", R"({"prompt":"four"})"))["tokens"], Json::parse("[1,2,4]"));
  EXPECT_EQ(json_of(send("POST", "/tokenize", R"({"prompt":"bad"})"))["error"]["param"], "prompt");
  EXPECT_EQ(status_of(send("POST", "/tokenize", "{}")), 400);
  EXPECT_EQ(json_of(send("POST", "/detokenize", R"({"tokens":[1,2]})"))["prompt"], "2 tokens");
  EXPECT_EQ(status_of(send("POST", "/detokenize", R"({"tokens":["a"]})")), 400);
}

TEST_F(HttpApiTest, RequestIds) {
  EXPECT_EQ(send("GET", "/live", "", "X-Request-Id: bad id\r\n").find("bad id"), std::string::npos);
  EXPECT_EQ(send("GET", "/live", "", "X-Request-Id: " + std::string(129, 'a') + "\r\n").find("aaaa"),
            std::string::npos);
  EXPECT_NE(send("GET", "/live").find("X-Request-Id: "), std::string::npos);
}

TEST_F(HttpApiTest, TheLengthOfRequestIdsIsASetting) {
  Settings settings;
  settings.limits.request_id_bytes_max = 3;
  start(settings);
  EXPECT_NE(send("GET", "/live", "", "X-Request-Id: abc\r\n").find("X-Request-Id: abc\r\n"), std::string::npos);
  EXPECT_EQ(send("GET", "/live", "", "X-Request-Id: abcd\r\n").find("abcd"), std::string::npos);
}

TEST_F(HttpApiTest, TheDepthOfJsonIsASetting) {
  Settings settings;
  settings.limits.json_depth_max = 5;
  start(settings);
  const auto nested = [&](int depth) {
    return send("POST", "/v1/completions",
                R"({"prompt":"a","x":)" + std::string(depth - 1, '[') + std::string(depth - 1, ']') + "}");
  };
  EXPECT_EQ(status_of(nested(5)), 200);
  EXPECT_NE(json_of(nested(6))["error"]["message"].get<std::string>().find("5 levels"), std::string::npos);
}

// Also what is refused before its head was whole has an id that the log knows.
TEST_F(HttpApiTest, RefusalsOfTheServerCarryAnId) {
  HttpSocket client(server_->port());
  client.send("nonsense\r\n\r\n");
  const std::string reply = client.read_reply();
  EXPECT_EQ(status_of(reply), 400);
  EXPECT_EQ(json_of(reply)["error"]["code"], "invalid_request");
  const size_t at = reply.find("X-Request-Id: ");
  ASSERT_NE(at, std::string::npos) << reply;
  EXPECT_EQ(reply.find("\r\n", at) - at, 14u + 32u);
}

TEST_F(HttpApiTest, CrossOriginOnlyWhenAllowed) {
  const std::string origin = "Origin: https://chat.example\r\n";
  EXPECT_EQ(status_of(send("OPTIONS", "/v1/chat/completions", "", origin)), 405);
  EXPECT_EQ(send("GET", "/live", "", origin).find("Access-Control"), std::string::npos);
  Settings settings;
  settings.server.cors_origin = {"https://chat.example"};
  service_.key = "secret";
  start(settings);
  const std::string preflight = send("OPTIONS", "/v1/chat/completions", "", origin);
  EXPECT_EQ(status_of(preflight), 204);
  EXPECT_NE(preflight.find("Access-Control-Allow-Origin: https://chat.example\r\n"), std::string::npos);
  EXPECT_EQ(send("OPTIONS", "/v1/chat/completions", "", "Origin: https://evil.example\r\n").find("Access-Control"),
            std::string::npos);
  EXPECT_NE(send("GET", "/live", "", origin).find("Access-Control-Expose-Headers: X-Request-Id, Retry-After\r\n"),
            std::string::npos);
}

// Those of a browser's client: openai-node sends a dozen of its own.
TEST_F(HttpApiTest, CrossOriginRequestsMayHaveHeadersOfTheirOwn) {
  Settings settings;
  settings.server.cors_origin = {"*"};
  start(settings);
  const auto allowed = [&](const std::string& asked) {
    const std::string reply = send("OPTIONS", "/v1/chat/completions", "",
                                   "Origin: https://chat.example\r\nAccess-Control-Request-Method: POST\r\n" + asked);
    const size_t at = reply.find("Access-Control-Allow-Headers: ");
    return at == std::string::npos ? reply : reply.substr(at + 30, reply.find("\r\n", at) - at - 30);
  };
  const std::string ours = "Authorization, Content-Type, X-Request-Id";
  EXPECT_EQ(allowed(""), ours);
  const std::string theirs = "authorization,content-type,x-stainless-arch,x-stainless-retry-count";
  EXPECT_EQ(allowed("Access-Control-Request-Headers: " + theirs + "\r\n"), theirs);
  EXPECT_EQ(allowed("Access-Control-Request-Headers: x-a: b\r\n"), ours) << "no name of a header";
}

TEST_F(HttpApiTest, LargeBodiesAreParsedElsewhereAndAnswered) {
  const std::string body = R"({"prompt":")" + std::string(1 << 20, 'a') + R"("})";
  EXPECT_EQ(status_of(send("POST", "/v1/completions", body)), 200);
  EXPECT_EQ(service_.last_params().prompts[0].text.size(), 1u << 20);
}

}  // namespace
}  // namespace moed
