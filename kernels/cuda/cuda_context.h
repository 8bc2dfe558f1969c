#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

#include "base/status.h"

namespace moed::cuda {

// "out of memory (cudaErrorMemoryAllocation)"
std::string error_text(cudaError_t error);

// One GPU as the calls of this process see it, and the first of them that failed. Any thread.
class Context {
 public:
  explicit Context(int32_t index) : index_(index) {}

  int32_t index() const { return index_; }
  // Calls of this thread go to this GPU from here on.
  void activate();
  // Notes what failed; what comes after a failure on a device is worth nothing, so the first one stays.
  void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) fail(what, error_text(error));
  }
  // The same for the launches since the last call of the runtime.
  void check_launches(const char* what) { check(cudaGetLastError(), what); }
  void fail(const char* what, const std::string& why);
  Status status() const;

 private:
  const int32_t index_;
  std::atomic<bool> failed_{false};
  mutable std::mutex mutex_;
  Status status_;  // guarded by mutex_
};

}  // namespace moed::cuda
