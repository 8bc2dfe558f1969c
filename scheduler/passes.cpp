#include <algorithm>
#include <utility>

#include "base/check.h"
#include "scheduler/state.h"

namespace moed {
namespace {

// Sequences asked for ahead of their use: enough to hide main memory behind the work on those before.
constexpr size_t kPrefetchAhead = 12;

// Bulk passes in a row that decode rows may share.
constexpr int32_t kSharedBulkMax = 15;

bool contains(const std::vector<int32_t>& ids, int32_t token) { return std::ranges::find(ids, token) != ids.end(); }

}  // namespace

// Decode rows and short prefills. Neither starves the other: prefills are sure of a quarter of the rows.
bool Scheduler::State::fill_interactive() {
  const int32_t short_rows = std::min(short_prefill_rows(), std::max(config.pass_rows_max / 4, 1));
  collect_decodes(config.pass_rows_max - short_rows);
  grow_decodes();
  LivePass& live = pass(PassKind::kInteractive);
  for (Sequence* sequence : decodes) pick(PassKind::kInteractive, *sequence, 1);
  for (Sequence* sequence : prefilling) {
    const int32_t room = config.pass_rows_max - live.shape.num_rows;
    if (room == 0) break;
    if (sequence->pass || is_bulk(*sequence)) continue;
    pick(PassKind::kInteractive, *sequence, std::min(sequence->num_missing(), room));
  }
  return live.shape.num_rows > 0;
}

// Chunks of long prefills, and the decode rows if they had better share the sweep of the weights.
bool Scheduler::State::fill_bulk(const StepModel& model) {
  const StepShape heavy = bulk_shape();
  if (heavy.num_rows == 0) return false;
  collect_decodes(config.pass_rows_max / 2);
  StepShape light;
  for (const Sequence* sequence : decodes) light.add(sequence->num_cached, 1, true);
  // Passes in which they ride teach the model nothing of what decode rows alone cost.
  const bool share = num_shared_bulk < kSharedBulkMax && model.share_sweep(light, heavy);
  num_shared_bulk = share ? num_shared_bulk + 1 : 0;
  if (share) {
    grow_decodes();
    // Growth may have preempted the very prefills that were to carry the decode rows.
    if (bulk_shape().num_rows == 0) return false;
  } else {
    decodes.clear();
  }
  for (Sequence* sequence : decodes) pick(PassKind::kBulk, *sequence, 1);
  collect_chunks(config.pass_rows_max - static_cast<int32_t>(decodes.size()));
  for (const Chunk& chunk : chunks) pick(PassKind::kBulk, *chunk.sequence, chunk.num_new);
  return true;
}

// `chunks`: what a bulk pass with room for so many rows takes, in order. The first prompt takes what it can, but a
// quarter of a pass is kept for the one of the others that is done soonest: behind a prompt of many passes each shorter
// one would wait for all of them, and among the shorter ones the shortest first keeps the sum of their waits smallest.
void Scheduler::State::collect_chunks(int32_t room) {
  chunks.clear();
  Sequence* first = nullptr;
  Sequence* soonest = nullptr;
  for (Sequence* sequence : prefilling) {
    if (sequence->pass || !is_bulk(*sequence)) continue;
    if (first == nullptr) {
      first = sequence;
    } else if (soonest == nullptr || sequence->num_missing() < soonest->num_missing()) {
      soonest = sequence;
    }
  }
  int32_t kept = 0;
  if (soonest != nullptr) {
    kept = std::min({soonest->num_missing(), std::max(config.pass_rows_max / 4, 1), room - 1});
  }
  for (Sequence* sequence : prefilling) {
    if (room == 0) break;
    if (sequence->pass || !is_bulk(*sequence)) continue;
    if (sequence == soonest) kept = 0;
    const int32_t num_new = std::min(sequence->num_missing(), room - kept);
    if (num_new == 0) continue;
    chunks.push_back({sequence, num_new});
    room -= num_new;
  }
}

int32_t Scheduler::State::short_prefill_rows() const {
  int32_t rows = 0;
  for (const Sequence* sequence : prefilling) {
    if (!sequence->pass && !is_bulk(*sequence)) rows += sequence->num_missing();
    if (rows >= config.pass_rows_max) break;
  }
  return rows;
}

// The chunks that a bulk pass would take if nothing shared it.
StepShape Scheduler::State::bulk_shape() {
  collect_chunks(config.pass_rows_max);
  StepShape shape;
  for (const auto& [sequence, num_new] : chunks) {
    shape.add(sequence->num_cached, num_new, num_new == sequence->num_missing() && sequence->max_tokens > 0);
  }
  return shape;
}

// `decodes`: sequences that need one row, at most rows_max of them; who waited longest goes first.
void Scheduler::State::collect_decodes(int32_t rows_max) {
  decodes.clear();
  for (size_t i = 0; i < running.size(); ++i) {
    if (i + kPrefetchAhead < running.size()) running[i + kPrefetchAhead]->prefetch();
    if (!running[i]->pass && running[i]->num_missing() == 1) decodes.push_back(running[i]);
  }
  if (static_cast<int32_t>(decodes.size()) <= rows_max) return;
  const auto waited_longer = [](const Sequence* a, const Sequence* b) { return a->turn < b->turn; };
  std::ranges::partial_sort(decodes, decodes.begin() + rows_max, waited_longer);
  decodes.resize(rows_max);
}

// Gives each of `decodes` the slot of its next token, first come first served; who gets none stays out of the pass.
void Scheduler::State::grow_decodes() {
  needy.clear();
  std::array<int64_t, 2> left = num_free();
  for (Sequence* sequence : decodes) {
    if (!is_full(*sequence)) continue;
    needy.push_back(sequence);
    --left[static_cast<size_t>(sequence->pool)];
  }
  const bool enough = left[0] >= 0 && left[1] >= 0;
  if (!enough) std::ranges::sort(needy, GoesBefore());
  for (Sequence* sequence : needy) {
    if (sequence->phase == Phase::kRunning) grow(*sequence);
  }
  if (enough) return;
  std::erase_if(decodes, [&](const Sequence* s) { return s->phase != Phase::kRunning || is_full(*s); });
}

void Scheduler::State::pick(PassKind kind, Sequence& sequence, int32_t num_new) {
  LivePass& live = pass(kind);
  const int32_t end = sequence.num_cached + num_new;
  const bool samples = num_new == sequence.num_missing() && sequence.max_tokens > 0;
  const bool scores = needs_scores(sequence);
  sequence.pass = kind;
  sequence.pass_index = static_cast<int32_t>(live.steps.size());
  sequence.turn = ++last_turn;
  if (!sequence.reported && sequence.request->scheduled_us == 0) sequence.request->scheduled_us = now_us;
  live.sequences.push_back(&sequence);
  live.steps.push_back({.tokens = sequence.tokens,
                        .id = sequence.id,
                        .num_prompt = sequence.num_prompt,
                        .num_cached = sequence.num_cached,
                        .num_new = num_new,
                        .prompt_logprobs = scores,
                        .num_prompt_top = scores ? std::max(sequence.sampling.num_logprobs, 0) : 0,
                        .pool = sequence.pool,
                        .blocks = std::span<const int32_t>(sequence.blocks).first(blocks_for(end)),
                        .sampling = samples ? &sequence.sampling : nullptr,
                        .allowed = {}});
  live.shape.add(sequence.num_cached, num_new, samples);
}

// Brings in what commit_step() will touch of later sequences of the pass.
void Scheduler::State::prefetch_step(const LivePass& live, size_t index) const {
  const size_t far = index + 2 * kPrefetchAhead;
  if (far < live.sequences.size() && live.sequences[far] != nullptr) live.sequences[far]->prefetch();
  const size_t near = index + kPrefetchAhead;
  if (near >= live.sequences.size() || live.sequences[near] == nullptr) return;
  const std::vector<int32_t>& tokens = live.sequences[near]->tokens;
  __builtin_prefetch(tokens.data() + tokens.size(), 1);
}

// What a pass computed of one sequence: its KV stands, and if all of it does, there is a token.
void Scheduler::State::commit_step(const StepSequence& step, Sequence& sequence, const SequenceOutput& output) {
  const bool was_prefill = sequence.num_missing() > 1;
  sequence.pass.reset();
  sequence.num_cached += step.num_new;
  // Its KV may be as broken: nothing of it is kept.
  if (output.broken) return end_sequence(sequence, next_event(sequence, false), FinishReason::kError);
  if (step.prompt_logprobs) keep_scores(step, sequence, output);
  register_blocks(sequence);
  const bool completes_prompt = step.num_cached < sequence.num_prompt && sequence.num_cached >= sequence.num_prompt;
  if (completes_prompt && sequence.request->leader == &sequence) prompt_done(*sequence.request);
  if (was_prefill && sequence.num_missing() <= 1) prefilling.erase(&sequence);
  if (sequence.num_missing() > 0) return;

  TokenEvent& event = next_event(sequence, step.sampling != nullptr);
  if (event.has_token) {
    MOED_CHECK(output.sampled.has_value()) << "the engine sampled nothing for sequence " << sequence.id;
    event.token = *output.sampled;
    sequence.tokens.push_back(event.token.token);
  }
  end_if_due(sequence, event);
}

TokenEvent& Scheduler::State::next_event(Sequence& sequence, bool has_token) {
  if (num_events == events.size()) events.emplace_back();
  TokenEvent& event = events[num_events++];
  event = TokenEvent{.request = sequence.request_id, .choice = sequence.choice, .has_token = has_token};
  if (sequence.reported) return event;
  sequence.reported = true;
  event.num_cached_tokens = sequence.request->num_cached_prompt;
  event.scheduled_us = sequence.request->scheduled_us;
  event.prompt_scores = std::move(sequence.prompt_scores);
  return event;
}

// A stop token goes before a length that is reached with it.
void Scheduler::State::end_if_due(Sequence& sequence, TokenEvent& event) {
  FinishReason finish = FinishReason::kNone;
  if (event.has_token && sequence.may_stop) {
    const RequestSpec& spec = sequence.request->spec;
    const int32_t token = event.token.token;
    if (contains(spec.stop_token_ids, token) || (!spec.ignore_eos && contains(spec.eos_token_ids, token))) {
      finish = FinishReason::kStop;
      event.stop_token = token;
    }
  }
  if (finish == FinishReason::kNone && sequence.num_generated() >= sequence.max_tokens) finish = FinishReason::kLength;
  if (finish != FinishReason::kNone) end_sequence(sequence, event, finish);
}

void Scheduler::State::end_sequence(Sequence& sequence, TokenEvent& event, FinishReason finish) {
  event.finish = finish;
  ActiveRequest& request = *sequence.request;
  end(sequence);
  erase_if_gone(request);
}

// Row r of the pass scores tokens[num_cached + 1 + r]. Rows computed again after a preemption bring known scores: left
// out.
void Scheduler::State::keep_scores(const StepSequence& step, Sequence& sequence, const SequenceOutput& output) const {
  const int32_t end = std::min(step.num_cached + step.num_new, sequence.num_prompt - 1);
  MOED_CHECK(static_cast<int32_t>(output.prompt_scores.size()) == std::max(end - step.num_cached, 0))
      << "sequence " << sequence.id << ": " << output.prompt_scores.size() << " prompt scores";
  for (size_t i = 0; i < output.prompt_scores.size(); ++i) {
    if (step.num_cached + i == sequence.prompt_scores.size()) sequence.prompt_scores.push_back(output.prompt_scores[i]);
  }
}

// Tells the prefix cache of the blocks that have become full.
void Scheduler::State::register_blocks(Sequence& sequence) {
  if (!config.prefix_cache) return;
  PrefixCache& cache = blocks_in(sequence.pool).cache;
  const std::span<const int32_t> tokens(sequence.tokens);
  while ((sequence.num_hashed_blocks + 1) * config.block_tokens <= sequence.num_cached) {
    const int32_t index = sequence.num_hashed_blocks++;
    const int32_t block = sequence.blocks[index];
    blocked_head = 0;  // it may need fewer blocks now
    // A block shared with a sibling may be known already.
    sequence.prefix =
        cache.contains(block)
            ? cache.entry(block)
            : cache.insert(sequence.prefix, tokens.subspan(int64_t{index} * config.block_tokens, config.block_tokens),
                           block);
  }
}

}  // namespace moed
