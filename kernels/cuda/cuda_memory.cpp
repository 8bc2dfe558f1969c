#include "kernels/cuda/cuda_memory.h"

#include <cstring>
#include <string>

namespace moed::cuda {
namespace {

Status exhausted(const std::string& what) { return Status(StatusCode::kResourceExhausted, what); }

// A refusal of memory is the caller's to handle: it must not look like a failed launch to whoever asks next.
std::string refused(cudaError_t error) {
  cudaGetLastError();
  return error_text(error);
}

}  // namespace

StatusOr<std::byte*> CudaMemory::allocate(int64_t bytes, Memory memory) {
  if (bytes < 0) return invalid_argument("cannot allocate " + std::to_string(bytes) + " bytes");
  if (bytes == 0) return static_cast<std::byte*>(nullptr);
  context_.activate();
  return memory == Memory::kDevice ? allocate_device(bytes) : allocate_host(bytes);
}

StatusOr<std::byte*> CudaMemory::allocate_device(int64_t bytes) {
  std::lock_guard lock(mutex_);
  if (bytes > capacity_bytes_ - used_bytes_) {
    return exhausted("cannot allocate " + std::to_string(bytes) + " bytes of device memory: " +
                     std::to_string(used_bytes_) + " of " + std::to_string(capacity_bytes_) + " are taken");
  }
  void* data = nullptr;
  cudaError_t error = cudaMalloc(&data, bytes);
  if (error != cudaSuccess) {
    return exhausted("cannot allocate " + std::to_string(bytes) + " bytes of device memory: " + refused(error));
  }
  error = cudaMemset(data, 0, bytes);
  // Streams of this device do not wait for the default one.
  if (error == cudaSuccess) error = cudaStreamSynchronize(nullptr);
  context_.check(error, "zeroing memory");
  used_bytes_ += bytes;
  return static_cast<std::byte*>(data);
}

StatusOr<std::byte*> CudaMemory::allocate_host(int64_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
  if (error != cudaSuccess) {
    return exhausted("cannot allocate " + std::to_string(bytes) + " bytes of pinned memory: " + refused(error));
  }
  std::memset(data, 0, bytes);
  return static_cast<std::byte*>(data);
}

void CudaMemory::release(std::byte* data, int64_t bytes, Memory memory) {
  context_.activate();
  if (memory != Memory::kDevice) {
    context_.check(cudaFreeHost(data), "freeing pinned memory");
    return;
  }
  context_.check(cudaFree(data), "freeing memory");
  std::lock_guard lock(mutex_);
  used_bytes_ -= bytes;
}

Status CudaMemory::pin(std::byte* data, int64_t bytes) {
  context_.activate();
  const cudaError_t error = cudaHostRegister(data, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
  if (error == cudaSuccess) return {};
  return exhausted("cannot pin " + std::to_string(bytes) + " bytes: " + refused(error));
}

void CudaMemory::unpin(std::byte* data) {
  context_.activate();
  context_.check(cudaHostUnregister(data), "unpinning memory");
}

}  // namespace moed::cuda
