#include "kernels/emulated/emulation.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace moed {
namespace {

// Checks what a call touches and copies its tables.
class EnqueueVisitor : public RangeVisitor {
 public:
  EnqueueVisitor(const EmulatedMemory& memory, RaceChecker& checker, const TableCopy& about)
      : memory_(memory), checker_(checker), about_(about) {}

  void range(const char* name, Access access, const void*& base, Runs runs) override {
    runs([&](int64_t offset, int64_t bytes) {
      const std::byte* data = base == nullptr ? nullptr : static_cast<const std::byte*>(base) + offset;
      memory_.check_range(data, bytes, about_.op, name);
      check_lane(data, name);
      MOED_CHECK(on_host() || memory_.in_reach(data, bytes))
          << about_.op << ": " << name
          << " lies in host memory that is neither mapped nor pinned, out of kernels' reach";
      checker_.access(access, data, bytes, name);
    });
  }

  void table(const char* name, const void*& data, int64_t bytes) override {
    if (bytes == 0) return;
    check_lane(data, name);
    MOED_CHECK(on_host() || memory_.is_mapped(data, bytes))
        << about_.op << ": its table of " << name << " is not in mapped memory";
    checker_.access(Access::kRead, data, bytes, name);
    const auto* begin = static_cast<const std::byte*>(data);
    TableCopy& copy = tables.emplace_back(about_);
    copy.data = begin;
    copy.bytes.assign(begin, begin + bytes);
    copy.name = name;
  }

  std::vector<TableCopy> tables;

 private:
  bool on_host() const { return about_.actor == Emulation::kHost; }
  void check_lane(const void* data, const char* name) const {
    MOED_CHECK(!on_host() || !memory_.is_device(data))
        << about_.op << ": " << name << " lies in device memory, out of the host lane's reach";
  }

  const EmulatedMemory& memory_;
  RaceChecker& checker_;
  const TableCopy about_;
};

// Puts the addresses that kernels see in place of the engine's.
class TranslateVisitor : public RangeVisitor {
 public:
  explicit TranslateVisitor(const EmulatedMemory& memory) : memory_(memory) {}
  void range(const char*, Access, const void*& base, Runs) override { base = memory_.translate(base); }
  void table(const char*, const void*& data, int64_t bytes) override {
    if (bytes == 0) return;
    const auto* begin = static_cast<const std::byte*>(data);
    data = tables_.emplace_back(begin, begin + bytes).data();
  }

 private:
  const EmulatedMemory& memory_;
  std::vector<std::vector<std::byte>> tables_;  // the call's own: those of blobs will be written
};

}  // namespace

void TableCopy::check() const {
  MOED_CHECK(std::memcmp(data, bytes.data(), bytes.size()) == 0)
      << op << ": its table of " << name << " was changed before the host had waited for the op on "
      << (actor == Emulation::kHost ? std::string("the host lane") : "stream " + std::to_string(actor));
}

Emulation::Emulation(std::unique_ptr<EmulatedMemory> device_memory, std::unique_ptr<Device> host, const Faults& planted,
                     uint64_t seed)
    : memory(std::move(device_memory)),
      checker(*memory),
      faults(planted),
      host_(std::move(host)),
      host_stream_(host_->make_stream()),
      random_(seed) {}

int32_t Emulation::add_stream(Queue& queue) {
  queues_.push_back(&queue);
  return checker.add_stream();
}

void Emulation::remove_stream(Queue& queue) {
  while (!queue.empty()) step();
  std::erase(queues_, &queue);
}

Status Emulation::reserve(const OpLimits& limits) {
  for (int32_t OpLimits::*const limit :
       {&OpLimits::rows, &OpLimits::hidden, &OpLimits::intermediate, &OpLimits::num_heads, &OpLimits::head_dim,
        &OpLimits::context_tokens, &OpLimits::num_experts, &OpLimits::choices, &OpLimits::vocab}) {
    limits_.*limit = std::max(limits_.*limit, limits.*limit);
  }
  return host_->ops().reserve(limits_);
}

