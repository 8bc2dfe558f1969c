#include "server/grpc_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>

#include <algorithm>
#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <chrono>
#include <deque>
#include <functional>
#include <set>
#include <thread>

#include "base/clock.h"
#include "base/log.h"
#include "moed.grpc.pb.h"
#include "server/grpc_convert.h"
#include "server/host_name.h"
#include "server/request_id.h"
#include "server/request_log.h"

namespace moed {

namespace {

constexpr int kPumpThreads = 2;          // make messages of what generations have ready
constexpr int kKeepaliveMs = 20'000;     // a dead client is seen after about two of these
constexpr int64_t kCloseUs = 1'000'000;  // for connections to end once no call does
constexpr int kPortTries = 4;            // to find one that is free on both loopback addresses

// A client with keepalive pings through a long prefill. gRPC's own limit of one in five minutes would turn it away.
constexpr int kPingsApartMs = 1'000;

using Pool = boost::asio::thread_pool;
using Strand = boost::asio::strand<Pool::executor_type>;

// What calls share with the door.
struct Door {
  const double write_seconds;
  Pool pool{kPumpThreads};
  std::atomic<int64_t> cut_us{INT64_MAX};  // from then on a call that is cancelled is so by us
  std::atomic<int64_t> num_calls{0};       // that generate, until the last of their answer is out
};

AnswerShape shape_of(const GenerationParams& params, const Service& service) {
  AnswerShape shape;
  shape.id = (params.chat ? "chatcmpl-" : "cmpl-") + params.request_id;
  shape.created_s =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  shape.model = params.model;
  if (shape.model.empty()) {
    const ModelInfo ours = service.model();
    if (!ours.names.empty()) shape.model = ours.names.front();
  }
  shape.logprobs = params.logprobs.has_value();
  shape.num_top = params.logprobs.value_or(0);
  shape.prompt_logprobs = params.prompt_logprobs.has_value();
  shape.num_prompt_top = params.prompt_logprobs.value_or(0);
  shape.echo = params.echo;
  return shape;
}

// What the log says of a call when it ends.
struct CallLine {
  const char* method;
  std::string id = {};
  bool probed = false;  // asked every few seconds
  int64_t begin_us = now_us();

  void write(grpc::StatusCode code, std::string_view notes) const {
    log_request({.id = id,
                 .method = "gRPC",
                 .path = std::string("/moed.v1.Inference/") + method,
                 .status = code_name(code),
                 .us = now_us() - begin_us,
                 .notes = notes},
                probed && code == grpc::StatusCode::OK);
  }
};

// Messages are parsed here and not by the library, which would answer UNIMPLEMENTED to bytes that are none.
template <class M>
StatusOr<M> parse(const grpc::ByteBuffer& bytes) {
  grpc::ByteBuffer consumed = bytes;  // the slices are shared
  M message;
  if (grpc::SerializationTraits<M>::Deserialize(&consumed, &message).ok()) return message;
  return invalid_argument("the request is no message of type " + M::descriptor()->full_name());
}

template <class M>
grpc::Status serialize(const M& message, grpc::ByteBuffer& bytes) {
  bool owned = false;
  return grpc::SerializationTraits<M>::Serialize(message, &bytes, &owned);
}

// What a call asks for, and the id by which the log knows it.
struct Asked {
  std::string id;
  StatusOr<GenerationParams> params;
};

// One call that generates. A gRPC reactor lives until OnDone, a generation's wake may come later: so the call owns
// itself until OnDone, and all else that reaches it holds a share. Its state belongs to its strand.
class Call : public std::enable_shared_from_this<Call> {
 public:
  Call(std::shared_ptr<Door> door, const char* method, bool streams)
      : door_(std::move(door)),
        strand_(boost::asio::make_strand(door_->pool)),
        line_{.method = method},
        streams_(streams) {}
  virtual ~Call() = default;

