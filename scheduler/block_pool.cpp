#include "scheduler/block_pool.h"

#include "base/check.h"

namespace moed {
namespace {

// Blocks whose prefix entries are asked for ahead of their reuse.
constexpr int32_t kVictimsAhead = 4;

}  // namespace

BlockPool::BlockPool(int64_t num_blocks, int32_t block_tokens_in)
    : block_tokens(block_tokens_in), allocator(num_blocks), cache(num_blocks, block_tokens_in) {}

int32_t BlockPool::take() {
  const std::optional<BlockAllocator::Taken> taken = allocator.take();
  MOED_CHECK(taken.has_value()) << "no free block";
  if (taken->was_cached) {
    // The blocks that go next, in time: nearer ones have their entries by now.
    if (const int32_t far = allocator.coming(2 * kVictimsAhead); far >= 0) cache.prefetch_entry(far);
    if (const int32_t near = allocator.coming(kVictimsAhead); near >= 0) cache.prefetch_bucket(near);
    cache.erase(taken->block);
  }
  return taken->block;
}

void BlockPool::release(std::vector<int32_t>& blocks) {
  // Back to front: of what the prefix cache keeps, the ends of sequences are reused before the beginnings they need.
  for (size_t i = blocks.size(); i-- > 0;) allocator.release(blocks[i], cache.contains(blocks[i]));
  blocks.clear();
}

std::vector<int32_t> BlockPool::find(std::span<const int32_t> tokens) const {
  std::vector<int32_t> blocks;
  const auto step = static_cast<size_t>(block_tokens);
  PrefixCache::EntryId prefix = PrefixCache::kRoot;
  for (size_t begin = 0; begin + step < tokens.size(); begin += step) {
    const int32_t block = cache.find(prefix, tokens.subspan(begin, step));
    if (block == PrefixCache::kNoBlock) break;
    blocks.push_back(block);
    prefix = cache.entry(block);
  }
  return blocks;
}

}  // namespace moed
