#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/status.h"
#include "kernels/device.h"

namespace moed {

// Packets to device memory, in order, on a stream of their own, at most kPackets in flight. Serving thread only;
// allocates at construction alone. A packet that fails ends the process.
class CopyQueue {
 public:
  static constexpr int32_t kPackets = 2;

  // bounces: not all sources are pinned; those that are not pass through pinned memory of the queue's own, to which the
  // calling thread copies them. The device outlives it. Errors: kResourceExhausted with the bytes asked for.
  static StatusOr<std::unique_ptr<CopyQueue>> make(Device& device, int64_t packet_bytes, bool bounces);
  ~CopyQueue();

  bool has_room() const { return num_in_flight_ < kPackets; }
  int32_t num_in_flight() const { return num_in_flight_; }
  // A part of an expert that goes to a slot.
  struct Part {
    int32_t slot = -1;
    std::byte* target = nullptr;
    const std::byte* source = nullptr;
    int64_t bytes = 0;
    bool pinned = true;
  };
  // Enqueues it as a packet. REQUIRES: has_room(), at most packet_bytes; pinned unless it bounces.
  void submit(const Part& part);
  // Later work of `reader` comes after the slot's packets that are in flight.
  void order(int32_t slot, Stream& reader) const;
  // Packets of the slot in flight.
  int32_t in_flight(int32_t slot) const;
  // The slot of the oldest packet if that has arrived, else -1; it is in flight no more.
  int32_t poll();
  // Waits for the oldest packet; its slot. REQUIRES: one is in flight.
  int32_t join();

 private:
  struct Packet {
    std::unique_ptr<Event> arrived;
    std::byte* bounce = nullptr;
    int32_t slot = -1;
  };

  explicit CopyQueue(Device& device) : device_(device) {}
  Packet& oldest() { return packets_[(next_ + kPackets - num_in_flight_) % kPackets]; }
  int32_t drop_oldest();

  Device& device_;
  int64_t packet_bytes_ = 0;
  std::unique_ptr<Stream> stream_;
  Buffer bounce_;
  std::array<Packet, kPackets> packets_;  // used in turn
  int32_t next_ = 0;
  int32_t num_in_flight_ = 0;
};

}  // namespace moed
