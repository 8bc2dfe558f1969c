#include "kernels/emulated/race_checker.h"

#include <algorithm>

#include "base/check.h"

namespace moed {
namespace {

constexpr int32_t kHost = 0;
// Segments that may gather before those that no race can concern any more are swept out.
constexpr size_t kSegmentsMin = 4096;

uint64_t time_of(const VectorClock& clock, int32_t actor) {
  return static_cast<size_t>(actor) < clock.size() ? clock[actor] : 0;
}

}  // namespace

int32_t RaceChecker::add_stream() {
  clocks_.emplace_back();
  return static_cast<int32_t>(clocks_.size()) - 1;
}

void RaceChecker::join(int32_t actor, const VectorClock& seen) {
  VectorClock& clock = clocks_[actor];
  if (clock.size() < seen.size()) clock.resize(seen.size());
  for (size_t i = 0; i < seen.size(); ++i) clock[i] = std::max(clock[i], seen[i]);
  if (actor == kHost) drop_seen();
}

uint64_t RaceChecker::begin(int32_t actor, const char* op) {
  if (actor != kHost) join(actor, clocks_[kHost]);
  VectorClock& clock = clocks_[actor];
  if (clock.size() <= static_cast<size_t>(actor)) clock.resize(actor + 1);
  now_ = {actor, ++clock[actor], op, nullptr};
  return now_.time;
}

bool RaceChecker::host_has_seen(int32_t actor, uint64_t time) const { return time_of(clocks_[kHost], actor) >= time; }

bool RaceChecker::host_has_seen(const VectorClock& clock) const {
  for (size_t actor = 0; actor < clock.size(); ++actor) {
    if (!host_has_seen(static_cast<int32_t>(actor), clock[actor])) return false;
  }
  return true;
}

// What the host has seen comes before all that anybody will do.
void RaceChecker::drop_seen() {
  if (segments_.size() <= 2 * segments_kept_ + kSegmentsMin) return;
  const auto seen = [&](const Toucher& toucher) {
    return toucher.actor < 0 || host_has_seen(toucher.actor, toucher.time);
  };
  std::erase_if(segments_, [&](const Segments::value_type& segment) {
    const std::vector<Toucher>& readers = segment.second.readers;
    return seen(segment.second.writer) && std::all_of(readers.begin(), readers.end(), seen);
  });
  segments_kept_ = segments_.size();
}

RaceChecker::Segments::iterator RaceChecker::cut(uintptr_t at) {
  auto next = segments_.lower_bound(at);
  if (next != segments_.end() && next->first == at) return next;
  if (next == segments_.begin()) return segments_.end();
  const auto before = std::prev(next);
  if (before->second.end <= at) return segments_.end();
  const auto piece = segments_.emplace_hint(next, at, before->second);
  before->second.end = at;
  return piece;
}

void RaceChecker::access(Access access, const void* data, int64_t bytes, const char* field) {
  now_.field = field;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
  cut(begin);
  cut(end);
  auto segment = segments_.lower_bound(begin);
  for (uintptr_t at = begin; at < end;) {
    if (segment == segments_.end() || segment->first > at) {
      const uintptr_t gap_end = segment == segments_.end() ? end : std::min(end, segment->first);
      segment = segments_.emplace_hint(segment, at, Segment{.end = gap_end, .writer = {}, .readers = {}});
    }
    touch(*segment, access != Access::kWrite, access != Access::kRead);
    at = segment->second.end;
    ++segment;
  }
}

void RaceChecker::touch(Segments::value_type& segment, bool reads, bool writes) {
  Segment& history = segment.second;
  check(history.writer, true, writes, segment);
  if (writes) {
    for (const Toucher& reader : history.readers) check(reader, false, true, segment);
    history.readers.clear();
    history.writer = now_;
  } else if (reads) {
    const auto own = std::find_if(history.readers.begin(), history.readers.end(),
                                  [&](const Toucher& reader) { return reader.actor == now_.actor; });
    if (own == history.readers.end()) {
      history.readers.push_back(now_);
    } else {
      *own = now_;
    }
  }
}

bool RaceChecker::ordered(const Toucher& earlier) const {
  return earlier.actor < 0 || time_of(clocks_[now_.actor], earlier.actor) >= earlier.time;
}

std::string RaceChecker::name(const Toucher& toucher, bool writes) const {
  const std::string who = toucher.actor == kHost ? "the host" : "stream " + std::to_string(toucher.actor);
  return std::string(toucher.op) + (writes ? " writes " : " reads ") + toucher.field + " on " + who;
}

void RaceChecker::check(const Toucher& earlier, bool earlier_writes, bool writes,
                        const Segments::value_type& segment) const {
  MOED_CHECK(ordered(earlier)) << "race: " << name(now_, writes) << ", " << name(earlier, earlier_writes)
                               << ", and nothing orders them: " << memory_.describe(segment.first, segment.second.end);
}

void RaceChecker::forget(const void* data, int64_t bytes) {
  access(Access::kWrite, data, bytes, "memory");
  const auto begin = reinterpret_cast<uintptr_t>(data);
  segments_.erase(segments_.lower_bound(begin), segments_.lower_bound(begin + static_cast<uintptr_t>(bytes)));
}

}  // namespace moed
