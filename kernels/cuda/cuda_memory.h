#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "base/status.h"
#include "kernels/cuda/cuda_context.h"
#include "kernels/device.h"

namespace moed::cuda {

// Memory of one GPU and host memory that it reads and writes, up to a cap. Any thread.
class CudaMemory {
 public:
  // Device memory for workspaces of ops and of libraries, which allocate() does not give out.
  static constexpr int64_t kOwnBytes = int64_t{512} << 20;

  // capacity_bytes: what allocate(kDevice) gives out in all.
  CudaMemory(Context& context, int64_t capacity_bytes) : context_(context), capacity_bytes_(capacity_bytes) {}

  int64_t capacity_bytes() const { return capacity_bytes_; }
  // Zeroed. Null for no bytes.
  StatusOr<std::byte*> allocate(int64_t bytes, Memory memory);
  void release(std::byte* data, int64_t bytes, Memory memory);
  Status pin(std::byte* data, int64_t bytes);
  void unpin(std::byte* data);

 private:
  StatusOr<std::byte*> allocate_device(int64_t bytes);
  StatusOr<std::byte*> allocate_host(int64_t bytes);

  Context& context_;
  const int64_t capacity_bytes_;
  std::mutex mutex_;
  int64_t used_bytes_ = 0;  // guarded by mutex_
};

}  // namespace moed::cuda
