#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "scheduler/prefix_cache.h"
#include "scheduler/scheduler.h"

namespace moed {

struct ActiveRequest;

enum class Phase : uint8_t {
  kFollowing,  // waits until a sibling has computed the prompt that they share
  kWaiting,    // in the queue: not started yet, or preempted
  kRunning,    // has blocks for all its tokens
  kEnded,      // its blocks stay while it is in a live pass
};

// One choice of a request, as the scheduler keeps it. What each step touches comes first, in two cache lines: with
// thousands of sequences running, fetching them is most of a step's cost.
struct alignas(64) Sequence {
  std::vector<int32_t> tokens;  // prompt, then generated
  std::vector<int32_t> blocks;  // empty unless running (or ended in a live pass)
  SequenceId id = 0;
  int32_t num_prompt = 0;
  int32_t num_cached = 0;  // tokens whose KV was computed

  RequestId request_id = 0;
  int64_t turn = 0;  // when it was last in a pass: numbers all rows ever given, so no two are equal
  int32_t choice = 0;
  int32_t max_tokens = 0;
  int32_t pass_index = 0;         // in `pass`
  int32_t num_hashed_blocks = 0;  // full blocks that the prefix cache was told of
  Phase phase = Phase::kWaiting;
  std::optional<PassKind> pass;  // the live pass it is in
  bool reported = false;         // its first event is out
  bool may_stop = false;         // there are tokens that end it
  Pool pool = Pool::kHost;       // that of `blocks`
  int32_t running_index = 0;     // in State::running
  ActiveRequest* request = nullptr;
  PrefixCache::EntryId prefix = PrefixCache::kRoot;  // the entry of the hashed blocks

  SamplingParams sampling;
  std::vector<ScoredToken> prompt_scores;  // of tokens[1 ..], until the first event carries them away

  // Tokens whose KV is still to be computed: 1 while decoding.
  int32_t num_missing() const { return static_cast<int32_t>(tokens.size()) - num_cached; }
  int32_t num_generated() const { return static_cast<int32_t>(tokens.size()) - num_prompt; }

  // Asks for the lines above ahead of their use.
  void prefetch() const {
    __builtin_prefetch(this);
    __builtin_prefetch(reinterpret_cast<const char*>(this) + 64);
  }
};

struct ActiveRequest {
  RequestSpec spec;                                  // its prompt lives in the sequences
  int64_t ordinal = 0;                               // order of add(): breaks ties of arrival
  std::vector<std::unique_ptr<Sequence>> sequences;  // [n]
  Sequence* leader = nullptr;                        // computes the prompt for those that follow
  bool started = false;                              // a choice has been admitted
  int32_t num_open = 0;                              // choices that have not ended
  int32_t num_leaving = 0;                           // choices that ended inside a live pass
  int32_t num_queued = 0;                            // choices in phase kFollowing or kWaiting
  int32_t num_cached_prompt = 0;                     // prompt tokens that the prefix cache spared the first choice

  // Each choice keeps its own copy of the prompt.
  int64_t num_prompt_tokens() const {
    return int64_t{sequences.front()->num_prompt} * static_cast<int64_t>(sequences.size());
  }
  int64_t scheduled_us = 0;  // when its first pass was scheduled
};

// Who goes first: priority, then arrival.
struct GoesBefore {
  bool operator()(const Sequence* a, const Sequence* b) const { return key(*a) < key(*b); }

 private:
  static std::tuple<int32_t, int64_t, int64_t, int32_t> key(const Sequence& sequence) {
    const ActiveRequest& request = *sequence.request;
    return {request.spec.priority, request.spec.arrival_us, request.ordinal, sequence.choice};
  }
};

}  // namespace moed
