#include "server/http_api.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>

#include "base/clock.h"
#include "base/log.h"
#include "server/http_wire.h"
#include "server/openai.h"
#include "server/openai_answer.h"
#include "server/request_id.h"
#include "server/request_log.h"

namespace moed {

namespace {

constexpr size_t kUnknownFieldsMax = 256;  // names remembered, and so log lines
constexpr std::string_view kModelPrefix = "/v1/models/";
constexpr std::string_view kHeadersTaken = "Authorization, Content-Type, X-Request-Id";  // from other origins
constexpr const char* kClientLeft = "499";  // in the log alone, as nginx has it

struct Route {
  std::string_view path;
  std::string_view method;  // GET (and HEAD) or POST
  bool open;                // needs no key
  bool probed;              // asked every few seconds: what it answers is logged at level debug
};
constexpr std::array<Route, 11> kRoutes{{
    {"/v1/chat/completions", "POST", false, false},
    {"/v1/completions", "POST", false, false},
    {"/tokenize", "POST", false, false},
    {"/detokenize", "POST", false, false},
    {"/v1/models", "GET", false, false},
    {kModelPrefix, "GET", false, false},
    {"/info", "GET", false, false},
    {"/metrics", "GET", false, true},
    {"/live", "GET", true, true},
    {"/health", "GET", true, true},
    {"/ready", "GET", true, true},
}};

const Route* find_route(std::string_view path) {
  for (const Route& route : kRoutes) {
    const bool is_prefix = route.path == kModelPrefix;
    if (is_prefix ? path.starts_with(route.path) && path.size() > route.path.size() : path == route.path) return &route;
  }
  return nullptr;
}

int64_t unix_seconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

std::string_view bearer(std::string_view authorization) {
  constexpr std::string_view kScheme = "bearer ";
  if (authorization.size() < kScheme.size() || lower_case(authorization.substr(0, kScheme.size())) != kScheme)
    return {};
  authorization.remove_prefix(kScheme.size());
  while (authorization.starts_with(' ')) authorization.remove_prefix(1);
  while (authorization.ends_with(' ')) authorization.remove_suffix(1);
  return authorization;
}

bool is_json(std::string_view content_type) {
  std::string type = lower_case(content_type.substr(0, content_type.find(';')));
  type.erase(type.find_last_not_of(" \t") + 1);
  return type == "application/json";
}

Outcome outcome_of(HttpEnd end) {
  if (end == HttpEnd::kAnswered) return Outcome::kDone;
  return end == HttpEnd::kLeft ? Outcome::kLeft : Outcome::kCut;
}

// An answer that was ready at once.
class ReadyTask : public HttpTask {
 public:
  ReadyTask(HttpReply reply, std::string notes) : reply_(std::move(reply)), notes_(std::move(notes)) {}
  std::optional<HttpReply> reply() override { return std::move(reply_); }
  std::string notes(HttpEnd) const override { return notes_; }

 private:
  HttpReply reply_;
  std::string notes_;
};

std::unique_ptr<HttpTask> ready(HttpReply reply) { return std::make_unique<ReadyTask>(std::move(reply), ""); }
std::unique_ptr<HttpTask> refused(const Status& status) {
  return std::make_unique<ReadyTask>(error_reply(status), refusal_notes(status.param()));
}

// An answer that another thread makes with one call. The call keeps its `Result` alive: the task may die first.
class CalledTask : public HttpTask {
 public:
  struct Result {
    std::mutex mutex;
    std::optional<HttpReply> reply;  // under mutex
    std::string notes;               // under mutex
    std::function<void()> wake;
    std::atomic<bool> abandoned{false};
    void set(HttpReply value) {
      {
        const std::lock_guard lock(mutex);
        reply = std::move(value);
      }
      wake();
    }
    void refuse(const Status& status) {
      {
        const std::lock_guard lock(mutex);
        notes = refusal_notes(status.param());
      }
      set(error_reply(status));
    }
  };
  explicit CalledTask(std::shared_ptr<Result> result) : result_(std::move(result)) {}
  ~CalledTask() override { result_->abandoned = true; }
  std::optional<HttpReply> reply() override {
    const std::lock_guard lock(result_->mutex);
    return std::move(result_->reply);
  }
  std::string notes(HttpEnd) const override {
    const std::lock_guard lock(result_->mutex);
    return result_->notes;
  }

