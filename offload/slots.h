#pragma once

#include <cstdint>
#include <vector>

namespace moed {

// How far the bytes of a slot are.
enum class Fill : uint8_t { kEmpty, kQueued, kCopying, kSubmitted, kArrived };

// One expert's room in device memory.
struct Slot {
  int32_t expert = -1;  // index among all routed experts
  int32_t leases = 0;
  int64_t bytes_submitted = 0;
  Fill fill = Fill::kEmpty;
  bool resident = false;
  bool kept = false;     // by the cache; neither resident nor kept: passes through
  bool ahead = false;    // prefetched; it waits for somebody to lease it
  bool offered = false;  // leased by acquire_present() since routed() last spoke of its layer
  bool unused = false;   // prefetched; no row has wanted it yet
  // The list it is in, and its neighbours there.
  int8_t list = -1;
  int32_t previous = -1;
  int32_t next = -1;
};

// A list of slots, linked within them.
class SlotList {
 public:
  // The slots outlive it. id: not that of another list of theirs.
  SlotList(std::vector<Slot>& slots, int8_t id) : slots_(slots), id_(id) {}
  int32_t front() const { return front_; }
  int32_t back() const { return back_; }
  int32_t size() const { return size_; }
  int32_t after(int32_t slot) const { return slots_[slot].next; }
  bool holds(int32_t slot) const { return slots_[slot].list == id_; }

  void push_back(int32_t slot) {
    slots_[slot].list = id_;
    slots_[slot].previous = back_;
    slots_[slot].next = -1;
    (back_ < 0 ? front_ : slots_[back_].next) = slot;
    back_ = slot;
    ++size_;
  }
  void push_front(int32_t slot) {
    slots_[slot].list = id_;
    slots_[slot].previous = -1;
    slots_[slot].next = front_;
    (front_ < 0 ? back_ : slots_[front_].previous) = slot;
    front_ = slot;
    ++size_;
  }
  // REQUIRES: holds(slot).
  void remove(int32_t slot) {
    Slot& gone = slots_[slot];
    (gone.previous < 0 ? front_ : slots_[gone.previous].next) = gone.next;
    (gone.next < 0 ? back_ : slots_[gone.next].previous) = gone.previous;
    gone.list = -1;
    gone.previous = gone.next = -1;
    --size_;
  }

 private:
  std::vector<Slot>& slots_;
  const int8_t id_;
  int32_t front_ = -1;
  int32_t back_ = -1;
  int32_t size_ = 0;
};

}  // namespace moed
