#include "server/grpc_server.h"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>

#include "fake_service.h"
#include "moed.grpc.pb.h"

namespace moed {
namespace {

class GrpcServerTest : public testing::Test {
 protected:
  void SetUp() override { start(Settings()); }
  void start(Settings settings) {
    stub_.reset();
    server_.reset();
    settings.server.grpc_port = 0;
    auto server = GrpcServer::start(settings, service_);
    ASSERT_TRUE(server.ok()) << server.status().message();
    server_ = std::move(server).value();
    const std::string target = "127.0.0.1:" + std::to_string(server_->port());
    stub_ = v1::Inference::NewStub(grpc::CreateChannel(target, grpc::InsecureChannelCredentials()));
  }
  static v1::ChatCompletionRequest chat() {
    v1::ChatCompletionRequest request;
    v1::ChatMessage& message = *request.add_messages();
    message.set_role("user");
    message.set_content("hi");
    return request;
  }
  bool eventually(const std::function<bool()>& holds) {
    for (int i = 0; i < 1000 && !holds(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return holds();
  }

  FakeService service_;
  std::unique_ptr<GrpcServer> server_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

TEST_F(GrpcServerTest, UnaryChat) {
  grpc::ClientContext context;
  v1::ChatCompletionRequest request = chat();
  request.mutable_sampling()->set_temperature(0);
  request.mutable_sampling()->set_n(2);
  request.mutable_sampling()->set_logprobs(1);
  (*request.mutable_sampling()->mutable_logit_bias())[5] = -1.5;
  request.add_messages()->set_role("assistant");
  v1::ChatCompletionResponse response;
  const grpc::Status status = stub_->ChatCompletion(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.choices_size(), 2);
  EXPECT_EQ(response.choices(1).message().content(), "Hello wonderful world");
  EXPECT_EQ(response.choices(1).finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(response.choices(0).tokens_size(), 3);
  EXPECT_EQ(response.choices(0).tokens(0).top_size(), 1);
  EXPECT_EQ(response.usage().total_tokens(), 13);
  EXPECT_EQ(response.model(), "fake");
  const GenerationParams params = service_.last_params();
  EXPECT_EQ(params.temperature, 0.0);
  EXPECT_EQ(params.top_p, std::nullopt);
  EXPECT_EQ(params.n, 2);
  EXPECT_EQ(params.logit_bias, (std::vector<std::pair<int64_t, double>>{{5, -1.5}}));
  EXPECT_EQ(params.messages_json, R"([{"role":"user","content":"hi"},{"role":"assistant","content":null}])");
}

TEST_F(GrpcServerTest, StreamedChatAndGenerate) {
  grpc::ClientContext context;
  auto reader = stub_->StreamChatCompletion(&context, chat());
  v1::ChatCompletionChunk chunk;
  std::string text;
  int count = 0;
  while (reader->Read(&chunk)) {
    EXPECT_EQ(chunk.choice().role(), count == 0 ? "assistant" : "");
    text += chunk.choice().content();
    ++count;
  }
  ASSERT_TRUE(reader->Finish().ok());
  EXPECT_EQ(text, "Hello wonderful world");
  EXPECT_EQ(count, 4);
  EXPECT_EQ(chunk.usage().completion_tokens(), 3);

  grpc::ClientContext second;
  v1::GenerateRequest request;
  request.mutable_token_ids()->add_ids(5);
  request.set_echo(true);
  auto pieces = stub_->Generate(&second, request);
  v1::GenerateChunk piece;
  ASSERT_TRUE(pieces->Read(&piece));
  EXPECT_EQ(piece.prompt_text(), "Say:");
  EXPECT_EQ(piece.token_ids(0), 10);
  while (pieces->Read(&piece)) {
  }
  EXPECT_TRUE(pieces->Finish().ok());
  EXPECT_TRUE(service_.last_params().prompts[0].is_ids);
}

TEST_F(GrpcServerTest, ErrorsAreStatuses) {
  const auto code = [&](const v1::ChatCompletionRequest& request) {
    grpc::ClientContext context;
    v1::ChatCompletionResponse response;
    const grpc::StatusCode unary = stub_->ChatCompletion(&context, request, &response).error_code();
    grpc::ClientContext other;
    auto reader = stub_->StreamChatCompletion(&other, request);
    v1::ChatCompletionChunk chunk;
    while (reader->Read(&chunk)) {
    }
    EXPECT_EQ(reader->Finish().error_code(), unary);
    return unary;
  };
  service_.refusal = Status(StatusCode::kResourceExhausted, "the queue is full");
  EXPECT_EQ(code(chat()), grpc::StatusCode::RESOURCE_EXHAUSTED);
  service_.refusal = Status(StatusCode::kUnavailable, "loading");
  EXPECT_EQ(code(chat()), grpc::StatusCode::UNAVAILABLE);
  service_.refusal = Status();
  service_.fail_after = 1;
  EXPECT_EQ(code(chat()), grpc::StatusCode::UNAVAILABLE);
  v1::ChatCompletionRequest request = chat();
  request.set_model("other");
  EXPECT_EQ(code(request), grpc::StatusCode::NOT_FOUND);
  request = chat();
  request.set_chat_template_kwargs_json("[1]");
  EXPECT_EQ(code(request), grpc::StatusCode::INVALID_ARGUMENT);
  service_.key = "secret";
  EXPECT_EQ(code(chat()), grpc::StatusCode::UNAUTHENTICATED);
  grpc::ClientContext context;
  context.AddMetadata("authorization", "Bearer secret");
  v1::GetLoadsResponse loads;
  EXPECT_TRUE(stub_->GetLoads(&context, {}, &loads).ok());
  EXPECT_EQ(loads.waiting(), 2);
}

// The library would end these as UNIMPLEMENTED, as if the method were not there.
TEST_F(GrpcServerTest, BytesThatAreNoMessageAreTheCallersFault) {
  const auto channel =
      grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->port()), grpc::InsecureChannelCredentials());
  grpc::TemplatedGenericStub<grpc::ByteBuffer, grpc::ByteBuffer> stub(channel);
  const auto call = [&](const std::string& method, const std::string& bytes) {
    grpc::ClientContext context;
    const grpc::Slice slice(bytes);
    const grpc::ByteBuffer request(&slice, 1);
    grpc::ByteBuffer response;
    std::mutex mutex;
    std::condition_variable news;
    std::optional<grpc::Status> end;
    stub.UnaryCall(&context, "/moed.v1.Inference/" + method, {}, &request, &response, [&](grpc::Status status) {
      const std::lock_guard lock(mutex);
      end = std::move(status);
      news.notify_one();
    });
    std::unique_lock lock(mutex);
    news.wait(lock, [&] { return end.has_value(); });
    return *end;
  };
  const std::string cut = "\x0a\x7f";            // a field of 127 bytes, and none of them
  const std::string latin = "\x0a\x02\xff\xfe";  // a string that is not UTF-8, where there is one
  for (const char* const method : {"ChatCompletion", "StreamChatCompletion", "Generate", "Tokenize", "Detokenize",
                                   "GetModelInfo", "GetServerInfo", "GetLoads"}) {
    const grpc::Status status = call(method, cut);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << method;
    EXPECT_NE(status.error_message().find("moed.v1."), std::string::npos) << status.error_message();
  }
  EXPECT_EQ(call("ChatCompletion", latin).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(call("Nothing", latin).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_TRUE(call("GetLoads", "").ok());
  service_.key = "secret";
  EXPECT_EQ(call("ChatCompletion", cut).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(service_.started, 0);
}

TEST_F(GrpcServerTest, CallsAtOnceOnAConnectionAreLimited) {
  Settings settings;
  settings.server.grpc_port = 0;
  settings.limits.grpc_calls_max = 2;
  auto server = GrpcServer::start(settings, service_);
  ASSERT_TRUE(server.ok()) << server.status().message();
  const auto stub = v1::Inference::NewStub(
      grpc::CreateChannel("127.0.0.1:" + std::to_string((*server)->port()), grpc::InsecureChannelCredentials()));
  service_.token_us = 20000;
  v1::ChatCompletionRequest request = chat();
  request.mutable_sampling()->set_max_tokens(1000);
  grpc::ClientContext held[2];
  std::unique_ptr<grpc::ClientReader<v1::ChatCompletionChunk>> readers[2];
  v1::ChatCompletionChunk chunk;
  for (int i = 0; i < 2; ++i) {
    readers[i] = stub->StreamChatCompletion(&held[i], request);
    ASSERT_TRUE(readers[i]->Read(&chunk));
  }
  const auto loads = [&] {  // the client waits for a place, as HTTP/2 has it
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(300));
    v1::GetLoadsResponse response;
    return stub->GetLoads(&context, {}, &response).error_code();
  };
  EXPECT_EQ(loads(), grpc::StatusCode::DEADLINE_EXCEEDED);
  for (int i = 0; i < 2; ++i) {
    held[i].TryCancel();
    while (readers[i]->Read(&chunk)) {
    }
    readers[i]->Finish();
  }
  EXPECT_TRUE(eventually([&] { return loads() == grpc::StatusCode::OK; }));
}

TEST_F(GrpcServerTest, CancelAndDeadlineReachTheGeneration) {
  service_.token_us = 20000;
  v1::ChatCompletionRequest request = chat();
  request.mutable_sampling()->set_max_tokens(1000);
  {
    grpc::ClientContext context;
    auto reader = stub_->StreamChatCompletion(&context, request);
    v1::ChatCompletionChunk chunk;
    ASSERT_TRUE(reader->Read(&chunk));
    context.TryCancel();
    while (reader->Read(&chunk)) {
    }
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
    EXPECT_TRUE(eventually([&] { return service_.alive == 0; }));
    EXPECT_EQ(service_.cancelled, 1);
  }
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(100));
  v1::ChatCompletionResponse response;
  EXPECT_EQ(stub_->ChatCompletion(&context, request, &response).error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(eventually([&] { return service_.alive == 0; }));
  EXPECT_EQ(service_.cancelled, 2);
}

TEST_F(GrpcServerTest, TheOtherCalls) {
  grpc::ClientContext a, b, c, d;
  v1::TokenizeRequest text;
  text.set_text("four");
  v1::TokenizeResponse tokens;
  ASSERT_TRUE(stub_->Tokenize(&a, text, &tokens).ok());
  EXPECT_EQ(tokens.token_ids(2), 4);
  v1::DetokenizeRequest ids;
  ids.add_token_ids(1);
  v1::DetokenizeResponse back;
  ASSERT_TRUE(stub_->Detokenize(&b, ids, &back).ok());
  EXPECT_EQ(back.text(), "1 tokens");
  v1::GetModelInfoResponse model;
  ASSERT_TRUE(stub_->GetModelInfo(&c, {}, &model).ok());
  EXPECT_EQ(model.names(1), "org/fake");
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(stub_->GetServerInfo(&d, {}, &info).ok());
  EXPECT_EQ(info.state(), "ready");
}

TEST_F(GrpcServerTest, ListensOnBothLoopbackAddresses) {
  const std::string port = std::to_string(server_->port());
  sockaddr_in6 loopback{};
  loopback.sin6_family = AF_INET6;
  loopback.sin6_addr = in6addr_loopback;
  const int probe = ::socket(AF_INET6, SOCK_STREAM, 0);
  const bool has_v6 = ::bind(probe, reinterpret_cast<const sockaddr*>(&loopback), sizeof(loopback)) == 0;
  ::close(probe);
  std::vector<std::string> targets = {"ipv4:127.0.0.1:" + port};
  if (has_v6) targets.push_back("ipv6:[::1]:" + port);
  for (const std::string& target : targets) {
    const auto stub = v1::Inference::NewStub(grpc::CreateChannel(target, grpc::InsecureChannelCredentials()));
    grpc::ClientContext context;
    v1::GetModelInfoResponse model;
    const grpc::Status status = stub->GetModelInfo(&context, {}, &model);
    EXPECT_TRUE(status.ok()) << target << ": " << status.error_message();
  }
}

TEST_F(GrpcServerTest, WhatIsReceivedIsBounded) {
  Settings settings;
  settings.server.grpc_port = 0;
  settings.limits.reading_bytes_max = 4 << 20;
  ASSERT_GT(settings.limits.body_bytes_max, 16 << 20) << "a message alone may be larger";
  auto server = GrpcServer::start(settings, service_);
  ASSERT_TRUE(server.ok()) << server.status().message();
  const auto stub = v1::Inference::NewStub(
      grpc::CreateChannel("127.0.0.1:" + std::to_string((*server)->port()), grpc::InsecureChannelCredentials()));
  const auto tokenize = [&](size_t bytes) {
    grpc::ClientContext context;
    v1::TokenizeRequest text;
    text.set_text(std::string(bytes, 'x'));
    v1::TokenizeResponse tokens;
    return stub->Tokenize(&context, text, &tokens).error_code();
  };
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(tokenize(16 << 20), grpc::StatusCode::RESOURCE_EXHAUSTED);
    EXPECT_EQ(tokenize(1000), grpc::StatusCode::OK) << "the server goes on";
  }
}

TEST_F(GrpcServerTest, AReaderThatTakesNothingIsDropped) {
  Settings settings;
  settings.limits.write_seconds = 0.3;
  start(settings);
  v1::ChatCompletionRequest request = chat();
  request.mutable_sampling()->set_max_tokens(100);
  request.mutable_sampling()->set_n(64);  // more than the client's window holds, if that does not grow
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  const auto stub = v1::Inference::NewStub(grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(server_->port()),
                                                                     grpc::InsecureChannelCredentials(), arguments));
  {
    grpc::ClientContext context;
    auto reader = stub->StreamChatCompletion(&context, request);
    v1::ChatCompletionChunk chunk;
    ASSERT_TRUE(reader->Read(&chunk));
    EXPECT_TRUE(eventually([&] { return service_.alive == 0; }));
    while (reader->Read(&chunk)) {
    }
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  // The limit is for one piece, not for the whole.
  service_.token_us = 50'000;
  request.mutable_sampling()->set_max_tokens(20);
  request.mutable_sampling()->set_n(1);
  grpc::ClientContext context;
  auto reader = stub_->StreamChatCompletion(&context, request);
  v1::ChatCompletionChunk chunk;
  while (reader->Read(&chunk)) {
  }
  EXPECT_TRUE(reader->Finish().ok());
}

TEST_F(GrpcServerTest, ConnectionsWithoutACallAreClosed) {
  Settings settings;
  settings.limits.idle_seconds = 0.3;
  start(settings);
  const auto channel =
      grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->port()), grpc::InsecureChannelCredentials());
  const auto stub = v1::Inference::NewStub(channel);
  service_.token_us = 300'000;
  for (int i = 0; i < 2; ++i) {  // an answer of 0.9 s, and one after the connection was closed
    grpc::ClientContext context;
    v1::ChatCompletionResponse response;
    EXPECT_TRUE(stub->ChatCompletion(&context, chat(), &response).ok());
    EXPECT_TRUE(eventually([&] { return channel->GetState(false) == GRPC_CHANNEL_IDLE; }));
  }
}

// gRPC's servers allow two pings in five minutes, and a long prefill is as silent.
TEST_F(GrpcServerTest, ClientsMayPingThroughSilence) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 1100);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  const auto channel = grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(server_->port()),
                                                 grpc::InsecureChannelCredentials(), arguments);
  service_.token_us = 6'000'000;
  v1::ChatCompletionRequest request = chat();
  request.mutable_sampling()->set_max_tokens(1);
  grpc::ClientContext context;
  v1::ChatCompletionResponse response;
  const grpc::Status status = v1::Inference::NewStub(channel)->ChatCompletion(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
}

TEST_F(GrpcServerTest, HostsMayHaveBrackets) {
  Settings settings;
  settings.server.host = "[127.0.0.1]";
  start(settings);
  EXPECT_GT(server_->port(), 0);
  settings.server.host = "[::1]";
  settings.server.grpc_port = 0;
  const auto server = GrpcServer::start(settings, service_);
  if (!server.ok()) {
    EXPECT_EQ(server.status().message().find("[["), std::string::npos) << server.status().message();
    return;  // a machine without IPv6
  }
  const auto stub = v1::Inference::NewStub(
      grpc::CreateChannel("ipv6:[::1]:" + std::to_string((*server)->port()), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  v1::GetModelInfoResponse model;
  EXPECT_TRUE(stub->GetModelInfo(&context, {}, &model).ok());
}

TEST_F(GrpcServerTest, APortInUseIsAnError) {
  Settings settings;
  settings.server.grpc_port = server_->port();
  const auto second = GrpcServer::start(settings, service_);
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.status().message().find(std::to_string(server_->port())), std::string::npos);
}

TEST_F(GrpcServerTest, ShutdownCutsWhatIsUnderWay) {
  service_.token_us = 20000;
  v1::ChatCompletionRequest request = chat();
  request.mutable_sampling()->set_max_tokens(100000);
  grpc::ClientContext context;
  auto reader = stub_->StreamChatCompletion(&context, request);
  v1::ChatCompletionChunk chunk;
  ASSERT_TRUE(reader->Read(&chunk));
  server_->shutdown(0.1);
  while (reader->Read(&chunk)) {
  }
  EXPECT_FALSE(reader->Finish().ok());
  EXPECT_TRUE(eventually([&] { return service_.alive == 0; }));
}

}  // namespace
}  // namespace moed
