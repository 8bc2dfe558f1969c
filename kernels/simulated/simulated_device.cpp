#include "kernels/simulated/simulated_device.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <utility>

#include "base/check.h"
#include "kernels/machine_file.h"
#include "kernels/op_ranges.h"
#include "kernels/simulated/op_costs.h"
#include "kernels/simulated/random.h"
#include "kernels/simulated/router_source.h"
#include "kernels/simulated/simulated_memory.h"
#include "kernels/simulated/timeline.h"

namespace moed {
namespace {

constexpr int64_t kTableBytesMax = 64 << 10;
constexpr double kFlopsPerUsPerTeraflop = 1e6;
constexpr double kFlopsPerUsPerGigaflop = 1e3;
constexpr float kLogit = 100.0F;
constexpr double kTickUs = 100.0;

// The answers of ops, as far as there are any.
class Answers {
 public:
  Answers(RouterSource router, uint64_t seed) : router_(std::move(router)), random_(seed) {}

  void write(const OpCall& call, const SimulatedMemory& memory) {
    if (const auto* route = std::get_if<Route>(&call)) write_experts(*route);
    if (const auto* group = std::get_if<Group>(&call)) write_groups(*group);
    if (const auto* sample = std::get_if<Sample>(&call)) write_tokens(*sample);
    const auto* linear = std::get_if<LinearCall>(&call);
    if (linear != nullptr && !memory.is_device(linear->y.data)) write_logits(linear->y);
  }
  const std::string& router() const { return router_.description(); }

 private:
  void write_experts(const Route& route) {
    const auto [layer, added] = layers_.try_emplace(route.gate.weight, static_cast<int32_t>(layers_.size()));
    for (int32_t row = 0; row < route.experts.rows; ++row) {
      router_.draw(layer->second, route.gate.out, {route.experts.row(row), static_cast<size_t>(route.top_k)});
    }
  }

  void write_groups(const Group& group) {
    const Matrix<const int32_t>& experts = group.experts;
    ends_.assign(group.num_experts + 1, 0);
    for (int32_t row = 0; row < experts.rows; ++row) {
      for (int32_t choice = 0; choice < experts.cols; ++choice) ++ends_[experts.row(row)[choice] + 1];
    }
    for (int32_t expert = 0; expert < group.num_experts; ++expert) ends_[expert + 1] += ends_[expert];
    std::copy(ends_.begin(), ends_.end(), group.offsets);
    for (int32_t row = 0; row < experts.rows; ++row) {
      for (int32_t choice = 0; choice < experts.cols; ++choice) {
        group.pairs[ends_[experts.row(row)[choice]]++] = row * group.choices + choice;
      }
    }
    const int64_t num_pairs = int64_t{experts.rows} * experts.cols;
    if (group.host_offsets != nullptr) std::copy_n(group.offsets, group.num_experts + 1, group.host_offsets);
    if (group.host_pairs != nullptr) std::copy_n(group.pairs, num_pairs, group.host_pairs);
  }

  // Of logits that are all equal, as those that cross to the host are.
  static void write_tokens(const Sample& sample) {
    for (size_t row = 0; row < sample.rows.size(); ++row) {
      const SampleRow& one = sample.rows[row];
      int32_t candidates = sample.logits.cols;
      if (one.top_k > 0) candidates = std::min(candidates, one.top_k);
      candidates =
          std::max(1, static_cast<int32_t>(std::ceil(std::min(1.0F, one.top_p) * static_cast<float>(candidates))));
      sample.tokens[row] = one.temperature < kTemperatureMin ? 0 : static_cast<int32_t>(one.uniform * candidates);
    }
  }

  void write_logits(const Matrix<float>& logits) {
    for (int32_t row = 0; row < logits.rows; ++row) {
      std::fill_n(logits.row(row), logits.cols, 0.0F);
      logits.row(row)[next_random(random_) % static_cast<uint64_t>(logits.cols)] = kLogit;
    }
  }

