#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
#include "model/config.h"

namespace moed {

// Host memory that this process may still take: min(MemAvailable, cgroup headroom). Read by server/, judged here.
struct MachineMemory {
  int64_t host_free_bytes = 0;
  std::string source;  // "MemAvailable" or "cgroup memory.max"
};

struct BudgetLimits {
  double kv_gib = 0.0;  // 0: what is left after everything else, minus a reserve, at most what 16 full contexts need
  int32_t max_model_len = 0;  // 0: min(config, what KV holds)
  int32_t pass_rows_max = 0;
  int32_t sequences_max = 0;
  int32_t block_tokens = 16;
};

// What start-up will take, in bytes. The same numbers serve start-up, /info and `moed plan`.
struct MemoryBudget {
  int64_t dense_weight_bytes = 0;   // attention, norms, routers, dense and shared FFNs, embeddings, head
  int64_t expert_weight_bytes = 0;  // routed experts: blobs of the host store
  int64_t kv_bytes = 0;
  int64_t activation_bytes = 0;  // of two passes alive
  int64_t process_bytes = 0;     // base of the process: code, tokenizer, I/O
  int64_t free_bytes = 0;
  std::string free_source;  // MachineMemory::source
  int64_t kv_blocks = 0;
  int32_t max_model_len = 0;
  int64_t total_bytes() const {
    return dense_weight_bytes + expert_weight_bytes + kv_bytes + activation_bytes + process_bytes;
  }
  // "need 38.2 GiB: weights 30.1, KV 6.0, activations 1.1, process 1.0; free 37.4 (MemAvailable)"
  std::string describe() const;
};

// Pure. Errors: kResourceExhausted with the arithmetic when the box is too small; kInvalidArgument naming the setting
// when limits contradict each other (kv_gib below one context of max_model_len, max_model_len above the model's).
StatusOr<MemoryBudget> memory_budget(const ModelConfig& config, const BudgetLimits& limits,
                                     const MachineMemory& machine);

int64_t dense_weight_bytes(const ModelConfig& config);
int64_t expert_weight_bytes(const ModelConfig& config);

}  // namespace moed
