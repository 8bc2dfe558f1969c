#pragma once

#include <memory>

#include "base/status.h"
#include "server/service.h"
#include "server/settings.h"

namespace moed {

// The gRPC door: moed.v1.Inference, grpc.health.v1 and reflection. Clients that cancel, or whose deadline passes,
// cancel their generation.
class GrpcServer {
 public:
  // Listens when it returns, not serving as far as health is concerned. `service` must outlive the server.
  // kUnavailable, naming host and port, when they cannot be bound.
  static StatusOr<std::unique_ptr<GrpcServer>> start(const Settings& settings, Service& service);
  // As shutdown(0).
  ~GrpcServer();
  GrpcServer(const GrpcServer&) = delete;
  GrpcServer& operator=(const GrpcServer&) = delete;

  int port() const;
  // What grpc.health.v1 tells, for "" and "moed.v1.Inference".
  void set_serving(bool serving);
  // Lets calls that generate end for so long, then takes no new ones and cancels what is left. Idempotent; one thread.
  void shutdown(double grace_seconds);

 private:
  struct State;
  explicit GrpcServer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace moed