  RouterSource router_;
  uint64_t random_;
  std::map<const Bf16*, int32_t> layers_;  // by gate, in the order of their first call
  std::vector<int32_t> ends_;
};

// What all parts of a device share.
struct Simulation {
  const MachineFile machine;
  SimulatedMemory memory;
  Timeline timeline;
  Answers answers;
  std::function<void()> tick;  // Device::on_host_work()

  OpCost cost(const OpCall& call, double tile_rows) const {
    const auto is_device = [this](const void* data) { return memory.is_device(data); };
    return op_cost(call, is_device, std::llround(tile_rows));
  }

  // On the device.
  Work kernel_work(const OpCall& call) const {
    const OpCost total = cost(call, machine.device.tile_rows);
    Work work;
    work.least_us = machine.device.kernel_us;
    work.compute_us = (total.flops + total.attention_flops) / (machine.device.bf16_tflops * kFlopsPerUsPerTeraflop);
    work.device_bytes = total.device_bytes;
    work.up_bytes = total.host_read_bytes;
    work.down_bytes = total.host_write_bytes;
    return work;
  }

  // On the host lane.
  Work host_work(const OpCall& call) const {
    const OpCost total = cost(call, 1.0);
    MOED_CHECK(total.device_bytes == 0) << op_name(call) << " on the host lane touches device memory";
    Work work;
    work.least_us = machine.host.fork_us;
    work.compute_us = total.flops / (machine.host.bf16_gflops * kFlopsPerUsPerGigaflop) +
                      total.attention_flops / (machine.host.attention_gflops * kFlopsPerUsPerGigaflop);
    work.host_bytes = total.host_bytes();
    if (std::holds_alternative<Attention>(call)) work.host_gb_s = machine.host.attention_gb_s;
    return work;
  }
};

void carry_out(void* target, const void* source, int64_t bytes) {
  if (bytes <= kTableBytesMax) std::memmove(target, source, bytes);
}

class SimulatedEvent final : public Event {
 public:
  explicit SimulatedEvent(Simulation& simulation) : simulation_(simulation) {}
  bool done() const override {
    MOED_CHECK(moment != nullptr) << "done: the event was never recorded";
    simulation_.timeline.spend(simulation_.machine.calls.poll_us);
    return moment->reached;
  }
  Status join() override {
    MOED_CHECK(moment != nullptr) << "join: the event was never recorded";
    const bool reached = moment->reached;
    if (!reached) simulation_.timeline.wait(*moment);
    simulation_.timeline.spend(reached ? simulation_.machine.calls.poll_us : simulation_.machine.calls.wake_us);
    return {};
  }
  double us_since(const Event& earlier) const override {
    const auto& begin = static_cast<const SimulatedEvent&>(earlier).moment;
    MOED_CHECK(begin != nullptr && moment != nullptr && begin->reached && moment->reached)
        << "us_since of an event that is not done";
    return moment->at_us - begin->at_us;
  }

  Timeline::MomentPtr moment;  // null: never recorded

 private:
  Simulation& simulation_;
};

class SimulatedStream final : public Stream {
 public:
  explicit SimulatedStream(Simulation& simulation)
      : simulation_(simulation), index_(simulation.timeline.add_stream()) {}

