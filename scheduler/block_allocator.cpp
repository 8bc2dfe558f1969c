#include "scheduler/block_allocator.h"

#include "base/check.h"

namespace moed {

BlockAllocator::BlockAllocator(int64_t num_blocks) : references_(num_blocks, 0), links_(num_blocks + 1) {
  MOED_CHECK(num_blocks >= 0) << "a pool of " << num_blocks << " blocks";
  blank_.reserve(num_blocks);
  // Low numbers on top of the stack.
  for (int64_t block = num_blocks - 1; block >= 0; --block) blank_.push_back(static_cast<int32_t>(block));
  links_[head()] = {.previous = head(), .next = head()};
}

std::optional<BlockAllocator::Taken> BlockAllocator::take() {
  if (!blank_.empty()) {
    const int32_t block = blank_.back();
    blank_.pop_back();
    references_[block] = 1;
    return Taken{.block = block, .was_cached = false};
  }
  if (num_cached_ == 0) return std::nullopt;
  const int32_t block = links_[head()].next;
  unlink(block);
  references_[block] = 1;
  return Taken{.block = block, .was_cached = true};
}

void BlockAllocator::share(int32_t block) {
  if (references_[block] == 0) {
    MOED_CHECK(links_[block].next != kUnlinked) << "block " << block << " is blank";
    unlink(block);
  }
  ++references_[block];
}

void BlockAllocator::release(int32_t block, bool cached) {
  MOED_CHECK(references_[block] > 0) << "block " << block << " is free already";
  if (--references_[block] > 0) return;
  if (cached) {
    link_last(block);
  } else {
    blank_.push_back(block);
  }
}

int32_t BlockAllocator::coming(int32_t ahead) const {
  int32_t block = links_[head()].next;
  for (; ahead > 0 && block != head(); --ahead) block = links_[block].next;
  if (block == head()) return -1;
  __builtin_prefetch(&links_[block]);
  return block;
}

void BlockAllocator::unlink(int32_t block) {
  Link& link = links_[block];
  links_[link.previous].next = link.next;
  links_[link.next].previous = link.previous;
  link = {};
  --num_cached_;
}

void BlockAllocator::link_last(int32_t block) {
  const int32_t last = links_[head()].previous;
  links_[block] = {.previous = last, .next = head()};
  links_[last].next = block;
  links_[head()].previous = block;
  ++num_cached_;
}

void BlockAllocator::check_invariants() const {
  std::vector<bool> free(references_.size(), false);
  for (const int32_t block : blank_) {
    MOED_CHECK(references_[block] == 0 && !free[block]) << "blank block " << block << " is used or listed twice";
    free[block] = true;
  }
  int64_t num_cached = 0;
  for (int32_t block = links_[head()].next; block != head(); block = links_[block].next) {
    MOED_CHECK(references_[block] == 0 && !free[block]) << "cached free block " << block << " is used or listed twice";
    MOED_CHECK(links_[links_[block].next].previous == block) << "broken list at block " << block;
    free[block] = true;
    ++num_cached;
  }
  MOED_CHECK(num_cached == num_cached_) << num_cached << " cached free blocks, counted " << num_cached_;
  for (size_t block = 0; block < references_.size(); ++block) {
    MOED_CHECK(references_[block] >= 0) << "block " << block << " has " << references_[block] << " references";
    MOED_CHECK((references_[block] == 0) == free[block]) << "block " << block << " is neither used nor free, or both";
  }
}

}  // namespace moed
