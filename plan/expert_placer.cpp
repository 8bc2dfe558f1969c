#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "base/check.h"
#include "plan/plan.h"

namespace moed {
namespace {

// While no expert has more rows they are sorted by counters; with more the layer takes so long that a sort is nothing.
constexpr int32_t kCountersMax = 255;

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
  // The last one of the order that is streamed. REQUIRES: there is one.
  int32_t last() const {
    if (joins >= end) return joins;
    const int32_t last = leaves == end - 1 ? end - 2 : end - 1;
    return last < begin ? joins : last;
  }
};

double ExpertPlacer::host_us(const ExpertCosts& costs, int32_t count, int64_t rows) const {
  return count * costs.host_base_us + static_cast<double>(rows) * costs.host_row_us;
}

// When the device has run the resident experts and `count` streamed ones of `rows` together. It never rests once it
// rests no more for a copy; as experts come with ever fewer rows, that is so from the first copy on, or else it waits
// for the last one.
double ExpertPlacer::device_us(const ExpertCosts& costs, int32_t count, int64_t rows, int32_t last_rows) const {
  if (count == 0) return resident_us_;
  return std::max(std::max(resident_us_, costs.copy_us) + static_cast<double>(rows) * costs.device_row_us,
                  count * costs.copy_us + last_rows * costs.device_row_us);
}

ExpertPlacer::Ends ExpertPlacer::ends(const ExpertCosts& costs, const Cut& cut) const {
  const auto num_absent = static_cast<int32_t>(order_.size());
  const int32_t count = cut.end - cut.begin;
  int64_t rows = rows_before_[cut.end] - rows_before_[cut.begin];
  if (cut.leaves >= 0) rows += order_[cut.joins].rows - order_[cut.leaves].rows;
  return {.host_us = host_us(costs, num_absent - count, rows_before_.back() - rows),
          .device_us = device_us(costs, count, rows, count > 0 ? order_[cut.last()].rows : 0)};
}

// Both ends of the order: few copies when the experts with most rows are streamed, few rows when those with least are.
// The more are streamed the later the device ends and the sooner the host, so the best is where they meet, or one less.
ExpertPlacer::Cut ExpertPlacer::best_cut(const ExpertCosts& costs) const {
  const auto num_absent = static_cast<int32_t>(order_.size());
  Cut best;
  for (const bool front : {true, false}) {
    const auto cut_of = [&](int32_t count) {
      return front ? Cut{.begin = 0, .end = count} : Cut{.begin = num_absent - count, .end = num_absent};
    };
    int32_t low = 0;
    for (int32_t high = num_absent; low < high;) {
      const int32_t middle = (low + high) / 2;
      const Ends met = ends(costs, cut_of(middle));
      if (met.device_us >= met.host_us) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    for (const int32_t count : {low - 1, low}) {
      if (count < 0) continue;
      Cut cut = cut_of(count);
      cut.us = ends(costs, cut).makespan_us();
      if (cut.us < best.us) best = cut;
    }
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
    const double rows = order_[i].rows - order_[j].rows;
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

void ExpertPlacer::sort_absent(std::span<const int32_t> rows, std::span<Place> places) {
  if (unsorted_.size() < rows.size()) unsorted_.resize(rows.size());
  resident_rows_ = 0;
  int32_t rows_max = 0;
  // Without branches: which experts are wanted cannot be foreseen.
  size_t num_absent = 0;
  for (size_t expert = 0; expert < rows.size(); ++expert) {
    const int32_t wanting = std::max(rows[expert], 0);
    const bool resident = places[expert] == Place::kResident;
    const int32_t absent_rows = resident ? 0 : wanting;
    resident_rows_ += wanting - absent_rows;
    places[expert] = resident ? Place::kResident : Place::kHost;
    unsorted_[num_absent] = {static_cast<int32_t>(expert), absent_rows};
    num_absent += absent_rows > 0 ? 1 : 0;
    rows_max = std::max(rows_max, absent_rows);
  }
  const std::span absent(unsorted_.data(), num_absent);
  order_.resize(num_absent);
  if (rows_max > kCountersMax) {
    std::copy(absent.begin(), absent.end(), order_.begin());
    std::sort(order_.begin(), order_.end(), [](const Absent& a, const Absent& b) {
      return a.rows != b.rows ? a.rows > b.rows : a.expert < b.expert;
    });
  } else {
    std::array<int32_t, kCountersMax + 1> begin;  // of those with so many rows
    std::fill_n(begin.begin(), rows_max + 1, 0);
    for (const Absent& each : absent) ++begin[each.rows];
    for (int32_t r = rows_max, at = 0; r >= 0; --r) at += std::exchange(begin[r], at);
    for (const Absent& each : absent) order_[begin[each.rows]++] = each;
  }
  rows_before_.resize(order_.size() + 1);
  int64_t before = 0;
  for (size_t i = 0; i < order_.size(); ++i) rows_before_[i + 1] = before += order_[i].rows;
}

void ExpertPlacer::place(const ExpertCosts& costs, std::span<const int32_t> rows, std::span<Place> places) {
  MOED_CHECK(rows.size() == places.size()) << rows.size() << " counts of rows for " << places.size() << " places";
  sort_absent(rows, places);
  if (order_.empty() || !costs.device_allowed()) return;
  resident_us_ = static_cast<double>(resident_rows_) * costs.device_row_us;
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
    if (best.streamed(i)) places[order_[i].expert] = Place::kStreamed;
  }
}

}  // namespace moed