void Emulation::enqueue(OpCall call, int32_t actor, Queue& queue) {
  TableCopy about;
  about.op = op_name(call);
  about.actor = actor;
  about.time = checker.begin(actor, about.op);
  EnqueueVisitor visitor(*memory, checker, about);
  visit_ranges(call, visitor);
  const bool lost = faults.hit(Faults::Kind::kLost);
  std::string fault;
  if (faults.hit(Faults::Kind::kLaunch)) fault = "launch of " + std::string(about.op) + " failed";
  if (lost) fault = "device lost: at " + std::string(about.op);
  queue.push_back(OpItem{call, std::move(visitor.tables), std::move(fault)});
}

void Emulation::enqueue_copy(void* target, const void* source, int64_t bytes, int32_t actor, Queue& queue) {
  if (bytes == 0) return;
  checker.begin(actor, "copy");
  memory->check_range(source, bytes, "copy", "source");
  memory->check_range(target, bytes, "copy", "target");
  checker.access(Access::kRead, source, bytes, "source");
  checker.access(Access::kWrite, target, bytes, "target");
  const bool lost = faults.hit(Faults::Kind::kLost);
  std::string fault;
  if (faults.hit(Faults::Kind::kCopy)) fault = "copy of " + std::to_string(bytes) + " bytes failed";
  if (lost) fault = "device lost: at a copy of " + std::to_string(bytes) + " bytes";
  queue.push_back(CopyItem{target, source, bytes, std::move(fault)});
}

std::vector<TableCopy> Emulation::touch_on_host(OpCall& call) {
  TableCopy about;
  about.op = op_name(call);
  about.actor = kHost;
  about.time = checker.begin(kHost, about.op);
  EnqueueVisitor visitor(*memory, checker, about);
  visit_ranges(call, visitor);
  return std::move(visitor.tables);
}

void Emulation::run_on_host(OpCall& call) {
  touch_on_host(call);
  run_op(call, host_->ops(), *host_stream_);
}

void Emulation::copy_on_host(void* target, const void* source, int64_t bytes) {
  if (bytes == 0) return;
  checker.begin(kHost, "copy");
  const auto touch = [&](const void* data, Access access, const char* field) {
    memory->check_range(data, bytes, "copy", field);
    MOED_CHECK(!memory->is_device(data)) << "copy: " << field << " lies in device memory, out of the host lane's reach";
    checker.access(access, data, bytes, field);
  };
  touch(source, Access::kRead, "source");
  touch(target, Access::kWrite, "target");
  std::memcpy(target, source, bytes);
}

bool Emulation::try_step() {
  std::vector<Queue*>& ready = ready_;
  ready.clear();
  for (Queue* queue : queues_) {
    if (queue->empty()) continue;
    const auto* wait = std::get_if<WaitItem>(&queue->front());
    if (wait == nullptr || wait->recording->done) ready.push_back(queue);
  }
  if (ready.empty()) return false;
  Queue& queue = *ready[random_() % ready.size()];
  auto item = std::move(queue.front());
  queue.pop_front();
  std::visit([&](auto& one) { run(one); }, item);
  return true;
}

void Emulation::step() { MOED_CHECK(try_step()) << "the emulated device waits for what no stream will do"; }

void Emulation::joined(const Recording& recording) {
  checker.join(kHost, recording.clock);
  std::erase_if(tables_, [&](const TableCopy& table) {
    if (!checker.host_has_seen(table.actor, table.time)) return false;
    table.check();
    return true;
  });
}

bool Emulation::fails(const std::string& fault) {
  if (failed_.ok() && !fault.empty()) failed_ = internal_error(fault);
  return !failed_.ok();
}

void Emulation::run(OpItem& item) {
  for (TableCopy& table : item.tables) {
    table.check();
    tables_.push_back(std::move(table));
  }
  if (fails(item.fault)) return;
  TranslateVisitor visitor(*memory);
  visit_ranges(item.call, visitor);
  run_op(item.call, host_->ops(), *host_stream_);
}

void Emulation::run(const CopyItem& item) {
  if (fails(item.fault)) return;
  std::memcpy(memory->translate(item.target), memory->translate(item.source), item.bytes);
}

void Emulation::run(RecordItem& item) {
  item.recording->at = std::chrono::steady_clock::now();
  item.recording->status = failed_;
  item.recording->done = true;
}

}  // namespace moed