  void start(Service& service, Asked asked) {
    self_ = shared_from_this();
    ++door_->num_calls;
    line_.id = std::move(asked.id);
    if (!asked.params.ok()) return refuse(asked.params.status());
    if (const Status known = service.check_model(asked.params->model); !known.ok()) return refuse(known);
    shape_ = shape_of(*asked.params, service);
    // Under way on the strand: wakes wait behind it, so generation_ is set when the first is seen.
    post([this, &service, wanted = std::make_shared<GenerationParams>(std::move(asked.params).value())] {
      if (ended_) return;
      generation_ = service.start(std::move(*wanted), [weak = weak_from_this()] {
        if (const auto call = weak.lock()) call->post([raw = call.get()] { raw->advance(); });
      });
      advance();
    });
  }

 protected:
  // On the strand; the call is alive while `work` runs.
  void post(std::function<void()> work) {
    boost::asio::post(strand_, [self = shared_from_this(), work = std::move(work)] { work(); });
  }
  // The rest of the answer does not reach the client.
  void cancel() {
    post([this] { lose(); });
  }
  // On the strand, as all below.
  void lose() { give_up(now_us() < door_->cut_us ? Outcome::kLeft : Outcome::kCut); }
  // Who was first counts, and what was refused or failed stays so.
  void give_up(Outcome outcome) {
    if (generation_) generation_->cancel();
    if (!ended_ || outcome_ == Outcome::kDone) {
      outcome_ = outcome;
      ended_ = true;
      status_ = grpc::Status(grpc::StatusCode::CANCELLED, "the call was cancelled");
    }
    advance();
  }
  void done() {
    post([this] {
      const Usage usage = generation_ ? generation_->usage() : Usage();
      line_.write(status_.error_code(), notes_of({.outcome = outcome_,
                                                  .field = refused_field_,
                                                  .stream = streams_,
                                                  .prompt_tokens = usage.prompt_tokens,
                                                  .cached_tokens = usage.cached_tokens,
                                                  .completion_tokens = usage.completion_tokens,
                                                  .first_token_us = first_token_us_}));
      generation_.reset();
      --door_->num_calls;
      self_.reset();
    });
  }
  // What is new of the generation; its end becomes the call's.
  Generation::Update poll() {
    Generation::Update update = generation_->poll();
    if (first_token_us_ == 0 && !update.deltas.empty()) {
      first_token_us_ = std::max<int64_t>(1, now_us() - line_.begin_us);
    }
    if (update.phase == Generation::Phase::kDone) {
      outcome_ = Outcome::kDone;
      ended_ = true;
    } else if (update.phase == Generation::Phase::kRefused || update.phase == Generation::Phase::kFailed) {
      outcome_ = update.phase == Generation::Phase::kRefused ? Outcome::kRefused : Outcome::kFailed;
      refused_field_ = update.status.param();
      status_ = to_grpc(update.status);
      ended_ = true;
    }
    return update;
  }
  virtual void advance() = 0;

  const std::shared_ptr<Door> door_;
  Strand strand_;
  AnswerShape shape_;
  std::shared_ptr<Generation> generation_;
  bool ended_ = false;  // nothing more will be made: status_ is the outcome
  grpc::Status status_;

 private:
  void refuse(const Status& status) {
    post([this, status] {
      if (ended_) return;
      outcome_ = Outcome::kRefused;
      refused_field_ = status.param();
      status_ = to_grpc(status);
      ended_ = true;
      advance();
    });
  }

  std::shared_ptr<Call> self_;
  CallLine line_;
  const bool streams_;
  Outcome outcome_ = Outcome::kLeft;
  std::string refused_field_;
  int64_t first_token_us_ = 0;
};

template <class Chunk>
class StreamCall final : public Call, public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  StreamCall(std::shared_ptr<Door> door, const char* method, grpc::CallbackServerContext* context)
      : Call(std::move(door), method, true), context_(context), write_timer_(strand_) {}

 private:
  void OnWriteDone(bool ok) override {
    post([this, ok] {
      writing_ = false;
      write_timer_.cancel();
      if (!ok) return lose();
      advance();
    });
  }
  void OnCancel() override { cancel(); }
  void OnDone() override { done(); }

