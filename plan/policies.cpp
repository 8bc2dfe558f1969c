#include "plan/policies.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>

#include "plan/memory_budget.h"

namespace moed {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kBytesPerWeight = 2.0;  // bf16
constexpr double kMatrices = 3.0;        // gate, up, down
// A prefetch pays when more of what it brings is used than not.
constexpr double kPrefetchShareMin = 0.5;
// A layer comes whole when so nearly all of its experts will be asked for and streamed that waiting for the router's
// answer saves next to nothing.
constexpr double kWantedShareMin = 0.99;
constexpr double kStreamedShareMin = 0.9;
// Few experts of a layer have more rows than so many times the average.
constexpr double kManyRows = 4.0;

StepPlan empty_plan(const PolicyInput& input, LayerMode mode) {
  StepPlan plan;
  plan.split = balanced_split(input.attended_tokens, input.halves);
  plan.layers.assign(input.config.num_layers, mode);
  plan.costs = expert_costs(input.config, input.rates);
  return plan;
}

std::vector<ExpertId> absent_experts(const PolicyInput& input) {
  std::vector<ExpertId> absent;
  const std::vector<ExpertId>& resident = input.residency.resident;
  const int32_t num_experts = input.config.moe.num_experts;
  absent.reserve(static_cast<size_t>(input.config.num_layers) * num_experts - resident.size());
  auto next = resident.begin();
  for (int32_t layer = 0; layer < input.config.num_layers; ++layer) {
    if (input.config.layers[layer] != LayerKind::kMoe) continue;
    for (int32_t expert = 0; expert < num_experts; ++expert) {
      if (next != resident.end() && *next == ExpertId{layer, expert}) {
        ++next;
      } else {
        absent.push_back({layer, expert});
      }
    }
  }
  return absent;
}

bool all_resident(const PolicyInput& input) {
  return static_cast<int64_t>(input.residency.resident.size()) == num_routed_experts(input.config);
}

// The host multiplies while it reads: an expert takes the longer of both. Costs are a line: through what an expert with
// so many rows takes and what one with kManyRows times as many does, which is where most lie.
void fit_host_costs(double rows, ExpertCosts* costs) {
  const auto host_us = [&](double count) { return std::max(costs->host_base_us, count * costs->host_row_us); };
  const double row_us = (host_us(kManyRows * rows) - host_us(rows)) / ((kManyRows - 1.0) * rows);
  const double base_us = std::max(host_us(rows) - rows * row_us, 0.0);
  costs->host_base_us = base_us;
  costs->host_row_us = row_us;
}

StepPlan plan_host(const PolicyInput& input) {
  StepPlan plan = empty_plan(input, LayerMode::kRouted);
  plan.costs.copy_us = plan.costs.device_row_us = kInfinity;
  return plan;
}

// Also what a device without room for all would be given: then it streams.
StepPlan plan_device(const PolicyInput& input) {
  StepPlan plan = empty_plan(input, LayerMode::kWhole);
  plan.costs.host_base_us = plan.costs.host_row_us = kInfinity;
  return plan;
}

// MoE-Lens: every expert of every layer comes through the ring, in order.
StepPlan plan_stream(const PolicyInput& input) {
  StepPlan plan = plan_device(input);
  plan.prefetch = absent_experts(input);
  return plan;
}

// Costs decide at each layer, with the router's answer. Before it, as if rows chose independently and evenly: the share
// of a layer's experts that some row will ask for, and the share of those that host and link, ending together, stream.
StepPlan plan_hot(const PolicyInput& input) {
  if (input.residency.num_slots == 0) return plan_host(input);
  if (all_resident(input)) return plan_device(input);
  StepPlan plan = empty_plan(input, LayerMode::kRouted);
  const double row_share = static_cast<double>(input.config.moe.router.top_k) / input.config.moe.num_experts;
  const double wanted_share = 1.0 - std::pow(1.0 - row_share, input.shape.num_rows);
  const double rows = std::max(1.0, input.shape.num_rows * row_share);
  fit_host_costs(rows, &plan.costs);
  const double host_us = plan.costs.host_base_us + rows * plan.costs.host_row_us;
  const double streamed_share = host_us / (host_us + plan.costs.copy_us);
  if (wanted_share >= kWantedShareMin && streamed_share >= kStreamedShareMin) {
    std::fill(plan.layers.begin(), plan.layers.end(), LayerMode::kWhole);
  }
  if (wanted_share * streamed_share >= kPrefetchShareMin) plan.prefetch = absent_experts(input);
  return plan;
}

constexpr Policy kPolicies[] = {
    {"host", "all experts on the CPU, where their weights are", &plan_host, false, false, false, false},
    {"device", "all experts in device memory", &plan_device, true, true, true, false},
    {"stream", "every layer's experts come through the ring in order, for many rows a pass", &plan_stream, true, false,
     false, true},
    {"hot", "the experts most asked for stay in device memory; others are copied or run on the CPU, as costs say",
     &plan_hot, true, false, true, false},
};

constexpr KvPlacement kKvPlacements[] = {KvPlacement::kHost, KvPlacement::kDevice, KvPlacement::kSplit};

StatusOr<const Policy*> find_policy(const std::string& name, bool has_device) {
  const std::string_view wanted = name != "auto" ? std::string_view(name) : has_device ? "hot" : "host";
  std::string known = "auto";
  for (const Policy& policy : kPolicies) {
    known += ", " + std::string(policy.name);
    if (policy.name != wanted) continue;
    if (!policy.uses_device || has_device) return &policy;
    return invalid_argument(
        "placement.policy is " + name + ", but device.device has no memory of its own for experts: use auto or host",
        "placement.policy");
  }
  return invalid_argument("placement.policy is \"" + name + "\", but must be one of " + known, "placement.policy");
}

StatusOr<KvPlacement> find_kv_placement(const std::string& name, const Policy& policy, bool has_device) {
  if (name == "auto") return policy.all_resident ? KvPlacement::kDevice : KvPlacement::kHost;
  for (const KvPlacement place : kKvPlacements) {
    if (name_of(place) != name) continue;
    if (place == KvPlacement::kHost || has_device) return place;
    return invalid_argument(
        "placement.kv is " + name + ", but device.device has no memory of its own: use auto or host", "placement.kv");
  }
  return invalid_argument("placement.kv is \"" + name + "\", but must be auto, host, device or split", "placement.kv");
}

Status resident_error(const std::string& what) {
  return invalid_argument("placement.resident_experts " + what, "placement.resident_experts");
}

// Digits alone, small enough to count with.
std::optional<int32_t> parse_count(std::string_view text) {
  int32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  return value;
}

std::vector<std::string> split_commas(std::span<const std::string> texts) {
  std::vector<std::string> items;
  for (const std::string& text : texts) {
    for (size_t begin = 0; begin <= text.size();) {
      const size_t end = std::min(text.find(',', begin), text.size());
      items.push_back(text.substr(begin, end - begin));
      begin = end + 1;
    }
  }
  return items;
}

StatusOr<std::vector<ExpertId>> first_of_each_layer(int32_t count, const ModelConfig& config) {
  if (count > config.moe.num_experts) {
    return resident_error("is " + std::to_string(count) + ", but the model has " +
                          std::to_string(config.moe.num_experts) + " experts a layer");
  }
  std::vector<ExpertId> resident;
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    if (config.layers[layer] != LayerKind::kMoe) continue;
    for (int32_t expert = 0; expert < count; ++expert) resident.push_back({layer, expert});
  }
  return resident;
}

