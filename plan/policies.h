#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "model/config.h"
#include "plan/kv_placement.h"
#include "plan/plan.h"
#include "plan/profile.h"

namespace moed {

// What the machine does in a microsecond, for the costs of policies that weigh places. Placeholders of a plain box
// until the machine is measured: PCIe 4 x16, two channels of DDR4, four cores, a mid-range GPU.
struct MachineRates {
  double link_bytes = 20'000.0;   // host memory to device memory
  double host_bytes = 10'000.0;   // expert weights that the host's kernels read
  double host_flops = 400'000.0;  // of all compute threads
  double device_flops = 50.0e6;
  double device_bytes = 500'000.0;  // weights that the device's kernels read
};

// Of a machine that is known, while link and the host's kernels both run, as they do where a policy weighs one against
// the other: each at the rate that the other leaves it.
MachineRates machine_rates(const MachineProfile& machine);

// Of one copy of the ring, so that what is wanted at once never waits behind it for more than 0.3 ms of the link; a
// multiple of 256. Beyond a few MiB a larger one is no faster.
int64_t packet_bytes(const MachineRates& rates);

// What an expert of this model costs at those rates: a copy is its bytes over the link; on the host its weights are
// read once, and each row is a product; on the device only the rows count, the weights being read far faster than they
// come.
ExpertCosts expert_costs(const ModelConfig& config, const MachineRates& rates);

// All that a policy may look at.
struct PolicyInput {
  const StepShape& shape;
  // Of each sequence, in the pass's order: tokens that its rows attend to. [num_sequences]
  std::span<const int64_t> attended_tokens;
  const ModelConfig& config;
  const Residency& residency;
  const MachineRates& rates;
  int32_t halves = 1;  // at most
};

struct Policy {
  const char* name;
  const char* what;  // for the documentation
  // Every plan passes validate() with the residency it was made for.
  StepPlan (*plan)(const PolicyInput& input);
  bool uses_device;   // experts run on the device, which must have memory of its own
  bool all_resident;  // refused where device memory does not hold all experts
  bool cache;         // experts that came stay until their slots are needed
  bool streams_all;   // every absent expert is copied in every pass, whatever rows choose
};

// A row a policy; "host" first.
std::span<const Policy> policies();

std::string_view name_of(KvPlacement placement);

// [placement] as it is set; settings.h says what each means.
struct PlacementRequest {
  std::string policy = "auto";
  std::string kv = "auto";
  std::vector<std::string> resident_experts;
  int32_t halves = 1;
  int32_t ring_slots = 0;
};

// The same, decided for a model and a device.
struct Placement {
  const Policy* policy = nullptr;
  KvPlacement kv = KvPlacement::kHost;
  int32_t halves = 1;
  int32_t ring_slots = 0;          // 0: what device memory holds
  std::vector<ExpertId> resident;  // ascending; empty also where all_resident
};

// How passes are planned while the daemon runs.
struct Planning {
  const Policy* policy = &policies().front();
  KvPlacement kv = KvPlacement::kHost;
  int32_t halves = 1;
  Residency residency;
  MachineRates rates;
};

// num_slots: what the memory budget granted. Where they hold all experts, all are resident.
Planning make_planning(const Placement& placement, const ModelConfig& config, bool has_device, int64_t num_slots);

// Of the experts that a pass wants, the share that device memory does not have, where the slots hold what helps most.
double absent_share(const ModelConfig& config, const Planning& planning);

// policy "auto": hot where the device has memory of its own, else host. kv "auto": device under the policy of that
// name, else host. resident_experts: one number (the first so many of each layer), or any of "layer:expert" and
// "layer:first-last", separated by commas too. Errors: kInvalidArgument naming the setting, what it says and the limit.
StatusOr<Placement> resolve_placement(const PlacementRequest& request, const ModelConfig& config, bool has_device);

// The index at which the second half begins: both halves' attended tokens are as near as they can be. One sequence, or
// one half: their number. attended_tokens: a sequence each.
int32_t balanced_split(std::span<const int64_t> attended_tokens, int32_t halves);

}  // namespace moed
