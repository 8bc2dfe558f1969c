#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/device.h"

namespace moed {

// Knows until when the device reads which slots. A fence is an event of a reader and the slots it covers; there are 64
// of them, and one that is recorded again later covers what it covered. Serving thread only; allocates at construction
// alone.
class ReadFences {
 public:
  // The device outlives it.
  ReadFences(Device& device, int32_t num_slots);
  // Waits for all readers.
  ~ReadFences();

  // begin(), add() for each slot, end(): what `reader` holds so far may read these slots. Waits only if 64 streams have
  // readers that are not done.
  void begin(Stream& reader);
  void add(int32_t slot);
  void end();

  bool reading(int32_t slot) const { return masks_[slot] != 0; }
  bool any() const { return num_pending_ > 0; }
  // Appends the slots that have no reader any more. Never waits.
  void poll(std::vector<int32_t>& freed);
  // As poll(), but first waits for the oldest fence. REQUIRES: any().
  void join(std::vector<int32_t>& freed);

 private:
  static constexpr int32_t kFences = 64;
  struct Fence {
    std::unique_ptr<Event> event;
    Stream* reader = nullptr;
    std::vector<int32_t> slots;
  };

  int32_t free_fence(const Stream& reader);
  // The fence is done: ends what it says.
  void drop(int32_t order, std::vector<int32_t>& freed);

  std::array<Fence, kFences> fences_;
  std::array<int32_t, kFences> order_{};  // the first num_pending_ are pending, oldest first; the others free
  int32_t num_pending_ = 0;
  int32_t open_ = -1;             // between begin() and end()
  std::vector<uint64_t> masks_;   // [slot]: the fences that cover it
  std::vector<int32_t> dropped_;  // by free_fence(): for the next poll()
};

}  // namespace moed
