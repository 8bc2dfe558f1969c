#include "kernels/cuda/cuda_context.h"

namespace moed::cuda {

std::string error_text(cudaError_t error) {
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

void Context::activate() {
  thread_local int32_t current = -1;
  if (current == index_) return;
  const cudaError_t error = cudaSetDevice(index_);
  check(error, "choosing the device");
  if (error == cudaSuccess) current = index_;
}

void Context::fail(const char* what, const std::string& why) {
  std::lock_guard lock(mutex_);
  if (!status_.ok()) return;
  status_ = internal_error("cuda:" + std::to_string(index_) + ": " + what + ": " + why);
  failed_.store(true, std::memory_order_release);
}

Status Context::status() const {
  if (!failed_.load(std::memory_order_acquire)) return {};
  std::lock_guard lock(mutex_);
  return status_;
}

}  // namespace moed::cuda
