#include <algorithm>
#include <vector>

#include "base/check.h"
#include "scheduler/state.h"

namespace moed {

void Scheduler::State::check_invariants() const {
  for (const BlockPool& pool : pools) pool.allocator.check_invariants();
  check_requests();
  check_running();
  check_pass(PassKind::kInteractive);
  check_pass(PassKind::kBulk);
}

// Counters against what they count; each block's references against who refers to it.
void Scheduler::State::check_requests() const {
  std::array<std::vector<int32_t>, 2> references;
  for (size_t pool = 0; pool < pools.size(); ++pool) references[pool].resize(pools[pool].allocator.num_blocks());
  int32_t num_waiting = 0, num_with_queued = 0, num_new = 0;
  size_t num_sequences_leaving = 0;
  int64_t num_new_tokens = 0;
  for (const auto& [id, request] : requests) {
    int32_t num_queued = 0, num_open = 0, num_leaving = 0;
    for (const auto& sequence : request->sequences) {
      const bool queued = sequence->phase == Phase::kWaiting || sequence->phase == Phase::kFollowing;
      MOED_CHECK((sequence->phase == Phase::kWaiting) == waiting.contains(sequence.get())) << "request " << id;
      MOED_CHECK(!queued || (sequence->blocks.empty() && sequence->num_cached == 0 && !sequence->pass))
          << "request " << id;
      MOED_CHECK(sequence->phase != Phase::kEnded || sequence->pass || sequence->blocks.empty()) << "request " << id;
      num_queued += queued ? 1 : 0;
      num_waiting += sequence->phase == Phase::kWaiting ? 1 : 0;
      num_open += sequence->phase != Phase::kEnded ? 1 : 0;
      num_leaving += sequence->phase == Phase::kEnded && sequence->pass ? 1 : 0;
      for (const int32_t block : sequence->blocks) ++references[static_cast<size_t>(sequence->pool)].at(block);
      MOED_CHECK(sequence->phase != Phase::kFollowing || request->leader->phase == Phase::kWaiting ||
                 request->leader->phase == Phase::kRunning)
          << "request " << id << ": a choice follows nobody";
    }
    MOED_CHECK(num_queued == request->num_queued && num_open == request->num_open &&
               num_leaving == request->num_leaving)
        << "request " << id;
    MOED_CHECK(num_open + num_leaving > 0) << "request " << id << " has ended but stays";
    num_with_queued += num_queued > 0 ? 1 : 0;
    num_new += request->started ? 0 : 1;
    num_new_tokens += request->started ? 0 : request->num_prompt_tokens();
    num_sequences_leaving += num_leaving;
  }
  MOED_CHECK(num_waiting == static_cast<int32_t>(waiting.size())) << "a waiting sequence without request";
  MOED_CHECK(num_with_queued == num_waiting_requests) << num_with_queued << " " << num_waiting_requests;
  MOED_CHECK(num_new == num_unstarted && num_new_tokens == num_unstarted_tokens) << num_new << " " << num_unstarted;
  MOED_CHECK(num_sequences_leaving == leaving.size()) << num_sequences_leaving << " sequences leave";
  for (size_t pool = 0; pool < pools.size(); ++pool) {
    for (size_t block = 0; block < references[pool].size(); ++block) {
      const int32_t counted = pools[pool].allocator.references(static_cast<int32_t>(block));
      MOED_CHECK(references[pool][block] == counted)
          << "block " << block << " of pool " << pool << ": " << references[pool][block] << " users, " << counted
          << " references";
    }
  }
}

void Scheduler::State::check_running() const {
  size_t num_prefilling = 0;
  MOED_CHECK(static_cast<int32_t>(running.size()) <= config.sequences_max) << running.size() << " run";
  for (size_t i = 0; i < running.size(); ++i) {
    const Sequence& sequence = *running[i];
    MOED_CHECK(sequence.phase == Phase::kRunning && sequence.running_index == static_cast<int32_t>(i)) << sequence.id;
    MOED_CHECK(requests.contains(sequence.request->spec.id)) << "sequence " << sequence.id << " without request";
    MOED_CHECK(sequence.num_missing() > 0) << "sequence " << sequence.id << " has nothing to compute";
    MOED_CHECK(static_cast<int64_t>(sequence.blocks.size()) >= blocks_for(sequence.num_cached)) << sequence.id;
    MOED_CHECK((sequence.num_missing() > 1) == prefilling.contains(running[i])) << "sequence " << sequence.id;
    num_prefilling += sequence.num_missing() > 1 ? 1 : 0;
    const BlockPool& pool = blocks_in(sequence.pool);
    MOED_CHECK(final_blocks(sequence.num_prompt, sequence.max_tokens) <= largest_pool_blocks())
        << "sequence " << sequence.id << " will outgrow every pool";
    std::vector<int32_t> blocks = sequence.blocks;
    std::ranges::sort(blocks);
    MOED_CHECK(std::ranges::adjacent_find(blocks) == blocks.end())
        << "sequence " << sequence.id << " has a block twice";
    // What will be written next must be nobody else's, and unknown to the prefix cache.
    for (size_t b = sequence.num_cached / config.block_tokens; b < sequence.blocks.size(); ++b) {
      const int32_t block = sequence.blocks[b];
      MOED_CHECK(pool.allocator.references(block) == 1 && !pool.cache.contains(block))
          << "sequence " << sequence.id << " would write shared block " << block;
    }
  }
  MOED_CHECK(num_prefilling == prefilling.size()) << "a prefilling sequence does not run";
}

void Scheduler::State::check_pass(PassKind kind) const {
  const LivePass& live = passes[static_cast<size_t>(kind)];
  if (!live.live) return;
  int32_t num_rows = 0;
  for (size_t i = 0; i < live.steps.size(); ++i) {
    num_rows += live.steps[i].num_new;
    const Sequence* sequence = live.sequences[i];
    if (sequence == nullptr) continue;
    MOED_CHECK(sequence->pass == kind && sequence->pass_index == static_cast<int32_t>(i))
        << "sequence " << sequence->id;
    MOED_CHECK(sequence->phase == Phase::kRunning || sequence->phase == Phase::kEnded) << "sequence " << sequence->id;
    MOED_CHECK(live.steps[i].pool == sequence->pool) << "sequence " << sequence->id << " changed its pool";
    MOED_CHECK(live.steps[i].tokens.data() == sequence->tokens.data() &&
               live.steps[i].blocks.data() == sequence->blocks.data())
        << "sequence " << sequence->id << " moved under a live pass";
  }
  MOED_CHECK(num_rows == live.shape.num_rows && num_rows <= config.pass_rows_max) << num_rows << " rows";
}

}  // namespace moed
