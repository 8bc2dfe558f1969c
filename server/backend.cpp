#include "server/backend.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>
#include <utility>

#include "base/cgroup.h"
#include "base/log.h"
#include "base/thread_pool.h"
#include "engine/open_engine.h"
#include "model/tensor_source.h"
#include "model/weights.h"
#include "offload/expert_store.h"
#include "server/scheduling.h"

namespace moed {
namespace {

// A plain box, until the machine is measured: the tracker corrects these within a few passes.
constexpr double kPriorBytesPerUs = 10'000.0;
constexpr double kPriorFlopsPerUsPerThread = 100'000.0;
constexpr uint64_t kDummySeed = 1;
// Slots of device memory for experts that pass through: one is read while the next fills.
constexpr int32_t kSlotsPerHalf = 2;

class LoadedBackend final : public Backend {
 public:
  LoadedBackend(std::unique_ptr<OpenedEngine> opened, DenseWeights weights, ExpertStore experts, MemoryBudget budget,
                StepModel prior, Planning planning)
      : weights_(std::move(weights)),
        experts_(std::move(experts)),
        budget_(std::move(budget)),
        prior_(prior),
        planning_(std::move(planning)),
        opened_(std::move(opened)) {}

  Status start(const Model& model, const EngineConfig& config) {
    return opened_->start(model, weights_, experts_, config);
  }
  Engine& engine() override { return opened_->engine(); }
  const MemoryBudget& budget() const override { return budget_; }
  StepModel prior() const override { return prior_; }
  Planning planning() const override { return planning_; }
  std::string device_description() const override { return std::string(opened_->description()); }
  std::optional<ExpertPins> pins() const override {
    if (budget_.device.num_slots == 0) return std::nullopt;
    const HostPins& pins = opened_->pins();
    return ExpertPins{experts_.blobs_bytes(), pins.bytes(), pins.refusal().message()};
  }
  OpenedEngine* opened() override { return opened_.get(); }

