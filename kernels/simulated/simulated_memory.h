#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"
#include "kernels/device.h"

namespace moed {

// Addresses for the buffers of a simulated device, of which only pages that somebody writes cost memory: a model of 90
// GB fits on any box. Reads give zeroes. Addresses of freed device memory are not given out again.
class SimulatedMemory {
 public:
  // Errors: kResourceExhausted.
  static StatusOr<SimulatedMemory> make(int64_t capacity_bytes);
  ~SimulatedMemory();
  SimulatedMemory(SimulatedMemory&& other) noexcept;
  SimulatedMemory& operator=(SimulatedMemory&&) = delete;

  // Errors: kResourceExhausted with the arithmetic.
  StatusOr<std::byte*> allocate(int64_t bytes, Memory memory);
  void release(std::byte* data, int64_t bytes, Memory memory);
  bool is_device(const void* data) const {
    return reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(window_) <
           static_cast<uintptr_t>(window_bytes_);
  }
  int64_t capacity_bytes() const { return capacity_bytes_; }

 private:
  SimulatedMemory() = default;
  int64_t capacity_bytes_ = 0;
  int64_t taken_bytes_ = 0;
  int64_t next_bytes_ = 0;  // offset of the first address never given out
  int64_t window_bytes_ = 0;
  std::byte* window_ = nullptr;
};

}  // namespace moed
