#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace moed {

// The blocks of a KV pool: who refers to each, and which are free. A free block is either blank, or it still holds
// tokens that the prefix cache knows ("cached"); blank ones are handed out first, then cached ones, the longest unused
// first. Every operation is O(1). Serving thread only.
class BlockAllocator {
 public:
  struct Taken {
    int32_t block = 0;
    bool was_cached = false;  // the caller must make the prefix cache forget it
  };

  explicit BlockAllocator(int64_t num_blocks);

  // A block with one reference; empty when none is free.
  std::optional<Taken> take();
  // The cached free block that goes after so many others, or -1. For prefetching: asks for what the next call needs.
  int32_t coming(int32_t ahead) const;
  // One more reference. REQUIRES: the block is referenced, or free and cached.
  void share(int32_t block);
  // One reference less. The last one frees the block; `cached` says whether it keeps its tokens for the prefix cache.
  void release(int32_t block, bool cached);

  int64_t num_blocks() const { return static_cast<int64_t>(references_.size()); }
  // Blank and cached ones.
  int64_t num_free() const { return static_cast<int64_t>(blank_.size()) + num_cached_; }
  int64_t num_used() const { return num_blocks() - num_free(); }
  int32_t references(int32_t block) const { return references_[block]; }

  // Test hook: dies with a message when the free lists and the reference counts disagree.
  void check_invariants() const;

 private:
  // Neighbours in the list of cached free blocks; that of `num_blocks` is the list's head.
  struct Link {
    int32_t previous = kUnlinked;
    int32_t next = kUnlinked;
  };
  static constexpr int32_t kUnlinked = -1;

  int32_t head() const { return static_cast<int32_t>(references_.size()); }
  void unlink(int32_t block);
  void link_last(int32_t block);

  std::vector<int32_t> references_;  // [num_blocks]
  std::vector<int32_t> blank_;       // a stack
  std::vector<Link> links_;          // [num_blocks + 1], oldest first
  int64_t num_cached_ = 0;
};

}  // namespace moed