 private:
  DenseWeights weights_;
  ExpertStore experts_;
  MemoryBudget budget_;
  StepModel prior_;
  Planning planning_;
  std::unique_ptr<OpenedEngine> opened_;
};

int64_t meminfo_bytes(const std::string& key) {
  std::ifstream file("/proc/meminfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind(key + ":", 0) != 0) continue;
    int64_t kib = 0;
    std::istringstream(line.substr(key.size() + 1)) >> kib;
    return kib * 1024;
  }
  return std::numeric_limits<int64_t>::max();
}

StatusOr<std::unique_ptr<TensorSource>> open_source(const Settings& settings, const Model& model, bool simulated) {
  if (simulated) return hollow_weights(model);
  if (settings.model.load_format == "dummy") return dummy_weights(model, kDummySeed);
  MOED_ASSIGN_OR_RETURN(auto source, open_checkpoint(settings.model.path));
  MOED_ASSIGN_OR_RETURN(const int64_t unused, check_tensors(model, *source));
  if (unused > 0) spdlog::warn("{}: {} tensors are not used", settings.model.path, unused);
  if (source->rounds()) spdlog::warn("{}: weights wider than bf16 are rounded to bf16", settings.model.path);
  return source;
}

PlacementRequest placement_request(const Settings& settings) {
  const Settings::Placement& placement = settings.placement;
  return {.policy = placement.policy,
          .kv = placement.kv,
          .resident_experts = placement.resident_experts,
          .halves = static_cast<int32_t>(placement.halves),
          .ring_slots = static_cast<int32_t>(placement.ring_slots)};
}

BudgetLimits budget_limits(const Settings& settings, const Placement& placement) {
  return {.kv_gib = settings.memory.kv_gib,
          .max_model_len = static_cast<int32_t>(settings.model.max_model_len),
          .pass_rows_max = static_cast<int32_t>(settings.scheduler.pass_rows_max),
          .sequences_max = static_cast<int32_t>(settings.scheduler.sequences_max),
          .block_tokens = kKvBlockTokens,
          .kv = placement.kv,
          .device_kv_gib = settings.memory.device_kv_gib,
          .experts_on_device = placement.policy->uses_device,
          .all_experts_resident = placement.policy->all_resident,
          .num_resident = static_cast<int32_t>(placement.resident.size()),
          .passing_slots = kSlotsPerHalf * placement.halves,
          .ring_slots = placement.ring_slots};
}

EngineConfig engine_config(const BudgetLimits& limits, const MemoryBudget& budget, const Planning& planning,
                           bool cache) {
  EngineConfig config;
  config.rows_max = limits.pass_rows_max;
  config.sequences_max = limits.sequences_max;
  config.max_model_len = budget.max_model_len;
  // The engine has a host pool even where nothing is to lie in it.
  config.kv_blocks = std::max<int64_t>(budget.kv_blocks, 1);
  config.block_tokens = kKvBlockTokens;
  config.device_kv_blocks = budget.device.kv_blocks;
  config.staging_blocks = budget.device.staging_blocks;
  config.ring.num_slots = static_cast<int32_t>(budget.device.num_slots);
  config.ring.resident = planning.residency.resident;
  config.ring.staging_slots = std::min(limits.passing_slots, config.ring.num_slots);
  config.ring.cache = planning.policy->cache && cache;
  config.ring.packet_bytes = packet_bytes(planning.rates);
  return config;
}

}  // namespace

std::string ExpertPins::warning() const {
  if (refusal.empty()) return "";
  return fmt::format(
      "{:.2f} of {:.2f} GiB of experts are not pinned, so that a thread copies them to buffers first, which is slower: "
      "{}",
      static_cast<double>(expert_bytes - pinned_bytes) / (1 << 30), static_cast<double>(expert_bytes) / (1 << 30),
      refusal);
}

MachineMemory machine_memory(double host_memory_gib) {
  if (host_memory_gib > 0.0) {
    return {.host_free_bytes = std::llround(host_memory_gib * (1 << 30)), .source = "memory.host_memory_gib"};
  }
  MachineMemory memory{.host_free_bytes = meminfo_bytes("MemAvailable"), .source = "MemAvailable"};
  const int64_t headroom = cgroup_limits().memory_headroom_bytes;
  if (headroom < memory.host_free_bytes) memory = {.host_free_bytes = headroom, .source = "cgroup memory.max"};
  return memory;
}

namespace {

DeviceSpec device_spec(const Settings& settings) {
  DeviceSpec spec;
  spec.device = settings.device.device;
  spec.num_threads = static_cast<int>(settings.device.threads);
  spec.deterministic = settings.device.deterministic;
  spec.memory_gib = settings.device.device_memory_gib;
  return spec;
}

// A cap above what is there caps nothing; who set it may have thought of another device.
void warn_of_memory(const Settings& settings, const OpenedEngine& opened) {
  const double asked_gib = settings.device.device_memory_gib;
  const double there_gib = static_cast<double>(opened.device_memory_bytes()) / (1 << 30);
  // Devices round to bytes.
  if (asked_gib <= there_gib + 1e-6) return;
  spdlog::warn("device.device_memory_gib is {}; the device has {:.2f} GiB to give", asked_gib, there_gib);
}

StatusOr<std::unique_ptr<Backend>> load_on(std::unique_ptr<OpenedEngine> opened, const Settings& settings,
                                           const Model& model, const LoadProgress& progress, bool cache) {
  MOED_ASSIGN_OR_RETURN(const auto source, open_source(settings, model, opened->is_simulated()));
  spdlog::info("device: {}", opened->description());
  warn_of_memory(settings, *opened);

  const bool has_device = opened->device_memory_bytes() > 0;
  MOED_ASSIGN_OR_RETURN(const Placement placement,
                        resolve_placement(placement_request(settings), model.config, has_device));
  MachineMemory machine = machine_memory(settings.memory.host_memory_gib);
  machine.device_bytes = opened->device_memory_bytes();
  machine.device_is_host = opened->device_memory_is_host();
  if (opened->is_simulated()) {
    machine.host_free_bytes = opened->host_memory_bytes();
    machine.source = "simulated";
  }
  const BudgetLimits limits = budget_limits(settings, placement);
  MOED_ASSIGN_OR_RETURN(MemoryBudget budget, memory_budget(model.config, limits, machine));
  spdlog::info("memory: {}", budget.describe());
  Planning planning = make_planning(placement, model.config, has_device, budget.device.num_slots);
  const int threads =
      settings.device.threads > 0 ? static_cast<int>(settings.device.threads) : default_compute_threads();
  planning.rates.host_bytes = kPriorBytesPerUs;
  planning.rates.host_flops = kPriorFlopsPerUsPerThread * threads;
  if (opened->is_simulated()) planning.rates = machine_rates(opened->profile());
  if (has_device) {
    spdlog::info("device memory: {}", budget.device.describe());
    spdlog::info("placement: policy {}, KV {}, {} of {} experts resident", planning.policy->name, name_of(planning.kv),
                 planning.residency.resident.size(), num_routed_experts(model.config));
  }

  const int64_t total = budget.dense_weight_bytes + budget.expert_weight_bytes;
  int64_t loaded = 0;
  const auto advance = [&](int64_t bytes) {
    loaded += bytes;
    progress(std::min(loaded, total), total);
  };
  MOED_ASSIGN_OR_RETURN(DenseWeights weights, DenseWeights::load(model, *source, advance));
  EngineConfig config = engine_config(limits, budget, planning, cache);
  HostPins* const pins = config.ring.num_slots > 0 ? &opened->pins() : nullptr;
  config.ring.pins = pins;
  MOED_ASSIGN_OR_RETURN(ExpertStore experts, ExpertStore::load(model, *source, advance, pins));
  const StepModel prior = prior_step_model(model.config, planning);
  auto backend = std::make_unique<LoadedBackend>(std::move(opened), std::move(weights), std::move(experts),
                                                 std::move(budget), prior, std::move(planning));
  MOED_RETURN_IF_ERROR(backend->start(model, config));
  const std::optional<ExpertPins> pinned = backend->pins();
  if (pinned.has_value() && !pinned->warning().empty()) spdlog::warn("{}", pinned->warning());
  return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace

StatusOr<std::unique_ptr<Backend>> load_backend(const Settings& settings, const Model& model,
                                                const LoadProgress& progress) {
  MOED_ASSIGN_OR_RETURN(auto opened, OpenedEngine::open(device_spec(settings)));
  return load_on(std::move(opened), settings, model, progress, /*cache=*/true);
}

StatusOr<std::unique_ptr<Backend>> load_bench_backend(const Settings& settings, const Model& model,
                                                      const BenchDevice& bench) {
  DeviceSpec spec = device_spec(settings);
  spec.seed = bench.seed;
  spec.router = bench.router;
  spec.traced = bench.traced;
  MOED_ASSIGN_OR_RETURN(auto opened, OpenedEngine::open(spec));
  return load_on(
      std::move(opened), settings, model, [](int64_t, int64_t) {}, bench.cache);
}

}  // namespace moed