  void advance() override {
    if (writing_ || finished_) return;
    if (ready_.empty() && !ended_ && generation_) take(poll());
    if (status_.error_code() == grpc::StatusCode::CANCELLED) ready_.clear();
    if (!ready_.empty()) {
      current_ = std::move(ready_.front());
      ready_.pop_front();
      writing_ = true;
      expect_write();
      StartWrite(&current_);
    } else if (ended_) {
      finished_ = true;
      Finish(status_);
    }
  }

  // gRPC itself would wait for ever for a client that takes nothing.
  void expect_write() {
    write_timer_.expires_after(std::chrono::microseconds(static_cast<int64_t>(door_->write_seconds * 1e6)));
    write_timer_.async_wait([self = shared_from_this(), this, number = ++num_writes_](boost::system::error_code error) {
      if (error || !writing_ || number != num_writes_) return;
      give_up(Outcome::kCut);
      context_->TryCancel();  // it lives: the call ends after this write
    });
  }
  void take(const Generation::Update& update) {
    for (const Delta& delta : update.deltas) {
      Chunk chunk;
      if (make_chunk(delta, shape_, begun_.insert(delta.choice).second, chunk)) add(chunk);
    }
    if (update.phase != Generation::Phase::kDone) return;
    Chunk last;
    make_last(generation_->usage(), shape_, last);
    add(last);
  }
  void add(const Chunk& chunk) {
    const grpc::Status made = serialize(chunk, ready_.emplace_back());
    MOED_CHECK(made.ok()) << made.error_message();  // a piece of 2 GB
  }

  grpc::CallbackServerContext* const context_;
  boost::asio::steady_timer write_timer_;
  int64_t num_writes_ = 0;
  std::deque<grpc::ByteBuffer> ready_;
  grpc::ByteBuffer current_;
  std::set<int32_t> begun_;
  bool writing_ = false;
  bool finished_ = false;
};

class ChatCall final : public Call, public grpc::ServerUnaryReactor {
 public:
  ChatCall(std::shared_ptr<Door> door, const char* method, grpc::ByteBuffer* bytes)
      : Call(std::move(door), method, false), bytes_(bytes) {}

 private:
  void OnCancel() override { cancel(); }
  void OnDone() override { done(); }

  void advance() override {
    if (finished_) return;
    if (!ended_ && generation_) {
      const Generation::Update update = poll();
      for (const Delta& delta : update.deltas) add_delta(delta, shape_, response_);
      if (update.phase == Generation::Phase::kDone) {
        response_.set_id(shape_.id);
        response_.set_created(shape_.created_s);
        response_.set_model(shape_.model);
        fill_usage(generation_->usage(), response_.mutable_usage());
        status_ = serialize(response_, *bytes_);
      }
    }
    if (!ended_) return;
    finished_ = true;
    Finish(status_);
  }

  grpc::ByteBuffer* const bytes_;
  v1::ChatCompletionResponse response_;
  bool finished_ = false;
};

const char* state_name(ServerState state) {
  switch (state) {
    case ServerState::kLoading:
      return "loading";
    case ServerState::kReady:
      return "ready";
    case ServerState::kDraining:
      return "draining";
  }
  return "";
}

using RawChats =
    v1::Inference::WithRawCallbackMethod_ChatCompletion<v1::Inference::WithRawCallbackMethod_StreamChatCompletion<
        v1::Inference::WithRawCallbackMethod_Generate<v1::Inference::Service>>>;
using RawTexts =
    v1::Inference::WithRawCallbackMethod_Tokenize<v1::Inference::WithRawCallbackMethod_Detokenize<RawChats>>;
using RawInference = v1::Inference::WithRawCallbackMethod_GetModelInfo<
    v1::Inference::WithRawCallbackMethod_GetServerInfo<v1::Inference::WithRawCallbackMethod_GetLoads<RawTexts>>>;

class InferenceService final : public RawInference {
 public:
  InferenceService(moed::Service& service,  // the base has a Service of its own
                   const Settings::Limits& limits)
      : service_(service), limits_(limits), door_(new Door{.write_seconds = limits.write_seconds}) {}
  ~InferenceService() override { door_->pool.join(); }
  Door& door() { return *door_; }