// "3:7" or "3:0-7".
Status append_experts(const std::string& item, const ModelConfig& config, std::vector<ExpertId>& resident) {
  const size_t colon = item.find(':');
  const std::string range = colon == std::string::npos ? "" : item.substr(colon + 1);
  const size_t dash = range.find('-');
  const auto layer = parse_count(item.substr(0, colon));
  const auto first = parse_count(range.substr(0, dash));
  const auto last = dash == std::string::npos ? first : parse_count(range.substr(dash + 1));
  if (colon == std::string::npos || !layer || !first || !last || *last < *first) {
    return resident_error("holds \"" + item + "\", but an element must be layer:expert or layer:first-last");
  }
  if (*layer >= config.num_layers) {
    return resident_error("holds \"" + item + "\", but the model's layers are 0 to " +
                          std::to_string(config.num_layers - 1));
  }
  if (config.layers[*layer] != LayerKind::kMoe) {
    return resident_error("holds \"" + item + "\", but layer " + std::to_string(*layer) + " has no experts");
  }
  if (*last >= config.moe.num_experts) {
    return resident_error("holds \"" + item + "\", but the experts of a layer are 0 to " +
                          std::to_string(config.moe.num_experts - 1));
  }
  for (int32_t expert = *first; expert <= *last; ++expert) resident.push_back({*layer, expert});
  return Status();
}

StatusOr<std::vector<ExpertId>> parse_resident(std::span<const std::string> texts, const ModelConfig& config) {
  const std::vector<std::string> items = split_commas(texts);
  if (items.size() == 1) {
    if (const auto count = parse_count(items.front())) return first_of_each_layer(*count, config);
  }
  std::vector<ExpertId> resident;
  for (const std::string& item : items) MOED_RETURN_IF_ERROR(append_experts(item, config, resident));
  std::sort(resident.begin(), resident.end());
  const auto twice = std::adjacent_find(resident.begin(), resident.end());
  if (twice != resident.end()) {
    return resident_error("names layer " + std::to_string(twice->layer) + ", expert " + std::to_string(twice->expert) +
                          " twice");
  }
  return resident;
}

}  // namespace