  void enqueue(OpCall call) {
    Simulation& simulation = simulation_;
    simulation.timeline.spend(simulation.machine.calls.launch_us);
    const auto shared = std::make_shared<OpCall>(call);
    simulation.timeline.enqueue(
        index_, Resource::kKernels, [&simulation, shared] { return simulation.kernel_work(*shared); },
        [&simulation, shared] { simulation.answers.write(*shared, simulation.memory); });
  }
  void copy(void* target, const void* source, int64_t bytes) override {
    Simulation& simulation = simulation_;
    simulation.timeline.spend(simulation.machine.calls.copy_us);
    if (bytes == 0) return;
    const bool from_device = simulation.memory.is_device(source);
    const bool to_device = simulation.memory.is_device(target);
    Work work;
    Resource resource = Resource::kUp;
    if (from_device && to_device) {
      resource = Resource::kKernels;
      work.least_us = simulation.machine.device.kernel_us;
      work.device_bytes = 2 * bytes;
    } else if (from_device) {
      resource = Resource::kDown;
      work.down_bytes = bytes;
    } else {
      work.up_bytes = bytes;
    }
    simulation.timeline.enqueue(
        index_, resource, [work] { return work; }, [=] { carry_out(target, source, bytes); });
  }
  void record(Event& event) override {
    simulation_.timeline.spend(simulation_.machine.calls.event_us);
    auto& moment = static_cast<SimulatedEvent&>(event).moment;
    moment = std::make_shared<Timeline::Moment>();
    simulation_.timeline.enqueue_moment(index_, moment);
  }
  void wait(const Event& event) override {
    const auto& moment = static_cast<const SimulatedEvent&>(event).moment;
    MOED_CHECK(moment != nullptr) << "wait: the event was never recorded";
    simulation_.timeline.spend(simulation_.machine.calls.event_us);
    simulation_.timeline.enqueue_wait(index_, moment);
  }

 private:
  Simulation& simulation_;
  const int32_t index_;
};

class SimulatedOps final : public QueuedOps {
 public:
  Status reserve(const OpLimits&) override { return {}; }

 private:
  void enqueue(OpCall call, Stream& stream) override { static_cast<SimulatedStream&>(stream).enqueue(call); }
};

// The host lane: what it is given is done when the call returns.
class SimulatedHostStream final : public Stream {
 public:
  explicit SimulatedHostStream(Simulation& simulation) : simulation_(simulation) {}
  void copy(void* target, const void* source, int64_t bytes) override {
    MOED_CHECK(!simulation_.memory.is_device(target) && !simulation_.memory.is_device(source))
        << "the host lane copies device memory";
    simulation_.timeline.run({.host_bytes = 2 * bytes});
    carry_out(target, source, bytes);
  }
  void record(Event& event) override {
    auto& moment = static_cast<SimulatedEvent&>(event).moment;
    moment = std::make_shared<Timeline::Moment>(Timeline::Moment{true, simulation_.timeline.now_us()});
  }
  void wait(const Event& event) override {
    const auto& moment = static_cast<const SimulatedEvent&>(event).moment;
    MOED_CHECK(moment != nullptr) << "wait: the event was never recorded";
    if (!moment->reached) simulation_.timeline.wait(*moment);
  }

 private:
  Simulation& simulation_;
};

class SimulatedHostOps final : public QueuedOps {
 public:
  explicit SimulatedHostOps(Simulation& simulation) : simulation_(simulation) {}
  Status reserve(const OpLimits&) override { return {}; }

 private:
  void enqueue(OpCall call, Stream&) override {
    Timeline& timeline = simulation_.timeline;
    Timeline::HostWork work = timeline.begin_host(simulation_.host_work(call));
    const double slice_us = simulation_.tick ? kTickUs : std::numeric_limits<double>::infinity();
    while (!timeline.run_host(work, slice_us)) simulation_.tick();
    simulation_.answers.write(call, simulation_.memory);
  }
  Simulation& simulation_;
};

class SimulatedHostAttention final : public HostAttention {
 public:
  explicit SimulatedHostAttention(Simulation& simulation) : simulation_(simulation) {}
  void begin(const Attention& args) override {
    MOED_CHECK(done()) << "attention begins before the last has ended";
    work_ = simulation_.timeline.begin_host(simulation_.host_work(args));
    done_ = args.spans.empty();
  }
  void run(double slice_us) override {
    MOED_CHECK(!done()) << "attention that has ended goes on";
    done_ = simulation_.timeline.run_host(work_, std::max(slice_us, simulation_.machine.host.fork_us));
  }
  bool done() const override { return done_; }

