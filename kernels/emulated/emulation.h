#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <variant>
#include <vector>

#include "kernels/emulated/emulated_memory.h"
#include "kernels/emulated/faults.h"
#include "kernels/emulated/race_checker.h"
#include "kernels/op_ranges.h"

namespace moed {

// What an event stands for since it was last recorded.
struct Recording {
  bool done = false;
  Status status;  // what had failed on the device by then
  VectorClock clock;
  std::chrono::steady_clock::time_point at;
};

// A table as it was when its op was enqueued.
struct TableCopy {
  const std::byte* data = nullptr;
  std::vector<std::byte> bytes;
  int32_t actor = 0;
  uint64_t time = 0;
  const char* op = nullptr;
  const char* name = nullptr;

  // Dies when the table is not what it was.
  void check() const;
};

// The queues of all streams of an emulated device, what runs them, and the host lane.
class Emulation {
 public:
  static constexpr int32_t kHost = 0;  // actor

  struct OpItem {
    OpCall call;
    std::vector<TableCopy> tables;
    std::string fault;  // why it fails; empty: it does not
  };
  struct CopyItem {
    void* target = nullptr;
    const void* source = nullptr;
    int64_t bytes = 0;
    std::string fault;
  };
  struct RecordItem {
    std::shared_ptr<Recording> recording;
  };
  struct WaitItem {
    std::shared_ptr<Recording> recording;
  };
  using Queue = std::deque<std::variant<OpItem, CopyItem, RecordItem, WaitItem>>;

  Emulation(std::unique_ptr<EmulatedMemory> device_memory, std::unique_ptr<Device> host, const Faults& faults,
            uint64_t seed);

  int32_t add_stream(Queue& queue);
  // Runs what the stream still holds.
  void remove_stream(Queue& queue);

  // Limits of all who reserve.
  Status reserve(const OpLimits& limits);
  void enqueue(OpCall call, int32_t actor, Queue& queue);
  void enqueue_copy(void* target, const void* source, int64_t bytes, int32_t actor, Queue& queue);

  // The host lane. What it touches may not be device memory.
  void run_on_host(OpCall& call);
  void copy_on_host(void* target, const void* source, int64_t bytes);
  // The host lane reads and writes what the call names; its tables as they are now.
  std::vector<TableCopy> touch_on_host(OpCall& call);

  // One step of a stream that can make one. Dies when none can.
  void step();
  // The host has waited for all that came before the recording.
  void joined(const Recording& recording);

  Device& host() const { return *host_; }

  const std::unique_ptr<EmulatedMemory> memory;
  RaceChecker checker;
  Faults faults;

 private:
  bool try_step();
  void run(OpItem& item);
  void run(const CopyItem& item);
  void run(RecordItem& item);
  void run(const WaitItem&) {}
  // Notes the item's fault. True: nothing runs on the device any more.
  bool fails(const std::string& fault);

  const std::unique_ptr<Device> host_;
  const std::unique_ptr<Stream> host_stream_;
  OpLimits limits_;
  Status failed_;
  std::mt19937_64 random_;
  std::vector<Queue*> queues_;
  std::vector<Queue*> ready_;
  std::vector<TableCopy> tables_;  // of ops that have run and for which the host has not waited
};

}  // namespace moed
