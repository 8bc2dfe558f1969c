#include "scheduler/prefix_cache.h"

#include <algorithm>
#include <bit>

#include "base/check.h"

namespace moed {

PrefixCache::PrefixCache(int64_t num_blocks, int32_t block_tokens)
    : block_tokens_(block_tokens),
      entries_(num_blocks),
      tokens_(num_blocks * block_tokens),
      buckets_(std::bit_ceil(static_cast<uint64_t>(2 * num_blocks)), kNoBlock) {}

uint64_t PrefixCache::hash(EntryId before, std::span<const int32_t> tokens) {
  // Multiply and fold, a token at a time; only speed depends on its quality.
  auto state = static_cast<uint64_t>(before) * 0x9e3779b97f4a7c15ULL;
  for (const int32_t token : tokens) {
    state = (state ^ static_cast<uint32_t>(token)) * 0xff51afd7ed558ccdULL;
    state ^= state >> 32;
  }
  return state;
}

std::span<const int32_t> PrefixCache::tokens_of(int32_t block) const {
  return {tokens_.data() + int64_t{block} * block_tokens_, static_cast<size_t>(block_tokens_)};
}

int32_t PrefixCache::find(EntryId before, std::span<const int32_t> tokens) const {
  return find_hashed(hash(before, tokens), before, tokens);
}

int32_t PrefixCache::find_hashed(uint64_t key, EntryId before, std::span<const int32_t> tokens) const {
  for (int32_t block = bucket(key); block != kNoBlock; block = entries_[block].next) {
    const Entry& candidate = entries_[block];
    if (candidate.hash == key && candidate.before == before && std::ranges::equal(tokens_of(block), tokens))
      return block;
  }
  return kNoBlock;
}

PrefixCache::EntryId PrefixCache::insert(EntryId before, std::span<const int32_t> tokens, int32_t block) {
  MOED_CHECK(static_cast<int32_t>(tokens.size()) == block_tokens_) << "only full blocks are shared";
  MOED_CHECK(!contains(block)) << "block " << block << " is in the prefix cache already";
  const uint64_t key = hash(before, tokens);
  if (const int32_t holder = find_hashed(key, before, tokens); holder != kNoBlock) return entries_[holder].id;
  entries_[block] = {.id = ++last_id_, .before = before, .hash = key, .next = bucket(key)};
  bucket(key) = block;
  std::ranges::copy(tokens, tokens_.begin() + int64_t{block} * block_tokens_);
  return last_id_;
}

void PrefixCache::erase(int32_t block) {
  MOED_CHECK(contains(block)) << "block " << block << " is not in the prefix cache";
  int32_t* link = &bucket(entries_[block].hash);
  while (*link != block) link = &entries_[*link].next;
  *link = entries_[block].next;
  entries_[block] = {};
}

}  // namespace moed
