#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <set>
#include <unordered_map>
#include <vector>

#include "scheduler/block_pool.h"
#include "scheduler/scheduler.h"
#include "scheduler/sequence.h"

namespace moed {

// A pass from schedule() to commit().
struct LivePass {
  bool live = false;
  std::vector<StepSequence> steps;
  std::vector<Sequence*> sequences;  // beside steps; null: dropped
  StepShape shape;
};

// Rows that a pass takes of a prefill.
struct Chunk {
  Sequence* sequence = nullptr;
  int32_t num_new = 0;
};

// What a pool holds of a sequence that wants to start there.
struct Match {
  Pool pool = Pool::kHost;
  std::vector<int32_t> blocks;  // they hold its first num_tokens; the last one perhaps in part
  int32_t num_tokens = 0;
};

// The scheduler's insides. queue.cpp: who waits, runs and ends, and with which blocks. passes.cpp: what a pass takes
// and gives.
struct Scheduler::State {
  explicit State(const SchedulerConfig& config);

  // queue.cpp
  Status check_fits(const RequestSpec& spec) const;
  void enqueue(RequestSpec spec);
  void admit();
  bool start(Sequence& sequence);
  Match match(const Sequence& sequence, Pool pool) const;
  // One that may outgrow the pool starts there nevertheless: most answers end long before max_tokens.
  bool can_hold(const Sequence& sequence, Pool pool) const {
    return blocks_for(static_cast<int64_t>(sequence.tokens.size())) <= blocks_in(pool).allocator.num_blocks();
  }
  bool fits(const Sequence& sequence, const Match& match) const;
  void take_blocks(Sequence& sequence, const Match& match);
  const Sequence* prompt_holder(const Sequence& sequence, Pool pool) const;
  bool grow(Sequence& sequence);
  bool is_full(const Sequence& sequence) const {
    return static_cast<int64_t>(sequence.blocks.size()) * config.block_tokens <
           static_cast<int64_t>(sequence.tokens.size());
  }
  bool must_wait_for_live(const Sequence& sequence) const;
  Sequence* last_preemptible(Pool pool) const;
  void preempt(Sequence& sequence);
  void end(Sequence& sequence);
  void leave(Sequence& sequence);
  void prompt_done(ActiveRequest& request);
  void erase_if_gone(ActiveRequest& request);
  void release_blocks(Sequence& sequence) { blocks_in(sequence.pool).release(sequence.blocks); }
  void enter_queue(Sequence& sequence, Phase phase);
  void leave_queue(Sequence& sequence);
  void enter_running(Sequence& sequence);
  void leave_running(Sequence& sequence);
  int64_t blocks_for(int64_t num_tokens) const { return (num_tokens + config.block_tokens - 1) / config.block_tokens; }
  // Of a sequence that generates all it may. The last token's KV is never needed.
  int64_t final_blocks(int64_t num_prompt, int32_t max_tokens) const {
    return blocks_for(num_prompt + std::max(max_tokens, 1) - 1);
  }
  BlockPool& blocks_in(Pool pool) { return pools[static_cast<size_t>(pool)]; }
  const BlockPool& blocks_in(Pool pool) const { return pools[static_cast<size_t>(pool)]; }
  int64_t largest_pool_blocks() const {
    return std::max(pools[0].allocator.num_blocks(), pools[1].allocator.num_blocks());
  }
  std::array<int64_t, 2> num_free() const { return {pools[0].allocator.num_free(), pools[1].allocator.num_free()}; }
  bool needs_scores(const Sequence& sequence) const {
    return !sequence.reported && sequence.choice == 0 && sequence.request->spec.prompt_logprobs;
  }

  // passes.cpp
  bool fill_interactive();
  bool fill_bulk(const StepModel& model);
  int32_t short_prefill_rows() const;
  bool is_bulk(const Sequence& sequence) const { return sequence.num_missing() > config.bulk_rows_min; }
  void collect_decodes(int32_t rows_max);
  void grow_decodes();
  void collect_chunks(int32_t room);
  StepShape bulk_shape();
  void pick(PassKind kind, Sequence& sequence, int32_t num_new);
  void prefetch_step(const LivePass& live, size_t index) const;
  void commit_step(const StepSequence& step, Sequence& sequence, const SequenceOutput& output);
  // The event that tells of it, with what its first one alone says.
  TokenEvent& next_event(Sequence& sequence, bool has_token);
  void end_if_due(Sequence& sequence, TokenEvent& event);
  void end_sequence(Sequence& sequence, TokenEvent& event, FinishReason finish);
  void keep_scores(const StepSequence& step, Sequence& sequence, const SequenceOutput& output) const;
  void register_blocks(Sequence& sequence);
  LivePass& pass(PassKind kind) { return passes[static_cast<size_t>(kind)]; }

  void check_invariants() const;
  void check_running() const;
  void check_requests() const;
  void check_pass(PassKind kind) const;

  const SchedulerConfig config;
  std::array<BlockPool, 2> pools;  // by Pool
  std::unordered_map<RequestId, std::unique_ptr<ActiveRequest>> requests;
  std::set<Sequence*, GoesBefore> waiting;
  std::vector<Sequence*> running;                     // in no order
  std::set<Sequence*, GoesBefore> prefilling;         // the running ones with more than one token to compute
  std::unordered_map<SequenceId, Sequence*> leaving;  // ended, in a live pass
  std::array<LivePass, 2> passes;
  std::vector<BlockCopy> copies;       // since the last pass was scheduled
  std::vector<BlockCopy> pass_copies;  // of the pass that was scheduled last
  std::vector<TokenEvent> events;      // slots, used again: one walk through them a step is cheaper than two
  size_t num_events = 0;               // of the last commit()
  std::vector<Sequence*> decodes;      // scratch of fill_*: sequences that need one row,
  std::vector<Sequence*> needy;        // and those of them whose row has no slot yet,
  std::vector<Chunk> chunks;           // and chunks of long prefills

  SequenceId blocked_head = 0;                // the head of the queue that did not fit,
  std::array<int64_t, 2> blocked_num_free{};  // when so many blocks were free
  int64_t num_added = 0;
  SequenceId last_sequence_id = 0;
  int64_t now_us = 0;  // of the last schedule()
  int64_t last_turn = 0;
  int32_t num_shared_bulk = 0;       // the last so many bulk passes carried decode rows
  int32_t num_unstarted = 0;         // requests no choice of which was ever admitted
  int64_t num_unstarted_tokens = 0;  // their prompts, one a choice
  int32_t num_waiting_requests = 0;
  int64_t num_preemptions = 0;
  int64_t prefix_queries_tokens = 0;
  int64_t prefix_hits_tokens = 0;
};

}  // namespace moed
