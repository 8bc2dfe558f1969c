#include "offload/read_fences.h"

#include <algorithm>

#include "base/check.h"
#include "base/log.h"

namespace moed {

ReadFences::ReadFences(Device& device, int32_t num_slots) : masks_(num_slots) {
  for (int32_t i = 0; i < kFences; ++i) {
    fences_[i].event = device.make_event();
    fences_[i].slots.reserve(num_slots);
    order_[i] = i;
  }
  dropped_.reserve(num_slots);
}

ReadFences::~ReadFences() {
  // Nobody is left to use what is freed: readers that failed are no reason to abort.
  for (int32_t i = 0; i < num_pending_; ++i) {
    const Status status = fences_[order_[i]].event->join();
    if (!status.ok()) spdlog::error("reading an expert, while closing: {}", status.message());
  }
}

void ReadFences::begin(Stream& reader) {
  open_ = free_fence(reader);
  fences_[open_].reader = &reader;
}

void ReadFences::add(int32_t slot) {
  const uint64_t bit = uint64_t{1} << open_;
  if ((masks_[slot] & bit) != 0) return;
  masks_[slot] |= bit;
  fences_[open_].slots.push_back(slot);
}

void ReadFences::end() {
  fences_[open_].reader->record(*fences_[open_].event);
  open_ = -1;
}

// Where all are taken, the reader's youngest is recorded again: what it covers is free a little later than it might be.
int32_t ReadFences::free_fence(const Stream& reader) {
  if (num_pending_ == kFences) {
    for (int32_t i = kFences - 1; i >= 0; --i) {
      if (fences_[order_[i]].reader != &reader) continue;
      std::rotate(order_.begin() + i, order_.begin() + i + 1, order_.end());
      return order_[kFences - 1];
    }
    join(dropped_);
  }
  return order_[num_pending_++];
}

void ReadFences::poll(std::vector<int32_t>& freed) {
  for (const int32_t slot : dropped_) {
    if (masks_[slot] == 0) freed.push_back(slot);
  }
  dropped_.clear();
  // Fences of a stream are done in order, so the first that is not stops the search among its kind.
  const Stream* late = nullptr;
  for (int32_t i = 0; i < num_pending_;) {
    const Fence& fence = fences_[order_[i]];
    if (fence.reader == late || !fence.event->done()) {
      late = fence.reader;
      ++i;
      continue;
    }
    drop(i, freed);
  }
}

void ReadFences::join(std::vector<int32_t>& freed) {
  MOED_CHECK(any()) << "nobody reads";
  drop(0, freed);
}

void ReadFences::drop(int32_t order, std::vector<int32_t>& freed) {
  const int32_t index = order_[order];
  Fence& fence = fences_[index];
  const Status status = fence.event->join();
  MOED_CHECK(status.ok()) << "reading an expert: " << status.message();
  const uint64_t bit = uint64_t{1} << index;
  for (const int32_t slot : fence.slots) {
    masks_[slot] &= ~bit;
    if (masks_[slot] == 0) freed.push_back(slot);
  }
  fence.slots.clear();
  std::rotate(order_.begin() + order, order_.begin() + order + 1, order_.begin() + num_pending_);
  --num_pending_;
}

}  // namespace moed
