#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "scheduler/block_allocator.h"
#include "scheduler/prefix_cache.h"

namespace moed {

// One KV pool: its blocks, and which tokens they hold. Block numbers are the pool's own. Serving thread only.
struct BlockPool {
  BlockPool(int64_t num_blocks, int32_t block_tokens);

  // A block to be written. REQUIRES: one is free.
  int32_t take();
  // Gives up a sequence's blocks, and empties the list.
  void release(std::vector<int32_t>& blocks);
  // The blocks of the prefix cache that hold the first of `tokens`; never the last one, which must be computed to be
  // answered.
  std::vector<int32_t> find(std::span<const int32_t> tokens) const;

  const int32_t block_tokens;
  BlockAllocator allocator;
  PrefixCache cache;
};

}  // namespace moed