 private:
  std::shared_ptr<Result> result_;
};

// A chat or completion, streamed or not.
class GenerationTask : public HttpTask {
 public:
  GenerationTask(OpenAiCall call, AnswerHead head)
      : call_(std::move(call)), plain_(call_, head), stream_(call_, std::move(head)) {}
  void start(Service& service, std::function<void()> wake) {
    // `params` stays: the answer depends on some of it. Prompts may be large and are needed once.
    GenerationParams params = std::move(call_.params);
    call_.params = GenerationParams{};
    call_.params.chat = params.chat;
    call_.params.echo = params.echo;
    call_.params.logprobs = params.logprobs;
    call_.params.prompt_logprobs = params.prompt_logprobs;
    call_.params.stop_token_ids = params.stop_token_ids;
    call_.params.return_token_ids = params.return_token_ids;
    generation_ = service.start(std::move(params), std::move(wake));
  }

  bool streaming() const override { return call_.stream && status_code_ == 200; }
  std::string_view ping() const override { return ": ping\n\n"; }
  std::optional<HttpReply> reply() override;
  bool read(std::string& out) override;
  bool failed() const override { return fault_ == Outcome::kFailed; }
  std::string notes(HttpEnd end) const override;

 private:
  Generation::Update poll();

  OpenAiCall call_;
  PlainAnswer plain_;
  StreamAnswer stream_;
  std::shared_ptr<Generation> generation_;
  Generation::Update held_;  // stream: came with the news that the head may go out
  bool has_held_ = false;
  int status_code_ = 200;
  std::optional<Outcome> fault_;  // kRefused or kFailed
  std::string refused_field_;
  const int64_t begin_us_ = now_us();
  int64_t first_token_us_ = 0;
};

// What was refused or failed, was so whoever hung up then; what was generated is done when it was taken, too.
std::string GenerationTask::notes(HttpEnd end) const {
  const Usage usage = generation_->usage();
  return notes_of({.outcome = fault_.value_or(outcome_of(end)),
                   .field = refused_field_,
                   .stream = call_.stream,
                   .prompt_tokens = usage.prompt_tokens,
                   .cached_tokens = usage.cached_tokens,
                   .completion_tokens = usage.completion_tokens,
                   .first_token_us = first_token_us_});
}

Generation::Update GenerationTask::poll() {
  Generation::Update update = generation_->poll();
  if (first_token_us_ == 0 && !update.deltas.empty()) first_token_us_ = std::max<int64_t>(1, now_us() - begin_us_);
  return update;
}

std::optional<HttpReply> GenerationTask::reply() {
  Generation::Update update = poll();
  if (update.phase == Generation::Phase::kPreparing) return std::nullopt;
  if (update.phase == Generation::Phase::kRefused || (!call_.stream && update.phase == Generation::Phase::kFailed)) {
    fault_ = update.phase == Generation::Phase::kRefused ? Outcome::kRefused : Outcome::kFailed;
    refused_field_ = update.status.param();
    HttpReply reply = error_reply(update.status);
    status_code_ = reply.status;
    return reply;
  }
  if (call_.stream) {
    held_ = std::move(update);
    has_held_ = true;
    HttpReply reply{.content_type = "text/event-stream; charset=utf-8"};
    reply.headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}};
    return reply;
  }
  for (const Delta& delta : update.deltas) plain_.add(delta);
  if (update.phase != Generation::Phase::kDone) return std::nullopt;
  return HttpReply{.body = plain_.json(generation_->usage(), generation_->num_choices())};
}

bool GenerationTask::read(std::string& out) {
  const Generation::Update update = has_held_ ? std::move(held_) : poll();
  has_held_ = false;
  const Usage usage = generation_->usage();
  for (const Delta& delta : update.deltas) stream_.add(delta, usage, out);
  if (update.phase == Generation::Phase::kDone) {
    stream_.end(usage, out);
    return false;
  }
  if (update.phase == Generation::Phase::kFailed || update.phase == Generation::Phase::kRefused) {
    fault_ = Outcome::kFailed;
    out += "data: " + error_json(update.status) + "\n\n";
    return false;
  }
  return true;
}

}  // namespace

