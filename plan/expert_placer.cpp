#include <algorithm>
#include <limits>

#include "base/check.h"
#include "plan/plan.h"

namespace moed {
namespace {

// Most rows first, then the lower expert, as one number that sorts.
uint64_t sort_key(int32_t rows, size_t expert) {
  return (static_cast<uint64_t>(UINT32_MAX - static_cast<uint32_t>(rows)) << 32) | expert;
}
int32_t rows_of(uint64_t key) { return static_cast<int32_t>(UINT32_MAX - static_cast<uint32_t>(key >> 32)); }
size_t expert_of(uint64_t key) { return static_cast<size_t>(key & UINT32_MAX); }

}  // namespace

// The absent experts [begin, end) of the order are streamed, the others run on the host; but for `leaves`, which goes
// to the host, and `joins`, which is streamed instead (-1: neither).
struct ExpertPlacer::Cut {
  int32_t begin = 0;
  int32_t end = 0;
  int32_t leaves = -1;
  int32_t joins = -1;
  double us = std::numeric_limits<double>::infinity();

  bool streamed(int32_t i) const { return i == joins || (i >= begin && i < end && i != leaves); }
};

ExpertPlacer::Ends ExpertPlacer::ends(const ExpertCosts& costs, const Cut& cut) const {
  Ends ends{.host_us = 0.0, .device_us = resident_us_};
  double copy_us = 0.0;
  for (int32_t i = 0; i < static_cast<int32_t>(order_.size()); ++i) {
    const double rows = rows_of(order_[i]);
    if (cut.streamed(i)) {
      copy_us += costs.copy_us;
      ends.device_us = std::max(ends.device_us, copy_us) + rows * costs.device_row_us;
    } else {
      ends.host_us += costs.host_base_us + rows * costs.host_row_us;
    }
  }
  return ends;
}

// Both ends of the order: few copies when the experts with most rows are streamed, few rows when those with least are.
ExpertPlacer::Cut ExpertPlacer::best_cut(const ExpertCosts& costs) const {
  const auto num_absent = static_cast<int32_t>(order_.size());
  double all_host_us = 0.0;
  for (const uint64_t key : order_) all_host_us += costs.host_base_us + rows_of(key) * costs.host_row_us;
  Cut best{.us = std::max(all_host_us, resident_us_)};
  double copy_us = 0.0, device_us = resident_us_, host_us = all_host_us;
  for (int32_t end = 1; end <= num_absent; ++end) {
    const double rows = rows_of(order_[end - 1]);
    copy_us += costs.copy_us;
    device_us = std::max(device_us, copy_us) + rows * costs.device_row_us;
    host_us -= costs.host_base_us + rows * costs.host_row_us;
    if (const double us = std::max(device_us, host_us); us < best.us) best = {.begin = 0, .end = end, .us = us};
  }
  // One more at the front delays all copies behind it by one.
  double rows_us = 0.0, arrivals_us = 0.0;
  host_us = all_host_us;
  for (int32_t begin = num_absent - 1; begin >= 0; --begin) {
    const double rows = rows_of(order_[begin]);
    rows_us += rows * costs.device_row_us;
    arrivals_us = costs.copy_us + std::max(rows_us, arrivals_us);
    host_us -= costs.host_base_us + rows * costs.host_row_us;
    const double us = std::max({resident_us_ + rows_us, arrivals_us, host_us});
    if (us < best.us) best = {.begin = begin, .end = num_absent, .us = us};
  }
  return best;
}

// The streamed expert and the one of the host that should change places: those whose rows differ by what would let both
// sides end together, as near as there are. The order falls, so one walk over both meets every nearest pair.
void ExpertPlacer::swap_one(const ExpertCosts& costs, Cut& cut) const {
  const auto num_absent = static_cast<int32_t>(order_.size());
  const int32_t host_begin = cut.begin == 0 ? cut.end : 0;
  const int32_t host_end = cut.begin == 0 ? num_absent : cut.begin;
  const Ends before = ends(costs, cut);
  cut.us = before.makespan_us();
  const double wanted_rows = (before.device_us - before.host_us) / (costs.host_row_us + costs.device_row_us);
  double nearest_us = std::numeric_limits<double>::infinity();
  Cut swapped = cut;
  for (int32_t i = cut.begin, j = host_begin; i < cut.end && j < host_end;) {
    const double rows = rows_of(order_[i]) - rows_of(order_[j]);
    const double us =
        std::max(before.host_us + rows * costs.host_row_us, before.device_us - rows * costs.device_row_us);
    if (us < nearest_us) {
      nearest_us = us;
      swapped.leaves = i;
      swapped.joins = j;
    }
    if (rows > wanted_rows) {
      ++i;
    } else {
      ++j;
    }
  }
  if (swapped.leaves < 0) return;
  swapped.us = ends(costs, swapped).makespan_us();
  if (swapped.us < cut.us) cut = swapped;
}

void ExpertPlacer::place(const ExpertCosts& costs, std::span<const int32_t> rows, std::span<Place> places) {
  MOED_CHECK(rows.size() == places.size()) << rows.size() << " counts of rows for " << places.size() << " places";
  order_.clear();
  resident_us_ = 0.0;
  for (size_t expert = 0; expert < rows.size(); ++expert) {
    if (places[expert] == Place::kResident) {
      if (rows[expert] > 0) resident_us_ += rows[expert] * costs.device_row_us;
      continue;
    }
    places[expert] = Place::kHost;
    if (rows[expert] > 0) order_.push_back(sort_key(rows[expert], expert));
  }
  if (order_.empty() || !costs.device_allowed()) return;
  std::sort(order_.begin(), order_.end());
  const auto num_absent = static_cast<int32_t>(order_.size());
  Cut best{.begin = 0, .end = num_absent};
  if (costs.host_allowed()) {
    const Cut middle = best_cut(costs);
    best = middle;
    for (const int32_t by : {-1, 0, 1}) {
      // The cut stands at the end of the streamed ones, or at their beginning.
      Cut cut{.begin = middle.begin, .end = middle.end};
      int32_t& at = middle.begin == 0 ? cut.end : cut.begin;
      at += by;
      if (at < 0 || at > num_absent) continue;
      swap_one(costs, cut);
      if (cut.us < best.us) best = cut;
    }
  }
  for (int32_t i = 0; i < num_absent; ++i) {
    if (best.streamed(i)) places[expert_of(order_[i])] = Place::kStreamed;
  }
}

}  // namespace moed