 private:
  Simulation& simulation_;
  Timeline::HostWork work_;
  bool done_ = true;
};

class SimulatedDevice final : public Device {
 public:
  SimulatedDevice(const MachineFile& machine, SimulatedMemory memory, RouterSource router, uint64_t seed)
      : simulation_{machine, std::move(memory), Timeline(machine, seed), Answers(std::move(router), seed), {}},
        host_ops_(simulation_),
        host_stream_(simulation_) {
    char gib[32];
    std::snprintf(gib, sizeof(gib), "%.2f", static_cast<double>(simulation_.memory.capacity_bytes()) / (1 << 30));
    description_ = "simulated: " + machine.name + ", " + gib + " GiB, router " + simulation_.answers.router() +
                   ", seed " + std::to_string(seed);
  }

  std::string_view description() const override { return description_; }
  bool is_host() const override { return false; }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override {
    MOED_ASSIGN_OR_RETURN(std::byte * data, simulation_.memory.allocate(bytes, memory));
    return Buffer(this, data, bytes, memory);
  }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<SimulatedStream>(simulation_); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<SimulatedEvent>(simulation_); }
  Ops& ops() override { return ops_; }
  Ops& host_ops() override { return host_ops_; }
  Stream& host_stream() override { return host_stream_; }
  void on_host_work(std::function<void()> tick) override { simulation_.tick = std::move(tick); }
  std::unique_ptr<HostAttention> make_host_attention() override {
    return std::make_unique<SimulatedHostAttention>(simulation_);
  }
  int64_t memory_bytes() const override { return simulation_.memory.capacity_bytes(); }
  const MachineFile* machine() const override { return &simulation_.machine; }
  double now_us() const override { return simulation_.timeline.now_us(); }
  std::optional<DeviceTotals> totals() const override {
    DeviceTotals sums;
    const auto& parts = simulation_.timeline.totals();
    sums.kernels_us = parts[static_cast<int>(Resource::kKernels)].busy_us;
    sums.up_us = parts[static_cast<int>(Resource::kUp)].busy_us;
    sums.down_us = parts[static_cast<int>(Resource::kDown)].busy_us;
    sums.host_us = parts[static_cast<int>(Resource::kHost)].busy_us;
    for (const ResourceTotals& part : parts) {
      sums.device_bytes += part.device_bytes;
      sums.up_bytes += part.up_bytes;
      sums.down_bytes += part.down_bytes;
      sums.host_bytes += part.host_bytes;
    }
    return sums;
  }
  void host_access(const void*, int64_t bytes, Access access) override {
    simulation_.timeline.run({.host_bytes = access == Access::kUpdate ? 2 * bytes : bytes});
  }
  void run_host(int64_t count, FunctionRef<void(int64_t index, int thread)> fn) override {
    simulation_.timeline.run({.least_us = simulation_.machine.host.fork_us});
    for (int64_t index = 0; index < count; ++index) fn(index, 0);
  }

 private:
  void release(std::byte* data, int64_t size, Memory memory) override {
    simulation_.memory.release(data, size, memory);
  }

  Simulation simulation_;
  SimulatedOps ops_;
  SimulatedHostOps host_ops_;
  SimulatedHostStream host_stream_;
  std::string description_;
};

}  // namespace

StatusOr<std::unique_ptr<Device>> open_simulated_device(std::string_view machine_path, const DeviceOptions& options) {
  MOED_ASSIGN_OR_RETURN(const MachineFile machine, load_machine_file(std::string(machine_path)));
  if (!(options.memory_gib >= 0.0)) {
    return invalid_argument("the device's memory must be above 0 GiB, not " + std::to_string(options.memory_gib),
                            "device_memory_gib");
  }
  const double gib =
      options.memory_gib == 0.0 ? machine.device.memory_gib : std::min(options.memory_gib, machine.device.memory_gib);
  MOED_ASSIGN_OR_RETURN(SimulatedMemory memory, SimulatedMemory::make(std::llround(gib * (1 << 30))));
  MOED_ASSIGN_OR_RETURN(RouterSource router, RouterSource::make(options.router, options.seed));
  return std::unique_ptr<Device>(
      std::make_unique<SimulatedDevice>(machine, std::move(memory), std::move(router), options.seed));
}

}  // namespace moed
