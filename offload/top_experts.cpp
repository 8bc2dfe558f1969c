#include "offload/top_experts.h"

#include <algorithm>
#include <bit>

namespace moed {

int32_t TopExperts::num_above(uint32_t key) const {
  int32_t count = 0;
  for (const uint32_t each : keys_) count += static_cast<int32_t>(each) > static_cast<int32_t>(key) ? 1 : 0;
  return count;
}

// Floats that are not negative are ordered as their bits are, so the key that separates the best is found by bisection,
// whose steps are vectors. 0 is for those that are excluded.
void TopExperts::choose(std::span<const float> scores, std::span<const uint64_t> excluded,
                        std::span<const uint64_t> preferred, int32_t count, std::span<uint64_t> chosen) {
  const auto num_experts = static_cast<int32_t>(keys_.size());
  for (int32_t expert = 0; expert < num_experts; ++expert) keys_[expert] = std::bit_cast<uint32_t>(scores[expert]) + 1;
  for (size_t word = 0; word < excluded.size(); ++word) {
    for (uint64_t bits = excluded[word]; bits != 0; bits &= bits - 1) {
      keys_[word * 64 + static_cast<size_t>(std::countr_zero(bits))] = 0;
    }
  }
  // At most `count` are above high; more are above low, or low is 0.
  uint32_t low = 0;
  uint32_t high = *std::max_element(keys_.begin(), keys_.end());
  int32_t above = 0;
  while (high - low > 1 && above != count) {
    const uint32_t middle = low + (high - low) / 2;
    const int32_t num = num_above(middle);
    if (num > count) {
      low = middle;
    } else {
      high = middle;
      above = num;
    }
  }
  // Of those that are equal to high some may come too.
  int32_t ties = count - num_above(high);
  for (const bool turn : {true, false}) {
    for (int32_t expert = 0; expert < num_experts && ties > 0 && high > 0; ++expert) {
      if (keys_[expert] != high || has_bit(preferred, expert) != turn) continue;
      keys_[expert] = high + 1;
      --ties;
    }
  }
  std::fill(chosen.begin(), chosen.end(), 0);
  for (int32_t expert = 0; expert < num_experts; ++expert) {
    if (keys_[expert] > high) set_bit(chosen, expert);
  }
}

}  // namespace moed
