#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "engine/hybrid_engine.h"
#include "kernels/traced_device.h"
#include "offload/host_pins.h"
#include "plan/profile.h"

namespace moed {

struct DeviceSpec {
  std::string device = "cpu";  // kernels/device.h lists them
  int num_threads = 0;         // compute threads, the serving thread counted; 0: default_compute_threads()
  bool deterministic = false;
  double memory_gib = 0.0;  // of the device's own memory; 0: as the device has
  uint64_t seed = 0;        // of emulated and simulated devices
  std::string router;       // DeviceOptions::router
  bool traced = false;      // so that trace() is there; costs a little
};

// An engine together with the device that it runs on: what stands above engines knows no device. Serving thread, once
// started.
class OpenedEngine {
 public:
  // The device alone, before weights are loaded in vain. Errors: kInvalidArgument for an unknown device.
  static StatusOr<std::unique_ptr<OpenedEngine>> open(const DeviceSpec& spec);
  ~OpenedEngine();
  // Once. Errors: as make_engine. model, weights and experts outlive it.
  Status start(const Model& model, const DenseWeights& weights, const ExpertStore& experts, const EngineConfig& config);
  // For ExpertStore::load() and RingConfig, so that experts are pinned while others are read. The store outlives this.
  HostPins& pins() { return pins_; }
  // REQUIRES: started.
  Engine& engine() { return *engine_; }
  // What the device may give out of memory of its own; 0: it has none.
  int64_t device_memory_bytes() const;
  // Device::memory_is_host().
  bool device_memory_is_host() const { return device_->memory_is_host(); }
  // "cpu: AMD EPYC, avx512_bf16, 2 threads"
  std::string_view description() const;
  // On the clock that the device's work is measured by.
  double now_us() const { return device_->now_us(); }
  std::optional<DeviceTotals> totals() const { return device_->totals(); }
  // A simulated machine: its device computes nothing and has a clock of its own, for benchmarks and plans.
  bool is_simulated() const { return device_->machine() != nullptr; }
  // REQUIRES: is_simulated().
  int64_t host_memory_bytes() const;
  MachineProfile profile() const;
  // Null unless DeviceSpec::traced.
  DeviceTrace* trace() { return trace_; }

 private:
  explicit OpenedEngine(std::unique_ptr<Device> device);
  std::unique_ptr<Device> device_;
  DeviceTrace* trace_ = nullptr;  // of device_
  HostPins pins_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace moed
