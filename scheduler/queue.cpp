#include <algorithm>
#include <string>
#include <utility>

#include "base/check.h"
#include "scheduler/state.h"

namespace moed {
namespace {

// Does `kv` let sequences live there?
bool uses(KvPlacement kv, Pool pool) {
  return kv == KvPlacement::kSplit || (kv == KvPlacement::kDevice) == (pool == Pool::kDevice);
}

int64_t num_blocks(const SchedulerConfig& config, Pool pool) {
  if (!uses(config.kv, pool)) return 0;
  return pool == Pool::kHost ? config.num_blocks : config.device_blocks;
}

const SchedulerConfig& checked(const SchedulerConfig& config) {
  const Status status = validate(config);
  MOED_CHECK(status.ok()) << status.message();
  return config;
}

Status check_min(int64_t value, int64_t min, const char* name) {
  if (value >= min) return Status();
  return invalid_argument(
      std::string(name) + " must be at least " + std::to_string(min) + ", not " + std::to_string(value), name);
}

}  // namespace

Status validate(const SchedulerConfig& config) {
  MOED_RETURN_IF_ERROR(check_min(config.block_tokens, 1, "block_tokens"));
  // One row for decoding and one for prefills, so that neither can starve the other.
  MOED_RETURN_IF_ERROR(check_min(config.pass_rows_max, 2, "pass_rows_max"));
  MOED_RETURN_IF_ERROR(check_min(config.sequences_max, 1, "sequences_max"));
  MOED_RETURN_IF_ERROR(check_min(config.queue_max, 1, "queue_max"));
  MOED_RETURN_IF_ERROR(check_min(config.bulk_rows_min, 1, "bulk_rows_min"));
  MOED_RETURN_IF_ERROR(check_min(config.reserve_blocks, 0, "reserve_blocks"));
  int64_t largest = 0;
  for (const Pool pool : {Pool::kHost, Pool::kDevice}) {
    const char* where = pool == Pool::kHost ? "host" : "device";
    if (uses(config.kv, pool) && num_blocks(config, pool) <= 0) {
      return invalid_argument(std::string("kv wants a pool on the ") + where + ", which has " +
                                  std::to_string(num_blocks(config, pool)) + " KV blocks",
                              "kv");
    }
    largest = std::max(largest, num_blocks(config, pool));
  }
  // The last token's KV is never needed.
  if (config.max_model_len - 1 > largest * config.block_tokens) {
    return invalid_argument("a sequence of max_model_len " + std::to_string(config.max_model_len) +
                                " tokens fits no pool that kv allows: the largest has " + std::to_string(largest) +
                                " KV blocks of " + std::to_string(config.block_tokens) + " tokens",
                            "max_model_len");
  }
  return Status();
}

Scheduler::State::State(const SchedulerConfig& config_in)
    : config(checked(config_in)),
      pools{BlockPool(num_blocks(config, Pool::kHost), config.block_tokens),
            BlockPool(num_blocks(config, Pool::kDevice), config.block_tokens)} {}

Status Scheduler::State::check_fits(const RequestSpec& spec) const {
  const auto num_prompt = static_cast<int64_t>(spec.prompt.size());
  const int64_t needed = final_blocks(num_prompt, spec.max_tokens);
  const int64_t largest = largest_pool_blocks();
  if (needed > largest) {
    return Status(StatusCode::kInvalidArgument,
                  "prompt (" + std::to_string(num_prompt) + " tokens) and max_tokens (" +
                      std::to_string(spec.max_tokens) + ") need " + std::to_string(needed) + " KV blocks of " +
                      std::to_string(config.block_tokens) + " tokens; the server has " + std::to_string(largest),
                  "max_tokens", "context_length_exceeded");
  }
  if (num_unstarted >= config.queue_max) {
    return Status(StatusCode::kResourceExhausted,
                  "the queue is full: " + std::to_string(num_unstarted) + " requests wait (limit queue_max)");
  }
  const int64_t num_copied = num_prompt * spec.n;
  if (config.queue_tokens_max > 0 && num_unstarted_tokens + num_copied > config.queue_tokens_max && num_unstarted > 0) {
    return Status(StatusCode::kResourceExhausted, "the queue is full: " + std::to_string(num_unstarted_tokens) +
                                                      " prompt tokens wait, " + std::to_string(num_copied) +
                                                      " more would pass queue_tokens_max " +
                                                      std::to_string(config.queue_tokens_max));
  }
  return Status();
}

void Scheduler::State::enqueue(RequestSpec spec) {
  auto request = std::make_unique<ActiveRequest>();
  request->ordinal = ++num_added;
  request->num_open = spec.n;
  for (int32_t choice = 0; choice < spec.n; ++choice) {
    Sequence& sequence = *request->sequences.emplace_back(std::make_unique<Sequence>());
    sequence.id = ++last_sequence_id;
    sequence.request = request.get();
    sequence.request_id = spec.id;
    sequence.max_tokens = spec.max_tokens;
    sequence.may_stop = !spec.stop_token_ids.empty() || (!spec.ignore_eos && !spec.eos_token_ids.empty());
    sequence.choice = choice;
    sequence.num_prompt = static_cast<int32_t>(spec.prompt.size());
    sequence.tokens = choice + 1 < spec.n ? spec.prompt : std::move(spec.prompt);
    sequence.sampling = spec.sampling;
    sequence.sampling.seed += choice;
  }
  request->spec = std::move(spec);
  request->leader = request->sequences.front().get();
  ++num_unstarted;
  num_unstarted_tokens += request->num_prompt_tokens();
  for (const auto& sequence : request->sequences) {
    enter_queue(*sequence, sequence.get() == request->leader ? Phase::kWaiting : Phase::kFollowing);
  }
  const RequestId id = request->spec.id;
  requests.emplace(id, std::move(request));
}

void Scheduler::State::enter_queue(Sequence& sequence, Phase phase) {
  sequence.phase = phase;
  if (phase == Phase::kWaiting) waiting.insert(&sequence);
  if (++sequence.request->num_queued == 1) ++num_waiting_requests;
}

void Scheduler::State::leave_queue(Sequence& sequence) {
  if (sequence.phase == Phase::kWaiting) waiting.erase(&sequence);
  if (--sequence.request->num_queued == 0) --num_waiting_requests;
}

void Scheduler::State::enter_running(Sequence& sequence) {
  sequence.phase = Phase::kRunning;
  sequence.running_index = static_cast<int32_t>(running.size());
  running.push_back(&sequence);
  if (sequence.num_missing() > 1) prefilling.insert(&sequence);
}

void Scheduler::State::leave_running(Sequence& sequence) {
  running.back()->running_index = sequence.running_index;
  running[sequence.running_index] = running.back();
  running.pop_back();
  prefilling.erase(&sequence);
}

// Strictly in order: whoever cannot start holds up those behind, or a long prompt would wait for ever.
void Scheduler::State::admit() {
  while (!waiting.empty() && static_cast<int32_t>(running.size()) < config.sequences_max) {
    Sequence& head = **waiting.begin();
    // Looking up a long prompt again is worth it only when there is more room than last time, or more to be shared
    // (then there is no blocked head).
    const std::array<int64_t, 2> free = num_free();
    if (blocked_head == head.id && free[0] <= blocked_num_free[0] && free[1] <= blocked_num_free[1]) return;
    if (!start(head)) {
      blocked_head = head.id;
      blocked_num_free = free;
      return;
    }
  }
}

// Gives the sequence blocks for all its tokens, in the pool that has more of them, if a pool has that many and the
// reserve.
bool Scheduler::State::start(Sequence& sequence) {
  std::optional<Match> best;
  for (const Pool pool : {Pool::kDevice, Pool::kHost}) {
    if (!can_hold(sequence, pool)) continue;
    Match candidate = match(sequence, pool);
    if (best.has_value() && candidate.num_tokens <= best->num_tokens) continue;
    if (fits(sequence, candidate)) best = std::move(candidate);
  }
  if (!best.has_value()) return false;

  leave_queue(sequence);
  sequence.turn = ++last_turn;
  take_blocks(sequence, *best);
  ActiveRequest& request = *sequence.request;
  if (!request.started) {
    request.started = true;
    --num_unstarted;
    num_unstarted_tokens -= request.num_prompt_tokens();
    request.num_cached_prompt = best->num_tokens;
    if (config.prefix_cache && !needs_scores(sequence)) {
      prefix_queries_tokens += sequence.num_prompt;
      prefix_hits_tokens += best->num_tokens;
    }
  }
  enter_running(sequence);
  return true;
}

// Of its prompt, what a sibling's blocks hold, or of all its tokens, what the prefix cache knows.
Match Scheduler::State::match(const Sequence& sequence, Pool pool) const {
  Match match{.pool = pool, .blocks = {}, .num_tokens = 0};
  if (needs_scores(sequence)) return match;
  if (config.prefix_cache) match.blocks = blocks_in(pool).find(sequence.tokens);
  match.num_tokens = static_cast<int32_t>(match.blocks.size()) * config.block_tokens;
  const Sequence* holder = prompt_holder(sequence, pool);
  if (holder != nullptr && sequence.num_prompt - 1 > match.num_tokens) {
    match.blocks = holder->blocks;
    match.num_tokens = sequence.num_prompt - 1;
  }
  return match;
}

bool Scheduler::State::fits(const Sequence& sequence, const Match& match) const {
  const BlockAllocator& allocator = blocks_in(match.pool).allocator;
  const int64_t num_total = blocks_for(static_cast<int64_t>(sequence.tokens.size()));
  const int64_t num_final = final_blocks(sequence.num_prompt, sequence.max_tokens);
  const int64_t reserve = std::clamp<int64_t>(num_final - num_total, 0, config.reserve_blocks);
  const int64_t num_shared = match.num_tokens / config.block_tokens;
  const auto revived = std::count_if(match.blocks.begin(), match.blocks.begin() + num_shared,
                                     [&](int32_t block) { return allocator.references(block) == 0; });
  return allocator.num_free() - revived >= num_total - num_shared + reserve;
}

// The full blocks of the match are shared, the others are the sequence's own.
void Scheduler::State::take_blocks(Sequence& sequence, const Match& match) {
  sequence.pool = match.pool;
  BlockPool& pool = blocks_in(sequence.pool);
  const auto num_shared = static_cast<size_t>(match.num_tokens / config.block_tokens);
  const auto num_total = static_cast<size_t>(blocks_for(static_cast<int64_t>(sequence.tokens.size())));
  sequence.blocks.assign(match.blocks.begin(), match.blocks.begin() + static_cast<ptrdiff_t>(num_shared));
  for (const int32_t block : sequence.blocks) pool.allocator.share(block);
  while (sequence.blocks.size() < num_total) sequence.blocks.push_back(pool.take());
  sequence.num_cached = match.num_tokens;
  // The block that holds the prompt's last token is written: by the row of that token, then by generated ones.
  if (match.num_tokens % config.block_tokens == 0) return;
  copies.push_back({.pool = match.pool, .from = match.blocks[num_shared], .to = sequence.blocks[num_shared]});
}

// A running sibling whose blocks, in that pool, hold the whole prompt.
const Sequence* Scheduler::State::prompt_holder(const Sequence& sequence, Pool pool) const {
  for (const auto& sibling : sequence.request->sequences) {
    const bool holds = sibling->phase == Phase::kRunning && sibling->num_cached >= sibling->num_prompt;
    if (holds && sibling->pool == pool && sibling.get() != &sequence) return sibling.get();
  }
  return nullptr;
}

// Makes room for the KV of one more token, at the expense of those of its pool that go after. False: not in this pass.
bool Scheduler::State::grow(Sequence& sequence) {
  BlockPool& pool = blocks_in(sequence.pool);
  while (pool.allocator.num_free() == 0) {
    Sequence* victim = last_preemptible(sequence.pool);
    if (victim == &sequence && must_wait_for_live(sequence)) return false;
    preempt(*victim);
    if (victim == &sequence) return false;
  }
  sequence.blocks.push_back(pool.take());
  return true;
}

// Somebody of its pool in a live pass ought to make room, and can when the pass ends.
bool Scheduler::State::must_wait_for_live(const Sequence& sequence) const {
  for (const LivePass& pass : passes) {
    if (!pass.live) continue;
    for (const Sequence* other : pass.sequences) {
      if (other == nullptr || other->pool != sequence.pool) continue;
      if (other->phase == Phase::kEnded || GoesBefore()(&sequence, other)) return true;
    }
  }
  return false;
}

Sequence* Scheduler::State::last_preemptible(Pool pool) const {
  Sequence* last = nullptr;
  for (Sequence* sequence : running) {
    if (sequence->pool == pool && !sequence->pass && (last == nullptr || GoesBefore()(last, sequence))) last = sequence;
  }
  MOED_CHECK(last != nullptr) << "all running sequences are in live passes";
  return last;
}

void Scheduler::State::preempt(Sequence& sequence) {
  leave_running(sequence);
  release_blocks(sequence);
  sequence.num_cached = 0;
  sequence.num_hashed_blocks = 0;
  sequence.prefix = PrefixCache::kRoot;
  enter_queue(sequence, Phase::kWaiting);
  ++num_preemptions;
}

// The choice gets nothing more. Its blocks are free, unless a live pass still uses them: then after leave().
void Scheduler::State::end(Sequence& sequence) {
  ActiveRequest& request = *sequence.request;
  if (sequence.phase == Phase::kRunning) {
    leave_running(sequence);
  } else {
    leave_queue(sequence);
  }
  sequence.phase = Phase::kEnded;
  --request.num_open;
  if (sequence.pass) {
    ++request.num_leaving;
    leaving.emplace(sequence.id, &sequence);
  } else {
    release_blocks(sequence);
  }
  // Followers need somebody who computes the prompt.
  const auto follower = std::ranges::find_if(
      request.sequences, [](const auto& candidate) { return candidate->phase == Phase::kFollowing; });
  if (request.leader == &sequence && follower != request.sequences.end()) {
    request.leader = follower->get();
    leave_queue(*request.leader);
    enter_queue(*request.leader, Phase::kWaiting);
  }
}

// An ended sequence's pass is over, or has let go of it.
void Scheduler::State::leave(Sequence& sequence) {
  pass(*sequence.pass).sequences[sequence.pass_index] = nullptr;
  sequence.pass.reset();
  leaving.erase(sequence.id);
  release_blocks(sequence);
  --sequence.request->num_leaving;
  erase_if_gone(*sequence.request);
}

void Scheduler::State::erase_if_gone(ActiveRequest& request) {
  if (request.num_open > 0 || request.num_leaving > 0) return;
  if (!request.started) {
    --num_unstarted;
    num_unstarted_tokens -= request.num_prompt_tokens();
  }
  requests.erase(request.spec.id);
}

// The leader's prompt stands in KV: the followers share its blocks while it has them, so they start now if they can.
void Scheduler::State::prompt_done(ActiveRequest& request) {
  bool any = false;
  for (const auto& sequence : request.sequences) {
    if (sequence->phase != Phase::kFollowing) continue;
    leave_queue(*sequence);
    enter_queue(*sequence, Phase::kWaiting);
    any = true;
  }
  if (any) admit();
}

}  // namespace moed