HttpApi::HttpApi(Service& service, const Settings& settings)
    : service_(service),
      json_depth_max_(settings.limits.json_depth_max),
      request_id_bytes_max_(settings.limits.request_id_bytes_max),
      cors_origin_(settings.server.cors_origin) {}

std::optional<HttpReply> HttpApi::admit(HttpRequest& request) {
  request.id = request_id_or_fresh(request.header("x-request-id"), request_id_bytes_max_);
  const Route* const route = find_route(request.path);
  if (route == nullptr) return error_reply(404, "there is no such path");
  if (request.method == "OPTIONS" && !cors_origin_.empty()) return preflight(request);
  const bool matches = request.method == route->method || (route->method == "GET" && request.method == "HEAD");
  if (!matches) {
    HttpReply reply = error_reply(405, "this path takes " + std::string(route->method));
    reply.headers.emplace_back("Allow", route->method == "GET" ? "GET, HEAD" : "POST");
    return reply;
  }
  if (!route->open && !service_.authorized(bearer(request.header("authorization")))) {
    return error_reply(401, "a valid API key is needed: Authorization: Bearer KEY");
  }
  if (route->method == "POST") {
    if (!is_json(request.header("content-type"))) return error_reply(415, "Content-Type must be application/json");
    const std::string encoding = lower_case(request.header("content-encoding"));
    if (!encoding.empty() && encoding != "identity") return error_reply(415, "Content-Encoding is not supported");
  }
  return std::nullopt;
}

std::unique_ptr<HttpTask> HttpApi::handle(HttpRequest request, std::function<void()> wake) {
  if (request.method != "POST") return ready(get(request));
  if (request.path == "/v1/chat/completions") return generate(request, true, std::move(wake));
  if (request.path == "/v1/completions") return generate(request, false, std::move(wake));
  if (request.path == "/tokenize") return tokenize(request, std::move(wake));
  return detokenize(request, std::move(wake));
}

std::unique_ptr<HttpTask> HttpApi::generate(const HttpRequest& request, bool chat, std::function<void()> wake) {
  auto call = chat ? parse_chat_request(request.body, json_depth_max_)
                   : parse_completion_request(request.body, json_depth_max_);
  Status status = call.status();
  if (status.ok()) status = service_.check_model(call->params.model);
  if (!status.ok()) return refused(status);
  log_unknown_fields(call->unknown_fields);
  AnswerHead head{(chat ? "chatcmpl-" : "cmpl-") + request.id, unix_seconds(), call->params.model};
  if (head.model.empty()) {
    const ModelInfo ours = service_.model();
    if (!ours.names.empty()) head.model = ours.names.front();
  }
  call->params.request_id = request.id;
  auto task = std::make_unique<GenerationTask>(std::move(call).value(), std::move(head));
  task->start(service_, std::move(wake));
  return task;
}

std::unique_ptr<HttpTask> HttpApi::tokenize(const HttpRequest& request, std::function<void()> wake) {
  auto params = parse_tokenize_request(request.body, json_depth_max_);
  if (!params.ok()) return refused(params.status());
  const auto result = std::make_shared<CalledTask::Result>();
  result->wake = std::move(wake);
  params->abandoned = [result] { return result->abandoned.load(); };
  service_.tokenize(std::move(params).value(), [result](StatusOr<TokenizeResult> answer) {
    if (!answer.ok()) return result->refuse(answer.status());
    result->set({.body = tokenize_json(*answer)});
  });
  return std::make_unique<CalledTask>(result);
}

std::unique_ptr<HttpTask> HttpApi::detokenize(const HttpRequest& request, std::function<void()> wake) {
  auto call = parse_detokenize_request(request.body, json_depth_max_);
  if (!call.ok()) return refused(call.status());
  const auto result = std::make_shared<CalledTask::Result>();
  result->wake = std::move(wake);
  service_.detokenize(std::move(call->model), std::move(call->tokens), [result](StatusOr<std::string> answer) {
    if (!answer.ok()) return result->refuse(answer.status());
    result->set({.body = detokenize_json(*answer)});
  });
  return std::make_unique<CalledTask>(result);
}

