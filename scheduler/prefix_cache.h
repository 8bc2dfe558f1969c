#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace moed {

// Which block holds the KV of which tokens, so that prompts which begin alike compute their common part once.
//
// Each full block that the cache knows is an entry with a number that is never used again. An entry's key is the number
// of the entry before it (kRoot for a sequence's first block) and its own tokens, all compared, so an entry stands for
// exactly one sequence of tokens from the very first on: a collision of hashes costs time and can never hand out
// another prompt's KV. Entries live in arrays indexed by block; nothing is allocated after construction. Serving thread
// only.
class PrefixCache {
 public:
  using EntryId = int64_t;
  static constexpr EntryId kRoot = 0;
  static constexpr int32_t kNoBlock = -1;

  PrefixCache(int64_t num_blocks, int32_t block_tokens);

  // The block that holds `tokens` after the prefix `before`, or kNoBlock. tokens: [block_tokens].
  int32_t find(EntryId before, std::span<const int32_t> tokens) const;
  // Makes `block` the holder of `tokens` after `before`, unless there is one already. Returns the holder's entry.
  // REQUIRES: the cache does not know `block`.
  EntryId insert(EntryId before, std::span<const int32_t> tokens, int32_t block);
  // Forgets a block whose content is about to change. Entries behind it can no longer be found; they fade by age.
  void erase(int32_t block);

  // Ask for what erase(block) touches ahead of its use: first the entry, then, when that is there, its bucket.
  void prefetch_entry(int32_t block) const { __builtin_prefetch(&entries_[block], 1); }
  void prefetch_bucket(int32_t block) const {
    __builtin_prefetch(&buckets_[entries_[block].hash & (buckets_.size() - 1)], 1);
  }

  bool contains(int32_t block) const { return entries_[block].id != kRoot; }
  // REQUIRES: contains(block)
  EntryId entry(int32_t block) const { return entries_[block].id; }

 private:
  struct Entry {
    EntryId id = kRoot;  // kRoot: the cache does not know this block
    EntryId before = kRoot;
    uint64_t hash = 0;
    int32_t next = kNoBlock;  // in the chain of its bucket
  };

  int32_t find_hashed(uint64_t key, EntryId before, std::span<const int32_t> tokens) const;
  static uint64_t hash(EntryId before, std::span<const int32_t> tokens);
  int32_t& bucket(uint64_t hash) { return buckets_[hash & (buckets_.size() - 1)]; }
  int32_t bucket(uint64_t hash) const { return buckets_[hash & (buckets_.size() - 1)]; }
  std::span<const int32_t> tokens_of(int32_t block) const;

  int32_t block_tokens_;
  EntryId last_id_ = kRoot;
  std::vector<Entry> entries_;    // [num_blocks]
  std::vector<int32_t> tokens_;   // [num_blocks, block_tokens]
  std::vector<int32_t> buckets_;  // a power of two: the first block of each chain
};

}  // namespace moed
