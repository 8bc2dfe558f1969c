#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
#include "plan/kv_placement.h"

namespace moed {

// What a device with memory of its own is asked to hold.
struct DeviceDemand {
  int64_t dense_weight_bytes = 0;  // all of them, or start-up is refused
  int64_t activation_bytes = 0;
  int64_t block_bytes = 0;          // of KV, all layers
  int64_t staging_block_bytes = 0;  // of KV, one layer
  int64_t context_blocks = 0;       // that the longest sequence takes
  int64_t useful_blocks = 0;        // a KV pool of fewer, where it is the only one, serves nobody
  int64_t contexts_max = 0;         // that KV is worth holding
  KvPlacement kv = KvPlacement::kHost;
  double kv_gib = 0.0;        // of pool kDevice; 0: chosen
  int64_t expert_bytes = 0;   // of one
  int64_t num_experts = 0;    // of all layers; 0: none runs on the device
  bool all_resident = false;  // all experts, or start-up is refused
  int64_t num_resident = 0;   // experts that stay
  int64_t passing_slots = 0;  // slots for those that pass through, at least
  int64_t ring_slots = 0;     // 0: chosen
};

// What it will hold, in bytes and in pieces.
struct DeviceBudget {
  int64_t memory_bytes = 0;  // 0: the device has no memory of its own, and nothing is there
  int64_t dense_weight_bytes = 0;
  int64_t activation_bytes = 0;
  int64_t kv_bytes = 0;
  int64_t staging_bytes = 0;   // one layer's KV of prompts whose pool is the host's, while the layer runs
  int64_t slot_bytes = 0;      // of all slots for experts
  int64_t rounding_bytes = 0;  // left to what allocations are rounded up to
  int64_t kv_blocks = 0;
  int64_t staging_blocks = 0;
  int64_t num_slots = 0;
  int64_t total_bytes() const {
    return dense_weight_bytes + activation_bytes + kv_bytes + staging_bytes + slot_bytes + rounding_bytes;
  }
  // "need 22.0 GiB: dense weights 3.0 GiB, activations 310.2 MiB, KV 1.0 GiB (512 blocks), staging 64.0 MiB, 812 expert
  // slots 17.2 GiB, rounding 384.0 MiB; the device has 24.0 GiB"
  std::string describe() const;
};

// Pure. memory_bytes: what the device may give out. Dense weights and activations come first, then the experts that
// must be there, KV, staging (at most one context and an eighth of what is left); other experts get the rest. KV by
// default: as many contexts as are of use, and, where experts want memory too, at most a quarter of what is left.
// Errors with the arithmetic: kResourceExhausted where the device is too small, kInvalidArgument where a setting
// contradicts it.
StatusOr<DeviceBudget> device_budget(const DeviceDemand& demand, int64_t memory_bytes);

// "17.2 GiB", "310.2 MiB"
std::string bytes_text(int64_t bytes);

}  // namespace moed
