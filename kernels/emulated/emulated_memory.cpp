#include "kernels/emulated/emulated_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "base/check.h"

namespace moed {
namespace {

constexpr int64_t kPageBytes = 4096;
// Addresses are never used twice, so there must be more of them than memory.
constexpr int64_t kAddressesPerByte = 16;
constexpr int64_t kAddressesMin = int64_t{1} << 30;

uintptr_t address_of(const void* data) { return reinterpret_cast<uintptr_t>(data); }

std::string in_gib(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.3f GiB", static_cast<double>(bytes) / (1 << 30));
  return text;
}

const char* memory_name(Memory memory) {
  if (memory == Memory::kDevice) return "device";
  return memory == Memory::kPinned ? "pinned" : "mapped";
}

}  // namespace

StatusOr<std::unique_ptr<EmulatedMemory>> EmulatedMemory::make(int64_t capacity_bytes) {
  std::unique_ptr<EmulatedMemory> memory(new EmulatedMemory(capacity_bytes));
  MOED_RETURN_IF_ERROR(memory->map());
  return memory;
}

Status EmulatedMemory::map() {
  window_bytes_ = capacity_bytes_ * kAddressesPerByte + kAddressesMin;
  fd_ = memfd_create("moed-emulated-device", MFD_CLOEXEC);
  const bool sized = fd_ >= 0 && ftruncate(fd_, window_bytes_) == 0;
  const auto view = [&](int protection) -> std::byte* {
    void* at = sized ? mmap(nullptr, window_bytes_, protection, MAP_SHARED | MAP_NORESERVE, fd_, 0) : MAP_FAILED;
    return at == MAP_FAILED ? nullptr : static_cast<std::byte*>(at);
  };
  window_ = view(PROT_NONE);
  alias_ = view(PROT_READ | PROT_WRITE);
  if (window_ != nullptr && alias_ != nullptr) return {};
  return Status(StatusCode::kResourceExhausted,
                "cannot map the " + in_gib(capacity_bytes_) + " of an emulated device: " + std::strerror(errno));
}

EmulatedMemory::~EmulatedMemory() {
  if (window_ != nullptr) munmap(window_, window_bytes_);
  if (alias_ != nullptr) munmap(alias_, window_bytes_);
  if (fd_ >= 0) close(fd_);
}

StatusOr<std::byte*> EmulatedMemory::take_device(int64_t bytes) {
  if (bytes > capacity_bytes_ - taken_bytes_) {
    return Status(StatusCode::kResourceExhausted, "the emulated device cannot give " + std::to_string(bytes) +
                                                      " bytes (" + in_gib(bytes) + "): " + in_gib(taken_bytes_) +
                                                      " of " + in_gib(capacity_bytes_) + " are taken");
  }
  const int64_t rounded = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  // A page between buffers belongs to none: what runs over the end of one does not reach the next.
  if (next_bytes_ + rounded + kPageBytes > window_bytes_) {
    return Status(StatusCode::kResourceExhausted, "the emulated device has no addresses left");
  }
  if (posix_fallocate(fd_, next_bytes_, rounded) != 0) {
    return Status(StatusCode::kResourceExhausted,
                  "the host has no " + std::to_string(bytes) + " bytes for the emulated device");
  }
  std::byte* data = window_ + next_bytes_;
  next_bytes_ += rounded + kPageBytes;
  taken_bytes_ += bytes;
  return data;
}

StatusOr<std::byte*> EmulatedMemory::allocate(int64_t bytes, Memory memory) {
  if (bytes < 0) return invalid_argument("cannot allocate " + std::to_string(bytes) + " bytes");
  if (bytes == 0) return static_cast<std::byte*>(nullptr);
  Piece piece{.number = num_pieces_, .bytes = bytes, .memory = memory, .pages = {}};
  std::byte* data = nullptr;
  if (memory == Memory::kDevice) {
    MOED_ASSIGN_OR_RETURN(data, take_device(bytes));
  } else {
    MOED_ASSIGN_OR_RETURN(piece.pages, HugePages::allocate(bytes));
    piece.pages.touch();
    data = piece.pages.data();
  }
  ++num_pieces_;
  pieces_.emplace(address_of(data), std::move(piece));
  return data;
}

void EmulatedMemory::release(std::byte* data) {
  const auto at = pieces_.find(address_of(data));
  MOED_CHECK(at != pieces_.end()) << "the emulated device never gave this buffer";
  if (at->second.memory == Memory::kDevice) {
    taken_bytes_ -= at->second.bytes;
    const int64_t rounded = (at->second.bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    MOED_CHECK(fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, data - window_, rounded) == 0)
        << std::strerror(errno);
  }
  pieces_.erase(at);
}

bool EmulatedMemory::is_device(const void* data) const {
  return address_of(data) - address_of(window_) < static_cast<uintptr_t>(window_bytes_);
}

void* EmulatedMemory::translate(const void* data) const {
  if (!is_device(data)) return const_cast<void*>(data);
  return alias_ + (static_cast<const std::byte*>(data) - window_);
}

std::map<uintptr_t, EmulatedMemory::Piece>::const_iterator EmulatedMemory::find(uintptr_t address) const {
  auto at = pieces_.upper_bound(address);
  if (at == pieces_.begin()) return pieces_.end();
  --at;
  return address < at->first + static_cast<uintptr_t>(at->second.bytes) ? at : pieces_.end();
}

void EmulatedMemory::check_range(const void* data, int64_t bytes, const char* op, const char* field) const {
  MOED_CHECK(data != nullptr) << op << ": " << field << " is null";
  const uintptr_t begin = address_of(data);
  const auto at = find(begin);
  if (at == pieces_.end()) {
    MOED_CHECK(!is_device(data)) << op << ": " << field << " is device memory that was never allocated or was freed";
    return;
  }
  MOED_CHECK(begin + static_cast<uintptr_t>(bytes) <= at->first + static_cast<uintptr_t>(at->second.bytes))
      << op << ": " << field << " runs over the end of " << describe(begin, begin + static_cast<uintptr_t>(bytes));
}

void EmulatedMemory::pin(const std::byte* data, int64_t bytes) {
  MOED_CHECK(data != nullptr && bytes > 0) << "pin: " << bytes << " bytes";
  MOED_CHECK(!is_device(data)) << "pin: device memory";
  const uintptr_t begin = address_of(data);
  const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
  std::lock_guard lock(pins_mutex_);
  const auto next = pins_.upper_bound(begin);
  const bool overlaps =
      (next != pins_.end() && end > next->first) || (next != pins_.begin() && std::prev(next)->second > begin);
  MOED_CHECK(!overlaps) << "pin: " << bytes << " bytes of which some are pinned already";
  pins_.emplace(begin, end);
}

void EmulatedMemory::unpin(const std::byte* data) {
  std::lock_guard lock(pins_mutex_);
  MOED_CHECK(pins_.erase(address_of(data)) == 1) << "unpin: nothing that begins there was pinned";
}

bool EmulatedMemory::in_reach(const void* data, int64_t bytes) const {
  const uintptr_t begin = address_of(data);
  const auto at = find(begin);
  if (at != pieces_.end()) return at->second.memory != Memory::kPinned;
  std::lock_guard lock(pins_mutex_);
  const auto next = pins_.upper_bound(begin);
  return next != pins_.begin() && begin + static_cast<uintptr_t>(bytes) <= std::prev(next)->second;
}

bool EmulatedMemory::is_mapped(const void* data, int64_t bytes) const {
  const uintptr_t begin = address_of(data);
  const auto at = find(begin);
  return at != pieces_.end() && at->second.memory == Memory::kMapped &&
         begin + static_cast<uintptr_t>(bytes) <= at->first + static_cast<uintptr_t>(at->second.bytes);
}

std::string EmulatedMemory::describe(uintptr_t begin, uintptr_t end) const {
  const auto at = find(begin);
  if (at == pieces_.end()) return "host memory, " + std::to_string(end - begin) + " bytes";
  return std::string(memory_name(at->second.memory)) + " buffer " + std::to_string(at->second.number) + " (" +
         std::to_string(at->second.bytes) + " bytes), bytes [" + std::to_string(begin - at->first) + ", " +
         std::to_string(end - at->first) + ")";
}

}  // namespace moed