ExpertCosts expert_costs(const ModelConfig& config, const MachineRates& rates) {
  const double weights = kMatrices * config.moe.intermediate_size * config.hidden_size;
  return {.copy_us = weights * kBytesPerWeight / rates.link_bytes,
          .device_row_us = 2.0 * weights / rates.device_flops,
          .host_base_us = weights * kBytesPerWeight / rates.host_bytes,
          .host_row_us = 2.0 * weights / rates.host_flops};
}

MachineRates machine_rates(const MachineProfile& machine) {
  const double link_bytes = machine.link_bytes * machine.link_left(1.0);
  return {.link_bytes = link_bytes,
          .host_bytes = std::max(machine.host_bytes - link_bytes, machine.host_bytes / 2),
          .host_flops = machine.host_flops,
          .device_flops = machine.device_flops,
          .device_bytes = machine.device_bytes};
}

int64_t packet_bytes(const MachineRates& rates) {
  constexpr double kPacketUs = 300.0;
  constexpr double kBytesMin = 64 << 10, kBytesMax = 4 << 20;
  constexpr int64_t kStepBytes = 256;
  const double bytes = std::clamp(kPacketUs * rates.link_bytes, kBytesMin, kBytesMax);
  return static_cast<int64_t>(bytes) / kStepBytes * kStepBytes;
}

std::span<const Policy> policies() { return kPolicies; }

std::string_view name_of(KvPlacement place) {
  switch (place) {
    case KvPlacement::kHost:
      return "host";
    case KvPlacement::kDevice:
      return "device";
    case KvPlacement::kSplit:
      break;
  }
  return "split";
}

StatusOr<Placement> resolve_placement(const PlacementRequest& request, const ModelConfig& config, bool has_device) {
  Placement placement;
  MOED_ASSIGN_OR_RETURN(placement.policy, find_policy(request.policy, has_device));
  MOED_ASSIGN_OR_RETURN(placement.kv, find_kv_placement(request.kv, *placement.policy, has_device));
  if (request.halves != 1 && request.halves != 2) {
    return invalid_argument("placement.halves is " + std::to_string(request.halves) + ", but must be 1 or 2",
                            "placement.halves");
  }
  placement.halves = request.halves;
  const Policy& policy = *placement.policy;
  if (request.ring_slots != 0 && !policy.uses_device) {
    return invalid_argument("placement.ring_slots is " + std::to_string(request.ring_slots) + ", but under policy " +
                                policy.name + " no expert runs on the device: leave it 0",
                            "placement.ring_slots");
  }
  placement.ring_slots = request.ring_slots;
  if (request.resident_experts.empty()) return placement;
  if (!policy.uses_device) {
    return resident_error("is set, but under policy " + std::string(policy.name) + " no expert runs on the device");
  }
  if (policy.all_resident) {
    return resident_error("is set, but under policy " + std::string(policy.name) + " all experts stay on the device");
  }
  MOED_ASSIGN_OR_RETURN(placement.resident, parse_resident(request.resident_experts, config));
  return placement;
}

Planning make_planning(const Placement& placement, const ModelConfig& config, bool has_device, int64_t num_slots) {
  Planning planning{.policy = placement.policy, .kv = placement.kv, .halves = placement.halves};
  planning.residency.has_device = has_device;
  planning.residency.num_slots = static_cast<int32_t>(num_slots);
  planning.residency.resident = placement.resident;
  if (num_slots > 0 && num_slots >= num_routed_experts(config) && placement.policy->cache) {
    planning.residency.resident = first_of_each_layer(config.moe.num_experts, config).value();
  }
  return planning;
}

double absent_share(const ModelConfig& config, const Planning& planning) {
  const Policy& policy = *planning.policy;
  const int64_t all = num_routed_experts(config);
  if (!policy.uses_device || all == 0) return 1.0;
  const Residency& residency = planning.residency;
  const double kept = policy.cache ? residency.num_slots : static_cast<double>(residency.resident.size());
  return std::max(0.0, 1.0 - kept / static_cast<double>(all));
}

int32_t balanced_split(std::span<const int64_t> attended_tokens, int32_t halves) {
  const auto num_sequences = static_cast<int32_t>(attended_tokens.size());
  if (halves < 2 || num_sequences < 2) return num_sequences;
  int64_t total = 0;
  for (const int64_t tokens : attended_tokens) total += tokens;
  int32_t best = 1;
  int64_t first = 0, nearest = std::numeric_limits<int64_t>::max();
  for (int32_t split = 1; split < num_sequences; ++split) {
    first += attended_tokens[split - 1];
    const int64_t difference = std::abs(total - 2 * first);
    if (difference < nearest) {
      nearest = difference;
      best = split;
    }
  }
  return best;
}

}  // namespace moed
