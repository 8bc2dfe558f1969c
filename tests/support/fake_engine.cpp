#include "tests/support/fake_engine.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "base/check.h"

namespace moed {
namespace {

// splitmix64's finalizer.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

constexpr uint64_t kEmptyHash = 0x6d6f6564;

uint64_t extend(uint64_t hash, int32_t token) { return mix(hash ^ static_cast<uint32_t>(token)); }

uint64_t hash_of(std::span<const int32_t> tokens) {
  uint64_t hash = kEmptyHash;
  for (const int32_t token : tokens) hash = extend(hash, token);
  return hash;
}

int32_t token_of(uint64_t hash, uint64_t seed, int32_t vocab_size) {
  return static_cast<int32_t>(mix(hash ^ mix(seed)) % static_cast<uint64_t>(vocab_size));
}

float logprob_of(uint64_t hash) { return -static_cast<float>(hash % 16384) / 1024.0F; }

int32_t sample(uint64_t hash, int32_t num_generated, const SamplingParams& sampling, int32_t vocab_size) {
  const std::vector<int32_t>& allowed = sampling.allowed_token_ids;
  const auto num_candidates = allowed.empty() ? vocab_size : static_cast<int32_t>(allowed.size());
  int32_t candidate = token_of(hash, sampling.seed, num_candidates);
  const auto token = [&] { return allowed.empty() ? candidate : allowed[candidate]; };
  if (num_generated >= sampling.min_tokens) return token();
  const std::vector<int32_t>& forbidden = sampling.forbidden_until_min;
  for (int32_t i = 0; i < num_candidates && std::ranges::find(forbidden, token()) != forbidden.end(); ++i) {
    candidate = (candidate + 1) % num_candidates;
  }
  return token();
}

bool wants_output(const StepSequence& sequence) { return sequence.sampling != nullptr || sequence.prompt_logprobs; }

// The scored token first, then ids after it, each less likely than the one before.
ScoredToken score(int32_t token, float logprob, int32_t num_logprobs, int32_t vocab_size) {
  ScoredToken scored{.token = token, .logprob = logprob, .top = {}};
  for (int32_t i = 0; i < std::min(num_logprobs, vocab_size); ++i) {
    scored.top.push_back({.token = (token + i) % vocab_size, .logprob = logprob - static_cast<float>(i)});
  }
  return scored;
}

}  // namespace

int32_t fake_next_token(std::span<const int32_t> tokens, uint64_t seed, int32_t vocab_size) {
  return token_of(hash_of(tokens), seed, vocab_size);
}

int32_t fake_next_token(std::span<const int32_t> tokens, int32_t num_prompt, const SamplingParams& sampling,
                        int32_t vocab_size) {
  return sample(hash_of(tokens), static_cast<int32_t>(tokens.size()) - num_prompt, sampling, vocab_size);
}

float fake_logprob(std::span<const int32_t> tokens) { return logprob_of(hash_of(tokens)); }

struct FakeEngine::State final : PassState {
  struct Member {
    StepSequence sequence;
    uint64_t hash = 0;  // of the context as the layers so far read it; garbage once two layers disagree
    bool dropped = false;
  };
  std::vector<Member> members;
  int32_t layer = 0;
  int32_t num_rows = 0;  // of sequences that were not dropped
};

FakeEngine::FakeEngine(const FakeEngineConfig& config) : config_(config) {
  MOED_CHECK(config.num_layers > 0 && config.vocab_size > 0) << "an empty model";
  MOED_CHECK(config.num_blocks + config.device_blocks > 0) << "no KV blocks";
  for (const auto& [which, num_blocks] :
       {std::pair{Pool::kHost, config.num_blocks}, {Pool::kDevice, config.device_blocks}}) {
    // -1 is no token: what was never written never matches.
    pool(which).layers.assign(config.num_layers, std::vector<int32_t>(num_blocks * config.block_tokens, -1));
    pool(which).uses.resize(num_blocks);
  }
}

FakeEngine::~FakeEngine() = default;

int32_t& FakeEngine::slot(int32_t layer, const StepSequence& sequence, int32_t position) {
  const int64_t block = sequence.blocks[position / config_.block_tokens];
  return pool(sequence.pool).layers[layer][block * config_.block_tokens + position % config_.block_tokens];
}

int32_t FakeEngine::held(int32_t layer, const StepSequence& sequence, int32_t position) const {
  const int64_t block = sequence.blocks[position / config_.block_tokens];
  return pools_[static_cast<size_t>(sequence.pool)]
      .layers[layer][block * config_.block_tokens + position % config_.block_tokens];
}

void FakeEngine::claim(const StepSequence& sequence) {
  const int32_t end = sequence.num_cached + sequence.num_new;
  MOED_CHECK(sequence.num_new > 0 && sequence.num_cached >= 0) << "sequence " << sequence.id << " has no rows";
  MOED_CHECK(end <= static_cast<int32_t>(sequence.tokens.size()))
      << "sequence " << sequence.id << ": rows beyond its tokens";
  MOED_CHECK(static_cast<int64_t>(sequence.blocks.size()) * config_.block_tokens >= end)
      << "sequence " << sequence.id << ": blocks do not cover its rows";
  MOED_CHECK(++alive_[sequence.id] == 1) << "sequence " << sequence.id << " is in two passes";
  const int32_t num_blocks = (end + config_.block_tokens - 1) / config_.block_tokens;
  std::vector<BlockUse>& uses = pool(sequence.pool).uses;
  for (int32_t i = 0; i < num_blocks; ++i) {
    const int32_t block = sequence.blocks[i];
    MOED_CHECK(block >= 0 && block < static_cast<int32_t>(uses.size()))
        << "sequence " << sequence.id << ": block " << block;
    BlockUse& use = uses[block];
    const bool writes = i >= sequence.num_cached / config_.block_tokens;
    MOED_CHECK(!use.written && (!writes || use.num_readers == 0))
        << "sequence " << sequence.id << ": block " << block << " is written while another sequence uses it";
    ++use.num_readers;
    use.written = writes;
  }
}

void FakeEngine::release(const StepSequence& sequence) {
  alive_.erase(sequence.id);
  const int32_t end = sequence.num_cached + sequence.num_new;
  for (int32_t i = 0; i * config_.block_tokens < end; ++i) {
    BlockUse& use = pool(sequence.pool).uses[sequence.blocks[i]];
    --use.num_readers;
    use.written = false;
  }
}

Pass FakeEngine::begin(std::span<const StepSequence> sequences, const StepPlan& plan) {
  MOED_CHECK(num_alive_ < 2) << "two passes are alive already";
  plans_.push_back(plan);
  auto state = std::make_unique<State>();
  for (const StepSequence& sequence : sequences) {
    claim(sequence);
    state->members.push_back({.sequence = sequence});
    state->num_rows += sequence.num_new;
  }
  MOED_CHECK(state->num_rows > 0 && state->num_rows <= config_.rows_max) << state->num_rows << " rows";
  ++num_alive_;
  num_rows_computed_ += state->num_rows;
  return Pass(std::move(state));
}

void FakeEngine::run_layer(State& state, size_t index) {
  State::Member& member = state.members[index];
  const StepSequence& sequence = member.sequence;
  const int32_t end = sequence.num_cached + sequence.num_new;
  for (int32_t i = sequence.num_cached; i < end; ++i) slot(state.layer, sequence, i) = sequence.tokens[i];
  if (!wants_output(sequence)) return;
  uint64_t hash = kEmptyHash;
  for (int32_t i = 0; i < end; ++i) hash = extend(hash, held(state.layer, sequence, i));
  if (state.layer > 0 && hash != member.hash) hash = mix(hash ^ member.hash);
  member.hash = hash;
}

bool FakeEngine::advance(Pass& pass) {
  auto& state = static_cast<State&>(pass.state());
  if (state.num_rows == 0) return false;
  MOED_CHECK(state.layer < config_.num_layers) << "advance() past the last layer";
  for (size_t i = 0; i < state.members.size(); ++i) {
    if (!state.members[i].dropped) run_layer(state, i);
  }
  const int64_t sleep_us = config_.layer_us + state.num_rows * config_.row_us;
  if (sleep_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(sleep_us));
  return ++state.layer < config_.num_layers;
}

void FakeEngine::drop(Pass& pass, SequenceId id) {
  auto& state = static_cast<State&>(pass.state());
  for (State::Member& member : state.members) {
    if (member.sequence.id != id || member.dropped) continue;
    release(member.sequence);
    member.dropped = true;
    state.num_rows -= member.sequence.num_new;
    // What it points to dies with the scheduler's sequence.
    member.sequence = {.id = id};
  }
}

SequenceOutput FakeEngine::output_of(const StepSequence& sequence) const {
  SequenceOutput output{.id = sequence.id, .sampled = std::nullopt, .prompt_scores = {}};
  output.broken = std::find(sequence.tokens.begin(), sequence.tokens.end(), config_.breaks_on) != sequence.tokens.end();
  if (!sequence.prompt_logprobs) return output;
  uint64_t hash = kEmptyHash;
  const int32_t last = std::min(sequence.num_cached + sequence.num_new, sequence.num_prompt - 1);
  for (int32_t i = 0; i <= last; ++i) {
    // The token behind the last row is not in KV yet.
    const int32_t token =
        i < sequence.num_cached + sequence.num_new ? held(config_.num_layers - 1, sequence, i) : sequence.tokens[i];
    hash = extend(hash, token);
    if (i > sequence.num_cached) {
      output.prompt_scores.push_back(
          score(sequence.tokens[i], logprob_of(hash), sequence.num_prompt_top, config_.vocab_size));
    }
  }
  return output;
}

StepOutput FakeEngine::finish(Pass&& pass) {
  Pass ended = std::move(pass);
  auto& state = static_cast<State&>(ended.state());
  MOED_CHECK(state.num_rows == 0 || state.layer == config_.num_layers) << "finish() before the last layer";
  StepOutput output;
  for (const State::Member& member : state.members) {
    if (member.dropped) continue;
    const StepSequence& sequence = member.sequence;
    SequenceOutput& answer = output.sequences.emplace_back(output_of(sequence));
    if (sequence.sampling != nullptr) {
      const int32_t num_generated = static_cast<int32_t>(sequence.tokens.size()) - sequence.num_prompt;
      const int32_t token = sample(member.hash, num_generated, *sequence.sampling, config_.vocab_size);
      answer.sampled =
          score(token, logprob_of(extend(member.hash, token)), sequence.sampling->num_logprobs, config_.vocab_size);
    }
    release(sequence);
  }
  output.times.total_us =
      static_cast<double>(config_.num_layers * (config_.layer_us + state.num_rows * config_.row_us));
  --num_alive_;
  return output;
}

void FakeEngine::copy_block(Pool which, int32_t from, int32_t to) {
  KvBlocks& blocks = pool(which);
  const auto num_blocks = static_cast<int32_t>(blocks.uses.size());
  MOED_CHECK(from != to && from >= 0 && to >= 0 && from < num_blocks && to < num_blocks)
      << "copy of block " << from << " to " << to << " in a pool of " << num_blocks;
  MOED_CHECK(blocks.uses[to].num_readers == 0) << "copy into block " << to << ", which a live pass uses";
  for (std::vector<int32_t>& layer : blocks.layers) {
    const auto source = layer.begin() + int64_t{from} * config_.block_tokens;
    std::copy_n(source, config_.block_tokens, layer.begin() + int64_t{to} * config_.block_tokens);
  }
  ++num_blocks_copied_;
}

}  // namespace moed
