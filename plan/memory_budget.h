#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
#include "model/config.h"
#include "plan/device_budget.h"
#include "plan/kv_placement.h"

namespace moed {

// Memory that this process may still take: of the host, min(MemAvailable, cgroup headroom); of the device. Read by
// server/, judged here.
struct MachineMemory {
  int64_t host_free_bytes = 0;
  std::string source;           // "MemAvailable", "cgroup memory.max", or the setting that says
  int64_t device_bytes = 0;     // 0: the device has no memory of its own
  bool device_is_host = false;  // what the device takes is taken of the host's: an emulated device
};

struct BudgetLimits {
  double kv_gib = 0.0;  // 0: what is left after everything else, minus a reserve, at most what 16 full contexts need
  int32_t max_model_len = 0;  // 0: min(config, what KV holds)
  int32_t pass_rows_max = 0;
  int32_t sequences_max = 0;
  int32_t block_tokens = 16;
  KvPlacement kv = KvPlacement::kHost;
  // On a device with memory of its own:
  double device_kv_gib = 0.0;      // of pool kDevice; 0: chosen
  bool experts_on_device = false;  // whether any expert runs there
  bool all_experts_resident = false;
  int32_t num_resident = 0;   // experts that stay in device memory
  int32_t passing_slots = 2;  // slots at least for experts that pass through
  int32_t ring_slots = 0;     // of all experts, resident ones counted; 0: what is left
};

// What start-up will take of the host, in bytes, and of the device. The same numbers serve start-up, /info and `moed
// plan`.
struct MemoryBudget {
  int64_t dense_weight_bytes = 0;   // attention, norms, routers, dense and shared FFNs, embeddings, head
  int64_t expert_weight_bytes = 0;  // routed experts: blobs of the host store
  int64_t kv_bytes = 0;
  int64_t activation_bytes = 0;  // of two passes alive
  int64_t process_bytes = 0;     // base of the process: code, tokenizer, I/O
  int64_t emulated_bytes = 0;    // of a device whose memory is the host's: device.total_bytes()
  int64_t free_bytes = 0;
  std::string free_source;  // MachineMemory::source
  int64_t kv_blocks = 0;    // of pool kHost
  int32_t max_model_len = 0;
  DeviceBudget device;
  int64_t total_bytes() const {
    return dense_weight_bytes + expert_weight_bytes + kv_bytes + activation_bytes + process_bytes + emulated_bytes;
  }
  // Of the host: "need 38.2 GiB: weights 30.1, KV 6.0, activations 1.1, process 1.0; free 37.4 (MemAvailable)".
  // device.describe() says the device's.
  std::string describe() const;
};

// Pure. Errors: kResourceExhausted with the arithmetic when the box or the device is too small; kInvalidArgument naming
// the setting when limits contradict each other (kv_gib below one context of max_model_len, max_model_len above the
// model's, a ring that is larger than the device or smaller than what must be in it).
StatusOr<MemoryBudget> memory_budget(const ModelConfig& config, const BudgetLimits& limits,
                                     const MachineMemory& machine);

int64_t dense_weight_bytes(const ModelConfig& config);
int64_t expert_weight_bytes(const ModelConfig& config);
// Routed experts of all layers.
int64_t num_routed_experts(const ModelConfig& config);

}  // namespace moed