 private:
  using Context = grpc::CallbackServerContext;
  using Bytes = grpc::ByteBuffer;

  grpc::ServerUnaryReactor* ChatCompletion(Context* context, const Bytes* request, Bytes* response) override {
    const auto call = std::make_shared<ChatCall>(door_, "ChatCompletion", response);
    call->start(service_, ask<v1::ChatCompletionRequest>(*context, *request, [&](const auto& message) {
                  return to_params(message, limits_.json_depth_max);
                }));
    return call.get();
  }
  grpc::ServerWriteReactor<Bytes>* StreamChatCompletion(Context* context, const Bytes* request) override {
    const auto call = std::make_shared<StreamCall<v1::ChatCompletionChunk>>(door_, "StreamChatCompletion", context);
    call->start(service_, ask<v1::ChatCompletionRequest>(*context, *request, [&](const auto& message) {
                  return to_params(message, limits_.json_depth_max);
                }));
    return call.get();
  }
  grpc::ServerWriteReactor<Bytes>* Generate(Context* context, const Bytes* request) override {
    const auto call = std::make_shared<StreamCall<v1::GenerateChunk>>(door_, "Generate", context);
    call->start(service_,
                ask<v1::GenerateRequest>(*context, *request, [](const auto& message) { return to_params(message); }));
    return call.get();
  }

  grpc::ServerUnaryReactor* Tokenize(Context* context, const Bytes* request, Bytes* response) override {
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    const CallLine line{.method = "Tokenize", .id = fresh_request_id()};
    auto params =
        admit<v1::TokenizeRequest>(*context, *request, [](const auto& message) { return to_params(message); });
    if (!params.ok()) return finish(reactor, line, params.status());
    params->abandoned = [context] { return context->IsCancelled(); };
    service_.tokenize(std::move(params).value(), [reactor, response, line](StatusOr<TokenizeResult> result) {
      if (!result.ok()) return (void)finish(reactor, line, result.status());
      v1::TokenizeResponse message;
      message.mutable_token_ids()->Assign(result->tokens.begin(), result->tokens.end());
      message.set_max_model_len(result->max_model_len);
      finish(reactor, line, message, *response);
    });
    return reactor;
  }
  grpc::ServerUnaryReactor* Detokenize(Context* context, const Bytes* request, Bytes* response) override {
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    const CallLine line{.method = "Detokenize", .id = fresh_request_id()};
    const auto asked = admit<v1::DetokenizeRequest>(
        *context, *request, [](const auto& message) { return StatusOr<v1::DetokenizeRequest>(message); });
    if (!asked.ok()) return finish(reactor, line, asked.status());
    std::vector<int64_t> ids(asked->token_ids().begin(), asked->token_ids().end());
    service_.detokenize(asked->model(), std::move(ids), [reactor, response, line](StatusOr<std::string> text) {
      if (!text.ok()) return (void)finish(reactor, line, text.status());
      v1::DetokenizeResponse message;
      message.set_text(std::move(text).value());
      finish(reactor, line, message, *response);
    });
    return reactor;
  }

