#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/status.h"

namespace moed {

// Anonymous memory on huge pages where the kernel grants them (transparent huge pages by madvise), zeroed, aligned to 2
// MiB: where weights and KV live. Move-only owner; usable from any thread.
class HugePages {
 public:
  HugePages() = default;
  // Errors: kResourceExhausted with the number of bytes asked for.
  static StatusOr<HugePages> allocate(int64_t bytes);
  // Addresses of which only the pages that somebody writes cost memory, however many there are: for weights that have
  // no contents. Errors as allocate().
  static StatusOr<HugePages> reserve(int64_t bytes);
  ~HugePages();
  HugePages(HugePages&& other) noexcept;
  HugePages& operator=(HugePages&& other) noexcept;

  // Right after allocate(): makes the kernel back every page now, with several threads. What is not there is noticed
  // here, not in mid-service.
  void touch();

  std::byte* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  static StatusOr<HugePages> map(int64_t bytes, int advice);
  HugePages(std::byte* data, int64_t size) : data_(data), size_(size) {}
  std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace moed