HttpReply HttpApi::get(const HttpRequest& request) const {
  if (request.path == "/metrics") {
    return {.content_type = "text/plain; version=0.0.4; charset=utf-8", .body = service_.metrics_text()};
  }
  if (request.path == "/info") return {.body = service_.info_json()};
  if (request.path == "/v1/models") return {.body = models_json(service_.model())};
  if (request.path.starts_with(kModelPrefix)) {
    const std::string name = percent_decoded(std::string_view(request.path).substr(kModelPrefix.size()));
    if (const Status known = service_.check_model(name); !known.ok()) return error_reply(known);
    return {.body = model_json(service_.model(), name)};
  }
  return get_health(request.path);
}

HttpReply HttpApi::get_health(const std::string& path) const {
  const Health health = service_.health();
  const auto answer = [](int status, const char* state, const std::string& more = {}) {
    HttpReply reply{.status = status, .body = std::string("{\"status\":\"") + state + "\"" + more + "}"};
    if (status == 503) reply.headers.emplace_back("Retry-After", "1");
    return reply;
  };
  if (!health.alive) return answer(503, "stuck");
  if (path == "/live") return answer(200, "alive");
  if (health.state == ServerState::kLoading) {
    return answer(503, "loading",
                  ",\"loaded_bytes\":" + std::to_string(health.loaded_bytes) +
                      ",\"total_bytes\":" + std::to_string(health.total_bytes));
  }
  if (health.state == ServerState::kDraining) return answer(path == "/ready" ? 503 : 200, "draining");
  return answer(200, "ready");
}

HttpReply HttpApi::refuse(int status, const std::string& message) { return error_reply(status, message); }

void HttpApi::finish_reply(HttpRequest& request, HttpReply& reply) {
  if (request.id.empty()) request.id = fresh_request_id();  // refused before admit()
  reply.headers.emplace_back("X-Request-Id", request.id);
  if (const std::string_view origin = request.header("origin"); allows_origin(origin)) {
    reply.headers.emplace_back("Access-Control-Allow-Origin", std::string(origin));
    reply.headers.emplace_back("Access-Control-Expose-Headers", "X-Request-Id, Retry-After");
    reply.headers.emplace_back("Vary", "Origin");
  }
}

void HttpApi::finished(const HttpRequest& request, const HttpOutcome& outcome) {
  const Route* const route = find_route(request.path);
  const bool served = outcome.status == 200 || outcome.status == 503;
  std::string status = std::to_string(outcome.status);
  if (outcome.status == 0) status = outcome.end == HttpEnd::kLeft ? kClientLeft : "-";
  std::string notes = outcome.notes;
  if (notes.empty() && outcome.end != HttpEnd::kAnswered) {
    notes = fmt::format(" outcome={}", name_of(outcome_of(outcome.end)));
  }
  log_request({.id = request.id,
               .method = request.method,
               .path = request.path,
               .status = status,
               .us = outcome.us,
               .notes = notes},
              route != nullptr && route->probed && served);
}

HttpReply HttpApi::preflight(const HttpRequest& request) const {
  HttpReply reply{.status = 204};
  if (!allows_origin(request.header("origin"))) return reply;
  // Clients in browsers send headers of their own (x-stainless-lang), which mean nothing here and harm nobody.
  const std::string_view asked = request.header("access-control-request-headers");
  reply.headers = {
      {"Access-Control-Allow-Methods", "GET, POST, OPTIONS"},
      {"Access-Control-Allow-Headers", is_header_names(asked) ? std::string(asked) : std::string(kHeadersTaken)},
      {"Access-Control-Max-Age", "600"}};
  return reply;
}

bool HttpApi::allows_origin(std::string_view origin) const {
  return !origin.empty() && std::any_of(cors_origin_.begin(), cors_origin_.end(), [origin](const std::string& allowed) {
    return allowed == "*" || allowed == origin;
  });
}

void HttpApi::log_unknown_fields(const std::vector<std::string>& names) {
  const std::lock_guard lock(mutex_);
  for (const std::string& name : names) {
    if (unknown_fields_.size() >= kUnknownFieldsMax) return;
    if (unknown_fields_.insert(name).second) spdlog::info("request field {} is unknown and ignored", name);
  }
}

}  // namespace moed