  grpc::ServerUnaryReactor* GetModelInfo(Context* context, const Bytes* request, Bytes* response) override {
    const CallLine line{.method = "GetModelInfo", .id = fresh_request_id()};
    return answer<v1::GetModelInfoRequest>(*context, line, *request, *response, [&] {
      v1::GetModelInfoResponse message;
      const ModelInfo model = service_.model();
      for (const std::string& name : model.names) message.add_names(name);
      message.set_root(model.root);
      message.set_max_model_len(model.max_model_len);
      message.set_created(model.created_s);
      return message;
    });
  }
  grpc::ServerUnaryReactor* GetServerInfo(Context* context, const Bytes* request, Bytes* response) override {
    const CallLine line{.method = "GetServerInfo", .id = fresh_request_id()};
    return answer<v1::GetServerInfoRequest>(*context, line, *request, *response, [&] {
      v1::GetServerInfoResponse message;
      message.set_state(state_name(service_.health().state));
      message.set_info_json(service_.info_json());
      return message;
    });
  }
  grpc::ServerUnaryReactor* GetLoads(Context* context, const Bytes* request, Bytes* response) override {
    const CallLine line{.method = "GetLoads", .id = fresh_request_id(), .probed = true};
    return answer<v1::GetLoadsRequest>(*context, line, *request, *response, [&] {
      v1::GetLoadsResponse message;
      const Loads loads = service_.loads();
      message.set_running(loads.running);
      message.set_waiting(loads.waiting);
      message.set_kv_usage(loads.kv_usage);
      return message;
    });
  }

  Status authorize(const Context& context) const {
    std::string_view key;
    const auto found = context.client_metadata().find("authorization");
    if (found != context.client_metadata().end()) {
      key = std::string_view(found->second.data(), found->second.size());
      if (key.starts_with("Bearer ") || key.starts_with("bearer ")) key.remove_prefix(7);
    }
    if (service_.authorized(key)) return Status();
    return Status(StatusCode::kUnauthenticated, "a valid API key is needed: metadata authorization: Bearer KEY");
  }
  // What `convert` makes of the message, if the caller may ask.
  template <class M, class F>
  auto admit(const Context& context, const Bytes& bytes, F convert) const -> decltype(convert(std::declval<M>())) {
    MOED_RETURN_IF_ERROR(authorize(context));
    MOED_ASSIGN_OR_RETURN(const M message, parse<M>(bytes));
    return convert(message);
  }
  template <class M, class F>
  Asked ask(const Context& context, const Bytes& bytes, F convert) const {
    std::string id;
    auto params = admit<M>(context, bytes, [&](const M& message) {
      id = message.request_id();
      return convert(message);
    });
    id = request_id_or_fresh(id, limits_.request_id_bytes_max);
    if (params.ok()) params->request_id = id;
    return {std::move(id), std::move(params)};
  }

  static grpc::ServerUnaryReactor* finish(grpc::ServerUnaryReactor* reactor, const CallLine& line,
                                          const Status& status) {
    const bool left = status.code() == StatusCode::kCancelled;
    line.write(to_grpc(status).error_code(), left ? " outcome=left" : refusal_notes(status.param()));
    reactor->Finish(to_grpc(status));
    return reactor;
  }
  template <class M>
  static grpc::ServerUnaryReactor* finish(grpc::ServerUnaryReactor* reactor, const CallLine& line, const M& message,
                                          Bytes& bytes) {
    const grpc::Status made = serialize(message, bytes);
    line.write(made.error_code(), "");
    reactor->Finish(made);
    return reactor;
  }
  template <class M, class F>
  grpc::ServerUnaryReactor* answer(Context& context, const CallLine& line, const Bytes& request, Bytes& response,
                                   F make) const {
    Status status = authorize(context);
    if (status.ok()) status = parse<M>(request).status();
    if (!status.ok()) return finish(context.DefaultReactor(), line, status);
    return finish(context.DefaultReactor(), line, make(), response);
  }

  moed::Service& service_;
  const Settings::Limits limits_;
  const std::shared_ptr<Door> door_;
};

}  // namespace

struct GrpcServer::State {
  State(Service& service, const Settings& settings) : inference(service, settings.limits) {}
  InferenceService inference;
  std::unique_ptr<grpc::Server> server;
  int port = 0;

  // `also`: a second address, or empty. False: they cannot be had.
  bool listen(const Settings::Limits& limits, const std::string& where, const std::string& also);
};

