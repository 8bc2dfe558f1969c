#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "base/status.h"
#include "engine/engine.h"
#include "model/architectures.h"
#include "plan/memory_budget.h"
#include "plan/policies.h"
#include "plan/step_model.h"
#include "server/settings.h"

namespace moed {

class OpenedEngine;

// Experts in host memory, and how many of their bytes the device copies from where they lie.
struct ExpertPins {
  int64_t expert_bytes = 0;
  int64_t pinned_bytes = 0;
  std::string refusal;  // of the first piece that could not be pinned; empty: none was refused

  bool all_pinned() const { return refusal.empty() && pinned_bytes >= expert_bytes; }
  // One line for the log; empty where nothing was refused.
  std::string warning() const;
};

// What runs passes, with all that it needs to stay alive.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual Engine& engine() = 0;
  virtual const MemoryBudget& budget() const = 0;
  virtual StepModel prior() const = 0;
  // How passes are to be planned; by default as on a box without a device.
  virtual Planning planning() const { return {}; }
  virtual std::string device_description() const = 0;
  // Empty where no expert is copied to a device.
  virtual std::optional<ExpertPins> pins() const { return std::nullopt; }
  // The engine with its device; null where there is none.
  virtual OpenedEngine* opened() { return nullptr; }
};

// Bytes that arrived and bytes that will; called now and then from the loading thread.
using LoadProgress = std::function<void(int64_t loaded_bytes, int64_t total_bytes)>;
using BackendFactory =
    std::function<StatusOr<std::unique_ptr<Backend>>(const Settings&, const Model&, const LoadProgress&)>;

// The real one: checks the checkpoint, opens the device, takes the memory that memory_budget() allows, loads the
// weights. Errors are one line with the arithmetic or the tensor at fault.
StatusOr<std::unique_ptr<Backend>> load_backend(const Settings& settings, const Model& model,
                                                const LoadProgress& progress);

// What benchmarks want beyond settings.
struct BenchDevice {
  uint64_t seed = 0;   // of emulated and simulated devices
  std::string router;  // of simulated ones
  bool traced = false;
  bool cache = true;  // false: no expert stays in device memory but those that always do
};
// The same for a benchmark, which may run on a simulated device: its weights are addresses alone, and its host memory
// is the simulated machine's.
StatusOr<std::unique_ptr<Backend>> load_bench_backend(const Settings& settings, const Model& model,
                                                      const BenchDevice& bench);

// Host memory that this process may still take: min(MemAvailable, cgroup headroom), or host_memory_gib where above 0.
MachineMemory machine_memory(double host_memory_gib);

}  // namespace moed
