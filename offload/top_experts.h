#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace moed {

// A bit for each expert of a layer.
using ExpertBits = std::vector<uint64_t>;

inline size_t num_words(int32_t num_experts) { return (static_cast<size_t>(num_experts) + 63) / 64; }
inline bool has_bit(std::span<const uint64_t> bits, int32_t index) {
  return (bits[index / 64] >> (index % 64) & 1) != 0;
}
inline void set_bit(std::span<uint64_t> bits, int32_t index) { bits[index / 64] |= uint64_t{1} << index % 64; }
inline void clear_bit(std::span<uint64_t> bits, int32_t index) { bits[index / 64] &= ~(uint64_t{1} << index % 64); }

// where(index): whether it counts. size: of [0, 64] indices.
template <typename Where>
uint64_t bits_where(int32_t size, Where where) {
  std::array<uint8_t, 64> flags{};
  if (size == 64) {  // a constant, so that it becomes vectors
    for (int32_t i = 0; i < 64; ++i) flags[i] = where(i) ? 1 : 0;
  } else {
    for (int32_t i = 0; i < size; ++i) flags[i] = where(i) ? 1 : 0;
  }
  uint64_t bits = 0;
  for (size_t byte = 0; byte < 8; ++byte) {
    // The product brings the lowest bits of eight bytes together in the highest byte.
    uint64_t eight = 0;
    std::memcpy(&eight, flags.data() + byte * 8, 8);
    bits |= (eight * 0x0102040810204080 >> 56) << byte * 8;
  }
  return bits;
}
// bits: of all whose number is above 0.
inline void bits_above_0(std::span<const int32_t> numbers, std::span<uint64_t> bits) {
  for (size_t word = 0; word < bits.size(); ++word) {
    const auto some = numbers.subspan(word * 64, std::min<size_t>(64, numbers.size() - word * 64));
    bits[word] = bits_where(static_cast<int32_t>(some.size()), [&](int32_t i) { return some[i] > 0; });
  }
}

// Finds the experts with the highest scores, none of them negative. Allocates at construction alone.
class TopExperts {
 public:
  explicit TopExperts(int32_t num_experts)
      : keys_(num_experts), candidates_(num_experts), above_(num_words(num_experts)), ties_(num_words(num_experts)) {}
  // chosen: the `count` best that are not in `excluded`, or all if there are fewer. Among equals those in `preferred`
  // come first, then the lower. chosen may be one of the others; what it holds is a guess: the nearer, the faster.
  void choose(std::span<const float> scores, std::span<const uint64_t> excluded, std::span<const uint64_t> preferred,
              int32_t count, std::span<uint64_t> chosen);

 private:
  // The `count` best have keys in [least, inf), the others in [0, greatest].
  struct Range {
    int32_t least = 1;
    int32_t greatest = INT32_MAX;
  };

  void make_keys(std::span<const float> scores, std::span<const uint64_t> excluded);
  Range range(std::span<const uint64_t> guess, int32_t count) const;

  std::vector<uint32_t> keys_;
  std::vector<uint32_t> candidates_;
  ExpertBits above_;
  ExpertBits ties_;
};

}  // namespace moed
