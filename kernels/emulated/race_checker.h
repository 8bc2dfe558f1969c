#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "kernels/device.h"
#include "kernels/emulated/emulated_memory.h"

namespace moed {

// Who has done how much, as far as somebody knows: [actor]. Actor 0 is the host, the others are streams. Shorter
// clocks know nothing of later actors.
using VectorClock = std::vector<uint64_t>;

// Decides from the order of enqueueing alone whether two accesses to the same bytes, one of them a write, are ordered
// by streams, events and joins; dies naming both when they are not. So it finds a race whether or not it showed.
class RaceChecker {
 public:
  explicit RaceChecker(const EmulatedMemory& memory) : memory_(memory), clocks_(1) {}

  int32_t add_stream();
  // What follows until the next begin() is the access of `op` on the stream (actor 0: of host code). It comes after all
  // that the host has done or joined. Returns the op's time on its actor.
  uint64_t begin(int32_t actor, const char* op);
  void access(Access access, const void* data, int64_t bytes, const char* field);
  const VectorClock& clock(int32_t actor) const { return clocks_[actor]; }
  // What the actor does from now on comes after all that `seen` covers.
  void join(int32_t actor, const VectorClock& seen);
  // Whether the host has waited for what the actor did at that time.
  bool host_has_seen(int32_t actor, uint64_t time) const;
  bool host_has_seen(const VectorClock& clock) const;
  // REQUIRES: begin(). The bytes are given back: a write, and nothing is known of them after.
  void forget(const void* data, int64_t bytes);

 private:
  struct Toucher {
    int32_t actor = -1;  // -1: nobody yet
    uint64_t time = 0;
    const char* op = nullptr;
    const char* field = nullptr;
  };
  // Bytes of one history.
  struct Segment {
    uintptr_t end = 0;
    Toucher writer;
    std::vector<Toucher> readers;  // since that write, one an actor
  };
  using Segments = std::map<uintptr_t, Segment>;

  bool ordered(const Toucher& earlier) const;
  void check(const Toucher& earlier, bool earlier_writes, bool writes, const Segments::value_type& segment) const;
  void touch(Segments::value_type& segment, bool reads, bool writes);
  // The segment that begins there, cut off what lies before; end() when none covers it.
  Segments::iterator cut(uintptr_t at);
  void drop_seen();
  std::string name(const Toucher& toucher, bool writes) const;

  const EmulatedMemory& memory_;
  std::vector<VectorClock> clocks_;
  Toucher now_;
  Segments segments_;
  size_t segments_kept_ = 0;  // after the last sweep
};

}  // namespace moed
