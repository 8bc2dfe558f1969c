#pragma once

#include <cstdint>
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

// Finds the experts with the highest scores, none of them negative. Allocates at construction alone.
class TopExperts {
 public:
  explicit TopExperts(int32_t num_experts) : keys_(num_experts) {}
  // chosen: the `count` best that are not in `excluded`, or all if there are fewer. Among equals those in `preferred`
  // come first, then the lower. chosen may be one of the others.
  void choose(std::span<const float> scores, std::span<const uint64_t> excluded, std::span<const uint64_t> preferred,
              int32_t count, std::span<uint64_t> chosen);

 private:
  int32_t num_above(uint32_t key) const;

  std::vector<uint32_t> keys_;
};

}  // namespace moed
