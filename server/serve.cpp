#include "server/serve.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <string>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/log.h"
#include "server/daemon.h"
#include "server/grpc_server.h"
#include "server/host_name.h"
#include "server/http_api.h"
#include "server/http_server.h"

namespace moed {
namespace {

// After a drain, at least: for streams to carry their last event out.
constexpr double kCloseSeconds = 2.0;

// SIGTERM and SIGINT as something to read. Made before any other thread, so that none of them takes the signal.
class Signals {
 public:
  Signals() {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
    signal(SIGPIPE, SIG_IGN);
    fd_ = signalfd(-1, &set, SFD_CLOEXEC);
    MOED_CHECK(fd_ >= 0) << "signalfd";
  }
  ~Signals() { close(fd_); }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

  // True when a signal came within `timeout_ms` (negative: for ever); takes it.
  bool wait(int timeout_ms) const {
    pollfd entry{fd_, POLLIN, 0};
    if (poll(&entry, 1, timeout_ms) <= 0) return false;
    signalfd_siginfo info;
    return read(fd_, &info, sizeof(info)) == sizeof(info);
  }

 private:
  int fd_ = -1;
};

// Ends the process at once, with one line, when a signal comes while it lives. Only it reads the signals then.
class ExitOnSignal {
 public:
  ExitOnSignal(const Signals& signals, int exit_code, const char* line)
      : thread_([this, &signals, exit_code, line] {
          while (!done_) {
            if (!signals.wait(kPollMs)) continue;
            std::fprintf(stderr, "moed: %s\n", line);
            std::_Exit(exit_code);
          }
        }) {}
  ~ExitOnSignal() {
    done_ = true;
    thread_.join();
  }
  ExitOnSignal(const ExitOnSignal&) = delete;
  ExitOnSignal& operator=(const ExitOnSignal&) = delete;

 private:
  static constexpr int kPollMs = 50;
  std::atomic<bool> done_{false};
  std::thread thread_;
};

// Descriptors besides those of HTTP connections: gRPC's, listeners, weights.
constexpr int64_t kOtherFiles = 2048;

// Shells allow 1024 open files or so, which connections would use up.
void raise_open_files(int64_t connections_max) {
  rlimit files{};
  if (getrlimit(RLIMIT_NOFILE, &files) != 0) return;
  const auto wanted = static_cast<rlim_t>(connections_max + kOtherFiles);
  if (files.rlim_cur >= wanted) return;
  files.rlim_cur = std::min(wanted, files.rlim_max);
  if (setrlimit(RLIMIT_NOFILE, &files) != 0 || files.rlim_cur < wanted) {
    spdlog::warn("at most {} files may be open; limits.connections_max of {} wants {}", files.rlim_cur, connections_max,
                 wanted);
  }
}

int fail(const Status& status) {
  std::fprintf(stderr, "moed: %s\n", status.message().c_str());
  return 1;
}

HttpServerOptions http_options(const Settings& settings) {
  HttpServerOptions options;
  options.host = settings.server.host;
  options.port = static_cast<int>(settings.server.http_port);
  options.body_bytes_max = settings.limits.body_bytes_max;
  options.reading_bytes_max = settings.limits.reading_bytes_max;
  options.connections_max = settings.limits.connections_max;
  options.header_bytes_max = settings.limits.header_bytes_max;
  options.header_seconds = settings.limits.header_seconds;
  options.body_seconds = settings.limits.body_seconds;
  options.idle_seconds = settings.limits.idle_seconds;
  options.write_seconds = settings.limits.write_seconds;
  options.ping_seconds = settings.limits.ping_seconds;
  return options;
}

// `needs_key`: a placeholder stands for it, since keys stay out of logs.
void print_invitation(const std::string& host, int port, bool needs_key) {
  std::printf(
      "\nTry:\n  curl http://%s/v1/chat/completions -H 'Content-Type: application/json'%s -d '{\"messages\": "
      "[{\"role\": \"user\", \"content\": \"What is the capital of France?\"}], \"temperature\": 0}'\n\n",
      host_and_port(reached_at(host), port).c_str(), needs_key ? " -H \"Authorization: Bearer $MOED_API_KEY\"" : "");
  std::fflush(stdout);
}

// An answer that is made but not yet taken is still being drained: its reader has what is left of the time.
void drain(Daemon& daemon, HttpServer& http, GrpcServer& grpc, double drain_seconds) {
  const int64_t begin_us = now_us();
  const auto left = [&] {
    return std::max(kCloseSeconds, drain_seconds - static_cast<double>(now_us() - begin_us) / 1e6);
  };
  grpc.set_serving(false);
  daemon.drain(drain_seconds);
  daemon.stop();
  http.shutdown(left());
  grpc.shutdown(left());
}

}  // namespace

int serve(const LoadedSettings& loaded, const BackendFactory& factory) {
  const Signals signals;
  const Settings& settings = loaded.settings;
  init_log(settings.server.log_level, settings.server.log_json);
  for (const std::string& warning : loaded.warnings) spdlog::warn("{}", warning);

  raise_open_files(settings.limits.connections_max);
  auto keys = ApiKeys::load(settings.server.api_key_file, settings.server.api_key);
  if (!keys.ok()) return fail(keys.status());
  const bool needs_key = !keys->empty();
  Daemon daemon(settings, std::move(*keys));

  HttpApi api(daemon, settings);
  auto http = HttpServer::start(http_options(settings), api);
  if (!http.ok()) return fail(http.status());
  auto grpc = GrpcServer::start(settings, daemon);
  if (!grpc.ok()) return fail(grpc.status());
  const std::string grpc_address = host_and_port(settings.server.host, (*grpc)->port());
  spdlog::info("loading {}; http {}, grpc {}", settings.model.path, (*http)->addresses().front(), grpc_address);

  {
    // Loading does not listen to signals; a supervisor's stop must not wait for it.
    const ExitOnSignal watch(signals, 0, "stopped while loading");
    if (const Status status = daemon.load(factory); !status.ok()) return fail(status);
  }

  (*grpc)->set_serving(true);
  spdlog::info("ready: http {}, grpc {}", (*http)->addresses().front(), grpc_address);
  print_invitation(settings.server.host, (*http)->port(), needs_key);

  signals.wait(-1);
  spdlog::info("draining: up to {} s for {} running requests", settings.server.drain_seconds,
               daemon.loads().running + daemon.loads().waiting);
  const ExitOnSignal watch(signals, 1, "a second signal: stopped at once, running requests were cut off");
  drain(daemon, **http, **grpc, settings.server.drain_seconds);
  spdlog::info("stopped");
  return 0;
}

}  // namespace moed
