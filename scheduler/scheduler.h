#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "engine/step.h"
#include "plan/kv_placement.h"
#include "plan/step_model.h"
#include "scheduler/request.h"

namespace moed {

enum class PassKind : uint8_t { kInteractive, kBulk };

struct SchedulerConfig {
  int32_t block_tokens = 16;
  int64_t num_blocks = 0;     // of pool kHost; not used with kv kDevice
  int64_t device_blocks = 0;  // of pool kDevice; not used with kv kHost
  KvPlacement kv = KvPlacement::kHost;
  int32_t max_model_len = 0;     // tokens that one sequence may come to; 0: not known
  int32_t pass_rows_max = 512;   // rows of one pass, and so the longest chunk
  int32_t sequences_max = 256;   // sequences that run at once
  int32_t queue_max = 1024;      // requests that wait
  int64_t queue_tokens_max = 0;  // prompt tokens that wait, a copy a choice; 0: no limit
  int32_t bulk_rows_min = 64;    // a prefill of more rows is bulk
  int32_t reserve_blocks = 1;    // admission needs the prompt's blocks and these
  bool prefix_cache = true;
};

// Can a scheduler work with it? Errors: kInvalidArgument whose param() is the field: a pool that `kv` names has no
// blocks ("kv"), a sequence of max_model_len fits no pool that it may use ("max_model_len"), a limit is too small.
Status validate(const SchedulerConfig& config);

// What happened to one choice of one request, in order. Exactly one event of each choice has finish != kNone, and it is
// the last, unless finish() ended the choice first: then no event follows.
struct TokenEvent {
  RequestId request = 0;
  int32_t choice = 0;
  bool has_token = true;  // false: only prompt scores or a finish (max_tokens 0, or the engine's answer was broken)
  ScoredToken token;
  FinishReason finish = FinishReason::kNone;
  int32_t stop_token = -1;                 // the EOS or stop id that ended it
  int32_t num_cached_tokens = 0;           // of the prompt, from the prefix cache; set on the first event of a choice
  int64_t scheduled_us = 0;                // schedule()'s now_us of the request's first pass; set likewise
  std::vector<ScoredToken> prompt_scores;  // of prompt[1..], once, on the first event of choice 0, when asked for
};

// A sequence that must leave a live pass before its blocks can be freed.
struct LiveSequence {
  SequenceId id = 0;
  PassKind pass = PassKind::kInteractive;
};

// A copy that must run before the pass that was just scheduled begins.
struct BlockCopy {
  Pool pool = Pool::kHost;
  int32_t from = 0;
  int32_t to = 0;
};

struct PoolStats {
  int64_t blocks_used = 0;  // referenced by a sequence; cached free ones are not counted
  int64_t blocks_total = 0;
  int64_t blocks_free() const { return blocks_total - blocks_used; }
};

struct SchedulerStats {
  int32_t num_running = 0;         // sequences
  int32_t num_waiting = 0;         // requests with a choice that is not running, preempted ones included
  std::array<PoolStats, 2> pools;  // by Pool; a pool that `kv` leaves out has no blocks
  int64_t num_preemptions = 0;
  int64_t prefix_queries_tokens = 0;
  int64_t prefix_hits_tokens = 0;

  const PoolStats& pool(Pool which) const { return pools[static_cast<size_t>(which)]; }
  int64_t blocks_used() const { return pools[0].blocks_used + pools[1].blocks_used; }
  int64_t blocks_total() const { return pools[0].blocks_total + pools[1].blocks_total; }
  // Share of the blocks of both pools that sequences hold, 0 to 1.
  double kv_usage() const {
    return blocks_total() > 0 ? static_cast<double>(blocks_used()) / static_cast<double>(blocks_total()) : 0.0;
  }
};

// Which tokens run next, in which KV blocks. Pure: no clock, no threads, no I/O; the same calls give the same answers.
// Serving thread only.
//
// Admission takes the prompt's blocks and a small reserve, never max_tokens; when a running sequence cannot grow, the
// one last in (priority, arrival) of its pool that is in no live pass is preempted and later recomputed, its sent
// tokens kept. A sequence is in at most one live pass. The choices of a request share its prompt's blocks.
//
// A sequence stays in one KV pool while it runs; each time it starts, kSplit takes the pool with room that holds more
// of its tokens already, of equals the device's. One that outgrows all of its pool starts again in the other.
class Scheduler {
 public:
  // REQUIRES: validate(config) is OK.
  explicit Scheduler(const SchedulerConfig& config);
  ~Scheduler();

  // kResourceExhausted when the queue is full; kInvalidArgument when the prompt can never fit a pool. The request is
  // untouched on error.
  Status add(Request request);

  // Ends a request (all choices), or one choice of it: the client left, or a stop string was found. Blocks are freed at
  // once but for sequences in a live pass: they are returned, the caller drops each from its pass and then calls
  // dropped(). Unknown ids are ignored.
  std::vector<LiveSequence> finish(RequestId request);
  std::vector<LiveSequence> finish_choice(RequestId request, int32_t choice);
  void dropped(SequenceId id);

  // The sequences of the next pass of that kind; empty: nothing to do. kBulk: chunks of long prefills (and what shares
  // their sweep); a quarter of the rows is kept for the shortest of those behind the first. kInteractive: decode rows
  // and short prefills that are in no live pass. The spans stay valid until commit() of that pass. REQUIRES: no live
  // pass of that kind.
  std::span<const StepSequence> schedule(PassKind kind, const StepModel& model, int64_t now_us);
  // Copies that the pass just scheduled needs first.
  std::span<const BlockCopy> block_copies() const;
  StepShape shape(PassKind kind) const;

  // Ends the live pass of that kind with what it sampled. Events in the pass's order; the caller may move out of them,
  // and they stay valid until the next commit().
  std::span<TokenEvent> commit(PassKind kind, const StepOutput& output);

  // Anything waiting or running?
  bool idle() const;
  SchedulerStats stats() const;
  // Test hook: checks every invariant (reference counts, blocks, queues) and dies with a message.
  void check_invariants() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moed
