#include "offload/host_pins.h"

#include <algorithm>

namespace moed {

HostPins::~HostPins() { clear(); }

void HostPins::clear() {
  for (const Piece& piece : pieces_) device_->unpin(piece.data);
  pieces_.clear();
}

void HostPins::pin(std::byte* data, int64_t bytes) {
  if (bytes == 0) return;
  Status status = device_->pin(data, bytes);
  if (status.ok()) {
    pieces_.push_back({data, bytes});
  } else if (refusal_.ok()) {
    refusal_ = std::move(status);
  }
}

bool HostPins::covers(const std::byte* data, int64_t bytes) const {
  return std::any_of(pieces_.begin(), pieces_.end(), [&](const Piece& piece) {
    return data >= piece.data && data + bytes <= piece.data + piece.bytes;
  });
}

int64_t HostPins::bytes() const {
  int64_t bytes = 0;
  for (const Piece& piece : pieces_) bytes += piece.bytes;
  return bytes;
}

}  // namespace moed
