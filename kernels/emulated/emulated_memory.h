#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "base/huge_pages.h"
#include "base/status.h"
#include "kernels/device.h"

namespace moed {

// The memory of an emulated device: a memfd mapped twice, once without any access for the addresses that the engine
// sees, once for the kernels. Freed addresses are not given out again. Pinned and mapped memory are ordinary pages that
// the device knows. All other host memory copies may read and write, as a driver does through buffers of its own, and
// kernels while it is pinned (weights and host KV lie there).
class EmulatedMemory {
 public:
  // Errors: kResourceExhausted.
  static StatusOr<std::unique_ptr<EmulatedMemory>> make(int64_t capacity_bytes);
  ~EmulatedMemory();
  EmulatedMemory(const EmulatedMemory&) = delete;
  EmulatedMemory& operator=(const EmulatedMemory&) = delete;

  // Errors: kResourceExhausted with the arithmetic.
  StatusOr<std::byte*> allocate(int64_t bytes, Memory memory);
  void release(std::byte* data);

  bool is_device(const void* data) const;
  // Where kernels find what the engine calls `data`; host addresses are their own.
  void* translate(const void* data) const;
  // Dies with the names of op and field unless all of it is in one live buffer, or in host memory that is no buffer.
  void check_range(const void* data, int64_t bytes, const char* op, const char* field) const;
  // Host memory that is no buffer, from now on within reach of kernels. Any thread. Dies where some of it is already.
  void pin(const std::byte* data, int64_t bytes);
  void unpin(const std::byte* data);
  // Whether kernels may touch all of it: device or mapped memory of one live buffer, or one piece of pinned host
  // memory.
  bool in_reach(const void* data, int64_t bytes) const;
  // Whether all of it is in one live buffer of mapped memory.
  bool is_mapped(const void* data, int64_t bytes) const;
  // "device buffer 3 (4096 bytes), bytes [0, 64)"
  std::string describe(uintptr_t begin, uintptr_t end) const;
  int64_t capacity_bytes() const { return capacity_bytes_; }

 private:
  struct Piece {
    int64_t number = 0;  // in the order of allocation
    int64_t bytes = 0;
    Memory memory = Memory::kDevice;
    HugePages pages;  // of host memory
  };

  explicit EmulatedMemory(int64_t capacity_bytes) : capacity_bytes_(capacity_bytes) {}
  Status map();
  StatusOr<std::byte*> take_device(int64_t bytes);
  // The live buffer that holds the address; end() when none does.
  std::map<uintptr_t, Piece>::const_iterator find(uintptr_t address) const;

  const int64_t capacity_bytes_;
  int64_t window_bytes_ = 0;
  int64_t taken_bytes_ = 0;
  int64_t next_bytes_ = 0;  // offset of the first address never given out
  int64_t num_pieces_ = 0;
  int fd_ = -1;
  std::byte* window_ = nullptr;  // what the engine sees: no access
  std::byte* alias_ = nullptr;   // what kernels see
  std::map<uintptr_t, Piece> pieces_;
  mutable std::mutex pins_mutex_;
  std::map<uintptr_t, uintptr_t> pins_;  // begin, end; guarded by pins_mutex_
};

}  // namespace moed
