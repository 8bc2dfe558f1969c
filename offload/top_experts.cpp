#include "offload/top_experts.h"

#include <algorithm>
#include <bit>
#include <functional>

namespace moed {

// Floats that are not negative are ordered as their bits are. 0 is for those that are excluded.
void TopExperts::make_keys(std::span<const float> scores, std::span<const uint64_t> excluded) {
  const size_t num_experts = keys_.size();
  for (size_t expert = 0; expert < num_experts; ++expert) keys_[expert] = std::bit_cast<uint32_t>(scores[expert]) + 1;
  for (size_t word = 0; word < excluded.size(); ++word) {
    for (uint64_t bits = excluded[word]; bits != 0; bits &= bits - 1) {
      keys_[word * 64 + static_cast<size_t>(std::countr_zero(bits))] = 0;
    }
  }
}

// A guess with as many as are wanted, all of them allowed, bounds both sides: none of the best is below its least, none
// of the others above the greatest that it leaves out. From visit to visit little lies between.
TopExperts::Range TopExperts::range(std::span<const uint64_t> guess, int32_t count) const {
  const auto num_experts = static_cast<int32_t>(keys_.size());
  int32_t num_guessed = 0;
  Range range{.least = INT32_MAX, .greatest = 0};
  for (int32_t begin = 0; begin < num_experts; begin += 64) {
    const uint64_t all = ~uint64_t{0} >> (64 - std::min(num_experts - begin, 64));
    const uint64_t guessed = guess[begin / 64] & all;
    num_guessed += std::popcount(guessed);
    for (uint64_t bits = guessed; bits != 0; bits &= bits - 1) {
      range.least = std::min(range.least, static_cast<int32_t>(keys_[begin + std::countr_zero(bits)]));
    }
    for (uint64_t bits = all & ~guessed; bits != 0; bits &= bits - 1) {
      range.greatest = std::max(range.greatest, static_cast<int32_t>(keys_[begin + std::countr_zero(bits)]));
    }
  }
  return num_guessed == count && range.least > 0 ? range : Range();
}

void TopExperts::choose(std::span<const float> scores, std::span<const uint64_t> excluded,
                        std::span<const uint64_t> preferred, int32_t count, std::span<uint64_t> chosen) {
  make_keys(scores, excluded);
  const Range range = this->range(chosen, count);
  if (range.least > range.greatest) return;  // the guess is right
  int32_t left = count;
  size_t num_candidates = 0;
  for (size_t word = 0; word < above_.size(); ++word) {
    const uint32_t* keys = keys_.data() + word * 64;
    const auto size = static_cast<int32_t>(std::min<size_t>(64, keys_.size() - word * 64));
    above_[word] = bits_where(size, [=](int32_t i) { return static_cast<int32_t>(keys[i]) > range.greatest; });
    ties_[word] = bits_where(size, [=](int32_t i) { return static_cast<int32_t>(keys[i]) >= range.least; });
    ties_[word] &= ~above_[word];
    left -= std::popcount(above_[word]);
    for (uint64_t bits = ties_[word]; bits != 0; bits &= bits - 1) {
      candidates_[num_candidates++] = keys[std::countr_zero(bits)];
    }
  }
  // Of the candidates those above `key` are chosen, and of those that have it as many as there is room for.
  uint32_t key = left > 0 ? 0 : UINT32_MAX;
  if (left > 0 && static_cast<size_t>(left) < num_candidates) {
    const auto nth = candidates_.begin() + (left - 1);
    std::nth_element(candidates_.begin(), nth, candidates_.begin() + static_cast<int64_t>(num_candidates),
                     std::greater<>());
    key = *nth;
  }
  int32_t room = left;
  for (size_t word = 0; word < above_.size(); ++word) {
    uint64_t equal = 0;
    for (uint64_t bits = ties_[word]; bits != 0; bits &= bits - 1) {
      const uint32_t each = keys_[word * 64 + static_cast<size_t>(std::countr_zero(bits))];
      const uint64_t bit = bits & -bits;
      above_[word] |= each > key ? bit : 0;
      equal |= each == key ? bit : 0;
      room -= each > key ? 1 : 0;
    }
    ties_[word] = equal;
  }
  for (const uint64_t others : {uint64_t{0}, ~uint64_t{0}}) {
    for (size_t word = 0; word < above_.size() && room > 0; ++word) {
      for (uint64_t bits = ties_[word] & (preferred[word] ^ others); bits != 0 && room > 0; bits &= bits - 1, --room) {
        above_[word] |= bits & -bits;
      }
    }
  }
  std::copy(above_.begin(), above_.end(), chosen.begin());
}

}  // namespace moed