bool GrpcServer::State::listen(const Settings::Limits& limits, const std::string& where, const std::string& also) {
  grpc::ServerBuilder builder;
  builder.AddListeningPort(where, grpc::InsecureServerCredentials(), &port);
  if (!also.empty()) builder.AddListeningPort(also, grpc::InsecureServerCredentials());
  builder.RegisterService(&inference);
  builder.SetMaxReceiveMessageSize(static_cast<int>(std::min<int64_t>(limits.body_bytes_max, INT32_MAX)));
  // Beyond it gRPC gives calls up, those that hold memory first.
  grpc::ResourceQuota quota("moed");
  quota.Resize(static_cast<size_t>(limits.reading_bytes_max));
  builder.SetResourceQuota(quota);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a port in use is an error
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, static_cast<int>(limits.grpc_calls_max));
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveMs);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kPingsApartMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, static_cast<int>(limits.idle_seconds * 1e3));
  server = builder.BuildAndStart();
  return server != nullptr && port != 0;
}

namespace {

// Whether ::1 may be listened on at `port`; 0 is replaced by a port that is free on both loopback addresses, so that
// both get the same. Another process may take it in between: then the listener says so.
bool claim_loopback_v6(int& port) {
  using boost::asio::ip::tcp;
  boost::asio::io_context context;
  boost::system::error_code error;
  const auto bind = [&](tcp::acceptor& acceptor, const tcp::endpoint& endpoint) {
    acceptor.open(endpoint.protocol(), error);
    if (!error) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
    if (!error) acceptor.bind(endpoint, error);
    return !error;
  };
  tcp::acceptor v4(context);
  if (port == 0 && !bind(v4, {boost::asio::ip::address_v4::loopback(), 0})) return false;
  const uint16_t wanted = port == 0 ? v4.local_endpoint(error).port() : static_cast<uint16_t>(port);
  tcp::acceptor v6(context);
  if (!bind(v6, {boost::asio::ip::address_v6::loopback(), wanted})) return false;
  port = wanted;
  return true;
}

}  // namespace

StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::start(const Settings& settings, Service& service) {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  const std::string host = settings.server.host == "localhost" ? "127.0.0.1" : without_brackets(settings.server.host);
  const int wanted = static_cast<int>(settings.server.grpc_port);
  for (int tried = 0; tried < (wanted == 0 ? kPortTries : 1); ++tried) {
    auto state = std::make_unique<State>(service, settings);
    // Clients that say "localhost" may try ::1 first, as on the HTTP door.
    int port = wanted;
    const bool also_v6 = host == "127.0.0.1" && claim_loopback_v6(port);
    if (!state->listen(settings.limits, host_and_port(host, port), also_v6 ? host_and_port("::1", port) : "")) continue;
    std::unique_ptr<GrpcServer> server(new GrpcServer(std::move(state)));
    server->set_serving(false);
    return server;
  }
  return Status(StatusCode::kUnavailable,
                "cannot listen on " + host_and_port(host, wanted) + " for gRPC: is the port in use?", "grpc_port");
}

GrpcServer::GrpcServer(std::unique_ptr<State> state) : state_(std::move(state)) {}
GrpcServer::~GrpcServer() { shutdown(0); }

int GrpcServer::port() const { return state_->port; }

void GrpcServer::set_serving(bool serving) {
  grpc::HealthCheckServiceInterface* const health = state_->server->GetHealthCheckService();
  health->SetServingStatus("", serving);
  health->SetServingStatus("moed.v1.Inference", serving);
}

void GrpcServer::shutdown(double grace_seconds) {
  // gRPC's own wait would be for those too who watch our health, and they stay to the end.
  Door& door = state_->inference.door();
  const int64_t end_us = now_us() + static_cast<int64_t>(grace_seconds * 1e6);
  while (door.num_calls > 0 && now_us() < end_us) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  const int64_t left_us = std::clamp<int64_t>(end_us - now_us(), 0, kCloseUs);
  door.cut_us = now_us() + left_us;
  state_->server->Shutdown(std::chrono::system_clock::now() + std::chrono::microseconds(left_us));
  state_->server->Wait();
}

}  // namespace moed
