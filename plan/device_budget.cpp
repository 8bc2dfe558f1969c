#include "plan/device_budget.h"

#include <algorithm>
#include <cstdio>

namespace moed {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kGiB = int64_t{1} << 30;
// Pages, alignment, workspaces: a share of the memory, of which big devices need no more than so much.
constexpr int64_t kRoundingShare = 64;
constexpr int64_t kRoundingBytesMax = 256 * kMiB;
// What KV and staging may take, by default, of what experts want as well.
constexpr int64_t kKvShare = 4;
constexpr int64_t kStagingShare = 8;
constexpr int64_t kStagingContexts = 2;
// Beyond any device, but safe to multiply.
constexpr double kKvGibMax = 1e6;

Status too_small(const DeviceBudget& budget, const std::string& what) {
  return Status(
      StatusCode::kResourceExhausted,
      "device memory is too small for " + what + ": " + budget.describe() + " (device.device_memory_gib caps it)",
      "device.device_memory_gib");
}

// Slots without which the experts that the demand names have no place.
int64_t slots_min(const DeviceDemand& demand) {
  if (demand.all_resident) return demand.num_experts;
  return std::min(demand.num_experts, demand.num_resident + demand.passing_slots);
}

Status check_ring(const DeviceDemand& demand, const DeviceBudget& budget) {
  const auto refused = [&](const std::string& why) {
    return invalid_argument("placement.ring_slots is " + std::to_string(demand.ring_slots) + ", but " + why,
                            "placement.ring_slots");
  };
  if (demand.ring_slots < 0) return refused("must not be negative");
  if (demand.ring_slots > demand.num_experts) {
    return refused("the model has " + std::to_string(demand.num_experts) + " experts to fill them");
  }
  if (demand.ring_slots < slots_min(demand)) {
    return refused(std::to_string(demand.num_resident) + " resident experts and " +
                   std::to_string(slots_min(demand) - demand.num_resident) + " that pass through need " +
                   std::to_string(slots_min(demand)));
  }
  if (budget.total_bytes() > budget.memory_bytes) {
    return refused("so large a ring does not fit the device: " + budget.describe());
  }
  return Status();
}

void set_slots(int64_t num_slots, const DeviceDemand& demand, DeviceBudget& budget) {
  budget.num_slots = num_slots;
  budget.slot_bytes = num_slots * demand.expert_bytes;
}

void set_kv(int64_t num_blocks, const DeviceDemand& demand, DeviceBudget& budget) {
  budget.kv_blocks = num_blocks;
  budget.kv_bytes = num_blocks * demand.block_bytes;
}

// With the slots that must be there counted already.
Status give_kv(const DeviceDemand& demand, bool slots_grow, DeviceBudget& budget) {
  if (demand.kv == KvPlacement::kHost) return Status();
  const int64_t needed = demand.kv == KvPlacement::kDevice ? demand.useful_blocks : 1;
  if (demand.kv_gib > 0.0) {
    const double bytes = std::min(demand.kv_gib, kKvGibMax) * static_cast<double>(kGiB);
    set_kv(static_cast<int64_t>(bytes) / demand.block_bytes, demand, budget);
    if (budget.kv_blocks >= needed) return Status();
    return invalid_argument("memory.device_kv_gib is " + std::to_string(demand.kv_gib) + ", which holds " +
                                std::to_string(budget.kv_blocks) + " blocks; one context of use needs " +
                                std::to_string(needed) + ", " + bytes_text(needed * demand.block_bytes),
                            "memory.device_kv_gib");
  }
  const int64_t left = std::max<int64_t>(0, budget.memory_bytes - budget.total_bytes());
  const int64_t share = std::max(left / (slots_grow ? kKvShare : 1), std::min(left, needed * demand.block_bytes));
  set_kv(std::clamp(share / demand.block_bytes, needed, std::max(needed, demand.contexts_max * demand.context_blocks)),
         demand, budget);
  return Status();
}

void give_staging(const DeviceDemand& demand, DeviceBudget& budget) {
  if (demand.kv == KvPlacement::kDevice) return;
  const int64_t left = std::max<int64_t>(0, budget.memory_bytes - budget.total_bytes());
  budget.staging_blocks =
      std::min(kStagingContexts * demand.context_blocks, left / kStagingShare / demand.staging_block_bytes);
  budget.staging_bytes = budget.staging_blocks * demand.staging_block_bytes;
}

}  // namespace

std::string bytes_text(int64_t bytes) {
  char text[32];
  const bool large = bytes >= kGiB;
  std::snprintf(text, sizeof(text), "%.1f %s", static_cast<double>(bytes) / static_cast<double>(large ? kGiB : kMiB),
                large ? "GiB" : "MiB");
  return text;
}

std::string DeviceBudget::describe() const {
  return "need " + bytes_text(total_bytes()) + ": dense weights " + bytes_text(dense_weight_bytes) + ", activations " +
         bytes_text(activation_bytes) + ", KV " + bytes_text(kv_bytes) + " (" + std::to_string(kv_blocks) +
         " blocks), staging " + bytes_text(staging_bytes) + ", " + std::to_string(num_slots) + " expert slots " +
         bytes_text(slot_bytes) + ", rounding " + bytes_text(rounding_bytes) + "; the device has " +
         bytes_text(memory_bytes);
}

StatusOr<DeviceBudget> device_budget(const DeviceDemand& demand, int64_t memory_bytes) {
  DeviceBudget budget{.memory_bytes = memory_bytes,
                      .dense_weight_bytes = demand.dense_weight_bytes,
                      .activation_bytes = demand.activation_bytes,
                      .rounding_bytes = std::min(memory_bytes / kRoundingShare, kRoundingBytesMax)};
  set_slots(std::min<int64_t>(1, demand.num_experts), demand, budget);
  if (budget.total_bytes() > budget.memory_bytes) {
    return too_small(budget, demand.num_experts > 0 ? "the dense weights and one expert" : "the dense weights");
  }

  set_slots(demand.ring_slots != 0 ? demand.ring_slots : slots_min(demand), demand, budget);
  if (demand.ring_slots != 0) MOED_RETURN_IF_ERROR(check_ring(demand, budget));
  if (budget.total_bytes() > budget.memory_bytes) {
    return too_small(budget, demand.all_resident
                                 ? "all experts, as placement.policy device has it"
                                 : std::to_string(demand.num_resident) +
                                       " resident experts (placement.resident_experts) and " +
                                       std::to_string(budget.num_slots - demand.num_resident) + " that pass through");
  }
  const bool slots_grow = demand.ring_slots == 0 && budget.num_slots < demand.num_experts;
  MOED_RETURN_IF_ERROR(give_kv(demand, slots_grow, budget));
  if (budget.total_bytes() > budget.memory_bytes) {
    return too_small(budget, demand.kv_gib > 0.0 ? "a KV cache of memory.device_kv_gib" : "the KV of one context");
  }
  give_staging(demand, budget);
  if (slots_grow) {
    const int64_t more = (budget.memory_bytes - budget.total_bytes()) / demand.expert_bytes;
    set_slots(std::min(demand.num_experts, budget.num_slots + more), demand, budget);
  }
  return budget;
}

}  // namespace moed
