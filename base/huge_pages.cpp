#include "base/huge_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

namespace moed {
namespace {

constexpr int64_t kHugePageBytes = int64_t{2} << 20;
constexpr int64_t kSmallPageBytes = 4096;
constexpr int64_t kTouchThreadsMax = 8;

}  // namespace

StatusOr<HugePages> HugePages::allocate(int64_t bytes) { return map(bytes, MADV_HUGEPAGE); }

StatusOr<HugePages> HugePages::reserve(int64_t bytes) { return map(bytes, MADV_NOHUGEPAGE); }

// Not counted by the kernel's overcommit, which knows less of the machine's memory than the budget that came before.
StatusOr<HugePages> HugePages::map(int64_t bytes, int advice) {
  MOED_CHECK(bytes >= 0) << bytes;
  if (bytes == 0) return HugePages();
  // One huge page more than needed, so that the start can be aligned; the untouched rest costs address space alone.
  const int64_t size = (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  void* mapped =
      mmap(nullptr, size + kHugePageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    return Status(StatusCode::kResourceExhausted, "cannot map " + std::to_string(bytes) + " bytes of memory");
  }
  const auto address = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t aligned = (address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  if (aligned > address) munmap(mapped, aligned - address);
  const uintptr_t tail = aligned + size;
  if (const uintptr_t end = address + size + kHugePageBytes; end > tail)
    munmap(reinterpret_cast<void*>(tail), end - tail);
  madvise(reinterpret_cast<void*>(aligned), size, advice);
  return HugePages(reinterpret_cast<std::byte*>(aligned), size);
}

void HugePages::touch() {
  const int64_t num_pages = size_ / kHugePageBytes;
  const int64_t num_threads = std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, kTouchThreadsMax);
  std::vector<std::thread> threads;
  for (int64_t thread = 0; thread < num_threads; ++thread) {
    threads.emplace_back(
        [this, begin = num_pages * thread / num_threads, end = num_pages * (thread + 1) / num_threads] {
          // Every small page: where huge ones are not granted, touching one does not bring the others.
          for (int64_t at = begin * kHugePageBytes; at < end * kHugePageBytes; at += kSmallPageBytes) {
            const_cast<volatile std::byte*>(data_)[at] = std::byte{0};
          }
        });
  }
  for (std::thread& thread : threads) thread.join();
}

HugePages::~HugePages() {
  if (data_ != nullptr) munmap(data_, size_);
}

HugePages::HugePages(HugePages&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

HugePages& HugePages::operator=(HugePages&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace moed
