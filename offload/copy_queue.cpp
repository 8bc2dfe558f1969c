#include "offload/copy_queue.h"

#include <cstring>

#include "base/check.h"
#include "base/log.h"

namespace moed {

StatusOr<std::unique_ptr<CopyQueue>> CopyQueue::make(Device& device, int64_t packet_bytes, bool bounces) {
  std::unique_ptr<CopyQueue> queue(new CopyQueue(device));
  queue->packet_bytes_ = packet_bytes;
  if (bounces) {
    MOED_ASSIGN_OR_RETURN(queue->bounce_, device.allocate(kPackets * packet_bytes, Memory::kPinned));
  }
  queue->stream_ = device.make_stream();
  for (int32_t i = 0; i < kPackets; ++i) {
    queue->packets_[i].arrived = device.make_event();
    if (bounces) queue->packets_[i].bounce = queue->bounce_.data() + i * packet_bytes;
  }
  return queue;
}

CopyQueue::~CopyQueue() {
  // Nobody is left to use what came: a copy that failed is no reason to abort, and no later event would tell more.
  while (num_in_flight_ > 0) {
    const Status status = oldest().arrived->join();
    if (!status.ok()) spdlog::error("copy of an expert, while closing: {}", status.message());
    --num_in_flight_;
  }
}

void CopyQueue::submit(const Part& part) {
  MOED_CHECK(has_room() && part.bytes > 0 && part.bytes <= packet_bytes_ && (part.pinned || bounce_.size() > 0))
      << num_in_flight_ << " in flight, packet of " << part.bytes << " bytes";
  Packet& packet = packets_[next_];
  next_ = (next_ + 1) % kPackets;
  ++num_in_flight_;
  packet.slot = part.slot;
  const std::byte* source = part.source;
  if (!part.pinned) {
    device_.host_access(packet.bounce, part.bytes, Access::kWrite);
    std::memcpy(packet.bounce, source, static_cast<size_t>(part.bytes));
    source = packet.bounce;
  }
  stream_->copy(part.target, source, part.bytes);
  stream_->record(*packet.arrived);
}

void CopyQueue::order(int32_t slot, Stream& reader) const {
  for (int32_t i = 1; i <= num_in_flight_; ++i) {
    const Packet& packet = packets_[(next_ + kPackets - i) % kPackets];
    if (packet.slot != slot) continue;
    reader.wait(*packet.arrived);
    return;
  }
}

int32_t CopyQueue::in_flight(int32_t slot) const {
  int32_t count = 0;
  for (int32_t i = 1; i <= num_in_flight_; ++i) {
    if (packets_[(next_ + kPackets - i) % kPackets].slot == slot) ++count;
  }
  return count;
}

int32_t CopyQueue::poll() {
  if (num_in_flight_ == 0 || !oldest().arrived->done()) return -1;
  return drop_oldest();
}

int32_t CopyQueue::join() {
  MOED_CHECK(num_in_flight_ > 0) << "nothing is under way";
  return drop_oldest();
}

int32_t CopyQueue::drop_oldest() {
  Packet& packet = oldest();
  const Status status = packet.arrived->join();
  MOED_CHECK(status.ok()) << "copy of an expert: " << status.message();
  --num_in_flight_;
  return packet.slot;
}

}  // namespace moed
