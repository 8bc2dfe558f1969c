#include "kernels/simulated/simulated_memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <string>
#include <utility>

#include "base/check.h"

namespace moed {
namespace {

constexpr int64_t kPageBytes = 4096;
// Addresses are never used twice, so there must be more of them than memory.
constexpr int64_t kAddressesPerByte = 8;
constexpr int64_t kAddressesMin = int64_t{1} << 30;

std::string in_gib(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.3f GiB", static_cast<double>(bytes) / (1 << 30));
  return text;
}

// Null: the kernel refuses. Small pages, so that a write costs no more than it must.
std::byte* reserve(int64_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  madvise(at, bytes, MADV_NOHUGEPAGE);
  return static_cast<std::byte*>(at);
}

int64_t whole_pages(int64_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

}  // namespace

StatusOr<SimulatedMemory> SimulatedMemory::make(int64_t capacity_bytes) {
  SimulatedMemory memory;
  memory.capacity_bytes_ = capacity_bytes;
  memory.window_bytes_ = capacity_bytes * kAddressesPerByte + kAddressesMin;
  memory.window_ = reserve(memory.window_bytes_);
  if (memory.window_ == nullptr) {
    return Status(StatusCode::kResourceExhausted,
                  "no addresses for the " + in_gib(capacity_bytes) + " of a simulated device");
  }
  return memory;
}

SimulatedMemory::SimulatedMemory(SimulatedMemory&& other) noexcept
    : capacity_bytes_(other.capacity_bytes_),
      taken_bytes_(other.taken_bytes_),
      next_bytes_(other.next_bytes_),
      window_bytes_(other.window_bytes_),
      window_(std::exchange(other.window_, nullptr)) {}

SimulatedMemory::~SimulatedMemory() {
  if (window_ != nullptr) munmap(window_, window_bytes_);
}

StatusOr<std::byte*> SimulatedMemory::allocate(int64_t bytes, Memory memory) {
  if (bytes < 0) return invalid_argument("cannot allocate " + std::to_string(bytes) + " bytes");
  if (bytes == 0) return static_cast<std::byte*>(nullptr);
  if (memory != Memory::kDevice) {
    std::byte* data = reserve(bytes);
    if (data != nullptr) return data;
    return Status(StatusCode::kResourceExhausted,
                  "no addresses for " + std::to_string(bytes) + " bytes of simulated host memory");
  }
  if (bytes > capacity_bytes_ - taken_bytes_) {
    return Status(StatusCode::kResourceExhausted, "the simulated device cannot give " + std::to_string(bytes) +
                                                      " bytes (" + in_gib(bytes) + "): " + in_gib(taken_bytes_) +
                                                      " of " + in_gib(capacity_bytes_) + " are taken");
  }
  if (whole_pages(bytes) > window_bytes_ - next_bytes_) {
    return Status(StatusCode::kResourceExhausted, "the simulated device has no addresses left");
  }
  std::byte* data = window_ + next_bytes_;
  next_bytes_ += whole_pages(bytes);
  taken_bytes_ += bytes;
  return data;
}

void SimulatedMemory::release(std::byte* data, int64_t bytes, Memory memory) {
  if (memory != Memory::kDevice) {
    MOED_CHECK(munmap(data, bytes) == 0) << "the simulated device never gave this buffer";
    return;
  }
  MOED_CHECK(is_device(data)) << "the simulated device never gave this buffer";
  taken_bytes_ -= bytes;
  madvise(data, whole_pages(bytes), MADV_DONTNEED);
}

}  // namespace moed
