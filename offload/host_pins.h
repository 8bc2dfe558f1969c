#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "kernels/device.h"

namespace moed {

// Host memory that is pinned for a device as long as this lives. The device outlives it. One thread at a time.
class HostPins {
 public:
  // chunk_bytes: what is pinned at once, so that a refusal costs little and reading may go on beside it.
  explicit HostPins(Device& device, int64_t chunk_bytes = int64_t{2} << 30)
      : device_(&device), chunk_bytes_(chunk_bytes) {}
  ~HostPins();
  HostPins(HostPins&& other) noexcept
      : device_(other.device_),
        chunk_bytes_(other.chunk_bytes_),
        pieces_(std::exchange(other.pieces_, {})),
        refusal_(std::move(other.refusal_)) {}
  HostPins& operator=(HostPins&&) = delete;

  int64_t chunk_bytes() const { return chunk_bytes_; }
  // A refusal is kept in refusal(), and the piece is not covered.
  void pin(std::byte* data, int64_t bytes);
  // Unpins all of it: before memory goes that was pinned in vain.
  void clear();
  bool covers(const std::byte* data, int64_t bytes) const;
  int64_t bytes() const;
  // Why a piece could not be pinned; ok: none was refused.
  const Status& refusal() const { return refusal_; }

 private:
  struct Piece {
    std::byte* data = nullptr;
    int64_t bytes = 0;
  };
  Device* device_;
  int64_t chunk_bytes_;
  std::vector<Piece> pieces_;
  Status refusal_;
};

}  // namespace moed
