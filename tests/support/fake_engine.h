#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "engine/engine.h"

namespace moed {

// The token that FakeEngine samples after `tokens` when nothing restricts the choice: a hash of all of them and the
// seed. seed: SamplingParams::seed of the sequence.
int32_t fake_next_token(std::span<const int32_t> tokens, uint64_t seed, int32_t vocab_size);

// The same under allowed_token_ids and min_tokens (with forbidden_until_min), the only rules FakeEngine honours.
int32_t fake_next_token(std::span<const int32_t> tokens, int32_t num_prompt, const SamplingParams& sampling,
                        int32_t vocab_size);

// The log-probability that FakeEngine gives the last of `tokens` after those before it: in (-16, 0].
float fake_logprob(std::span<const int32_t> tokens);

struct FakeEngineConfig {
  int32_t num_layers = 2;
  int32_t rows_max = 512;
  int64_t num_blocks = 0;     // of pool kHost
  int64_t device_blocks = 0;  // of pool kDevice
  int32_t block_tokens = 16;
  int32_t vocab_size = 0;
  // Time that one layer of a pass sleeps: layer_us + rows * row_us.
  int64_t layer_us = 0;
  int64_t row_us = 0;
  int32_t breaks_on = -1;  // the answer to a sequence that holds this token is broken
};

// An Engine without a model, for tests of what stands above engines. Its KV holds, per layer and slot, the token that
// was computed there. At each layer a row writes its own slot and, where an answer is wanted, reads its whole context
// through the sequence's blocks in its pool; the answer is a hash of what it read. So a wrong block table, a lost copy,
// a block that was given away while still in use, or a cached block that belongs to other tokens changes the answer. A
// REQUIRES of Engine that a test can break dies in a MOED_CHECK: rows over the limit, a sequence in two passes, a block
// written while another reads it.
class FakeEngine final : public Engine {
 public:
  explicit FakeEngine(const FakeEngineConfig& config);
  ~FakeEngine() override;

  Pass begin(std::span<const StepSequence> sequences, const StepPlan& plan) override;
  bool advance(Pass& pass) override;
  void drop(Pass& pass, SequenceId id) override;
  StepOutput finish(Pass&& pass) override;
  void copy_block(Pool pool, int32_t from, int32_t to) override;
  int32_t rows_max() const override { return config_.rows_max; }

  // Passes alive; rows computed since the start (prompt tokens that no cache spared, and decode rows).
  int32_t num_alive() const { return num_alive_; }
  int64_t num_rows_computed() const { return num_rows_computed_; }
  int64_t num_blocks_copied() const { return num_blocks_copied_; }
  // Of each pass so far.
  const std::vector<StepPlan>& plans() const { return plans_; }

 private:
  struct State;
  // What the live passes do with a block.
  struct BlockUse {
    int32_t num_readers = 0;  // sequences of live passes, the writer included
    bool written = false;
  };

  void claim(const StepSequence& sequence);
  void release(const StepSequence& sequence);
  void run_layer(State& state, size_t index);
  SequenceOutput output_of(const StepSequence& sequence) const;
  int32_t& slot(int32_t layer, const StepSequence& sequence, int32_t position);
  int32_t held(int32_t layer, const StepSequence& sequence, int32_t position) const;

  struct KvBlocks {
    std::vector<std::vector<int32_t>> layers;  // [num_layers][num_blocks * block_tokens]
    std::vector<BlockUse> uses;                // [num_blocks]
  };
  KvBlocks& pool(Pool which) { return pools_[static_cast<size_t>(which)]; }

  FakeEngineConfig config_;
  std::array<KvBlocks, 2> pools_;  // by Pool
  std::unordered_map<SequenceId, int32_t> alive_;
  int32_t num_alive_ = 0;
  int64_t num_rows_computed_ = 0;
  int64_t num_blocks_copied_ = 0;
  std::vector<StepPlan> plans_;
};

}  // namespace moed
