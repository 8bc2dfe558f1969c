#pragma once

#include <memory>
#include <string>

#include "engine/hybrid_engine.h"

namespace moed {

struct DeviceSpec {
  std::string device = "cpu";  // kernels/device.h lists them
  int num_threads = 0;         // compute threads, the serving thread counted; 0: default_compute_threads()
  bool deterministic = false;
  double memory_gib = 0.0;  // of the device's own memory; 0: as the device has
};

// An engine together with the device that it runs on: what stands above engines knows no device. Serving thread, once
// opened.
class OpenedEngine {
 public:
  // Errors: kInvalidArgument for an unknown device, kResourceExhausted as make_engine. model, weights and experts
  // outlive it.
  static StatusOr<std::unique_ptr<OpenedEngine>> open(const Model& model, const DenseWeights& weights,
                                                      const ExpertStore& experts, const DeviceSpec& spec,
                                                      const EngineConfig& config);
  ~OpenedEngine();
  Engine& engine() { return *engine_; }
  // "cpu: AMD EPYC, avx512_bf16, 2 threads"
  std::string_view description() const;

 private:
  explicit OpenedEngine(std::unique_ptr<Device> device);
  std::unique_ptr<Device> device_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace moed
