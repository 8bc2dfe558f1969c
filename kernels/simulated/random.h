#pragma once

#include <cstdint>

namespace moed {

// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): the same everywhere, unlike the standard library's distributions.
inline uint64_t next_random(uint64_t& state) {
  uint64_t x = state += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// In [0, 1).
inline double next_uniform(uint64_t& state) { return static_cast<double>(next_random(state) >> 11) * 0x1p-53; }

}  // namespace moed
