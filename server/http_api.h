#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>

#include "server/http_server.h"
#include "server/service.h"
#include "server/settings.h"

namespace moed {

// The routes of the HTTP door: OpenAI's API with vLLM's extras, health, metrics. Thread-safe. `service` must outlive
// it.
class HttpApi : public HttpHandler {
 public:
  HttpApi(Service& service, const Settings& settings);

  std::optional<HttpReply> admit(HttpRequest& request) override;
  std::unique_ptr<HttpTask> handle(HttpRequest request, std::function<void()> wake) override;
  HttpReply refuse(int status, const std::string& message) override;
  void finish_reply(HttpRequest& request, HttpReply& reply) override;
  void finished(const HttpRequest& request, const HttpOutcome& outcome) override;

 private:
  std::unique_ptr<HttpTask> generate(const HttpRequest& request, bool chat, std::function<void()> wake);
  std::unique_ptr<HttpTask> tokenize(const HttpRequest& request, std::function<void()> wake);
  std::unique_ptr<HttpTask> detokenize(const HttpRequest& request, std::function<void()> wake);
  HttpReply get(const HttpRequest& request) const;
  HttpReply get_health(const std::string& path) const;
  HttpReply preflight(const HttpRequest& request) const;
  bool allows_origin(std::string_view origin) const;
  void log_unknown_fields(const std::vector<std::string>& names);

  Service& service_;
  const int64_t json_depth_max_;
  const int64_t request_id_bytes_max_;
  const std::vector<std::string> cors_origin_;
  std::mutex mutex_;
  std::set<std::string> unknown_fields_;  // named in the log already; under mutex_
};

}  // namespace moed
