#include <algorithm>
#include <string>
#include <utility>

#include "base/check.h"
#include "scheduler/state.h"

namespace moed {
namespace {

// Blocks whose prefix entries are asked for ahead of their reuse.
constexpr int32_t kVictimsAhead = 4;

}  // namespace

Scheduler::State::State(const SchedulerConfig& config_in)
    : config(config_in), allocator(config_in.num_blocks), cache(config_in.num_blocks, config_in.block_tokens) {
  MOED_CHECK(config.block_tokens > 0) << "block_tokens " << config.block_tokens;
  // One row for decoding and one for prefills, so that neither can starve the other.
  MOED_CHECK(config.pass_rows_max >= 2) << "pass_rows_max " << config.pass_rows_max;
  MOED_CHECK(config.sequences_max > 0 && config.queue_max > 0) << "nothing may run or wait";
  MOED_CHECK(config.bulk_rows_min > 0 && config.reserve_blocks >= 0) << "negative limits";
}

Status Scheduler::State::check_fits(const RequestSpec& spec) const {
  const auto num_prompt = static_cast<int64_t>(spec.prompt.size());
  // The last token's KV is never needed.
  const int64_t needed = blocks_for(num_prompt + std::max(spec.max_tokens, 1) - 1);
  if (needed > config.num_blocks) {
    return Status(StatusCode::kInvalidArgument,
                  "prompt (" + std::to_string(num_prompt) + " tokens) and max_tokens (" +
                      std::to_string(spec.max_tokens) + ") need " + std::to_string(needed) + " KV blocks of " +
                      std::to_string(config.block_tokens) + " tokens; the server has " +
                      std::to_string(config.num_blocks),
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
    if (blocked_head == head.id && allocator.num_free() <= blocked_num_free) return;
    if (!start(head)) {
      blocked_head = head.id;
      blocked_num_free = allocator.num_free();
      return;
    }
  }
}

// Gives the sequence blocks for all its tokens, if there are that many and the reserve.
bool Scheduler::State::start(Sequence& sequence) {
  ActiveRequest& request = *sequence.request;
  const std::vector<int32_t> cached = reusable_blocks(sequence);
  const Sequence* holder = prompt_holder(sequence);
  const int32_t num_hit = static_cast<int32_t>(cached.size()) * config.block_tokens;
  const bool fork = holder != nullptr && sequence.num_prompt - 1 > num_hit;
  const int32_t num_kept = fork ? sequence.num_prompt - 1 : num_hit;
  const auto num_shared = static_cast<size_t>(num_kept / config.block_tokens);
  const std::vector<int32_t>& source = fork ? holder->blocks : cached;

  const int64_t num_total = blocks_for(static_cast<int64_t>(sequence.tokens.size()));
  const int64_t num_final = blocks_for(int64_t{sequence.num_prompt} + std::max(request.spec.max_tokens, 1) - 1);
  const int64_t reserve = std::clamp<int64_t>(num_final - num_total, 0, config.reserve_blocks);
  const auto revived = std::count_if(source.begin(), source.begin() + static_cast<ptrdiff_t>(num_shared),
                                     [&](int32_t block) { return allocator.references(block) == 0; });
  if (allocator.num_free() - revived < num_total - static_cast<int64_t>(num_shared) + reserve) return false;

  leave_queue(sequence);
  sequence.turn = ++last_turn;
  for (size_t i = 0; i < num_shared; ++i) {
    allocator.share(source[i]);
    sequence.blocks.push_back(source[i]);
  }
  while (static_cast<int64_t>(sequence.blocks.size()) < num_total) sequence.blocks.push_back(take_block());
  sequence.num_cached = num_kept;
  // The block that holds the prompt's last token is written: by the row of that token, then by generated ones.
  if (num_kept % config.block_tokens != 0)
    copies.push_back({.from = source[num_shared], .to = sequence.blocks[num_shared]});
  if (!fork) {
    sequence.num_hashed_blocks = static_cast<int32_t>(num_shared);
    sequence.prefix = num_shared == 0 ? PrefixCache::kRoot : cache.entry(source[num_shared - 1]);
  }
  if (!request.started) {
    request.started = true;
    --num_unstarted;
    num_unstarted_tokens -= request.num_prompt_tokens();
    request.num_cached_prompt = num_hit;
    if (config.prefix_cache && !needs_scores(sequence)) {
      prefix_queries_tokens += sequence.num_prompt;
      prefix_hits_tokens += num_hit;
    }
  }
  enter_running(sequence);
  return true;
}

// The blocks that the prefix cache has of the sequence's tokens; never of the last one, which must be computed to be
// answered.
std::vector<int32_t> Scheduler::State::reusable_blocks(const Sequence& sequence) const {
  std::vector<int32_t> blocks;
  if (!config.prefix_cache || needs_scores(sequence)) return blocks;
  const std::span<const int32_t> tokens(sequence.tokens);
  const auto step = static_cast<size_t>(config.block_tokens);
  PrefixCache::EntryId prefix = PrefixCache::kRoot;
  for (size_t begin = 0; begin + step < tokens.size(); begin += step) {
    const int32_t block = cache.find(prefix, tokens.subspan(begin, step));
    if (block == PrefixCache::kNoBlock) break;
    blocks.push_back(block);
    prefix = cache.entry(block);
  }
  return blocks;
}

// A running sibling whose blocks hold the whole prompt.
const Sequence* Scheduler::State::prompt_holder(const Sequence& sequence) const {
  if (needs_scores(sequence)) return nullptr;
  for (const auto& sibling : sequence.request->sequences) {
    const bool holds = sibling->phase == Phase::kRunning && sibling->num_cached >= sibling->num_prompt;
    if (holds && sibling.get() != &sequence) return sibling.get();
  }
  return nullptr;
}

int32_t Scheduler::State::take_block() {
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

void Scheduler::State::release_blocks(Sequence& sequence) {
  // Back to front: of what the prefix cache keeps, the ends of sequences are reused before the beginnings they need.
  for (size_t i = sequence.blocks.size(); i-- > 0;) {
    allocator.release(sequence.blocks[i], cache.contains(sequence.blocks[i]));
  }
  sequence.blocks.clear();
}

// Makes room for the KV of one more token, at the expense of those that go after. False: not in this pass.
bool Scheduler::State::grow(Sequence& sequence) {
  while (allocator.num_free() == 0) {
    Sequence* victim = last_preemptible();
    if (victim == &sequence && must_wait_for_live(sequence)) return false;
    preempt(*victim);
    if (victim == &sequence) return false;
  }
  sequence.blocks.push_back(take_block());
  return true;
}

// Somebody in a live pass ought to make room, and can when the pass ends.
bool Scheduler::State::must_wait_for_live(const Sequence& sequence) const {
  for (const LivePass& pass : passes) {
    if (!pass.live) continue;
    for (const Sequence* other : pass.sequences) {
      if (other != nullptr && (other->phase == Phase::kEnded || GoesBefore()(&sequence, other))) return true;
    }
  }
  return false;
}

Sequence* Scheduler::State::last_preemptible() const {
  Sequence* last = nullptr;
  for (Sequence* sequence : running) {
    if (!sequence->pass && (last == nullptr || GoesBefore()(last, sequence))) last = sequence;
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
