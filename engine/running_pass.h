#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/engine.h"
#include "engine/pass_buffers.h"
#include "engine/step_clock.h"

namespace moed {

// A sequence of a live pass and where its rows stand in its half.
struct Member {
  StepSequence sequence;
  int32_t row_begin = 0;
};

// Some of a pass's sequences, which go through a layer together. A sequence is never split between halves.
struct Half {
  int32_t row_begin = 0;   // in the pass's buffers; fixed
  int32_t num_rows = 0;    // shrinks when sequences are dropped
  int32_t span_begin = 0;  // in the pass's span table; fixed
  std::vector<Member> members;
};

// One of the two places for a live pass: what is taken at start and kept.
struct PassSlot {
  PassBuffers buffers;
  StepClock clock;
  bool taken = false;
};

// The state of a live pass: halves and their row tables in the slot's mapped memory. Gives the slot back when it dies.
// Between layers the rows' state is their residual and the attention output of the layer to come.
class RunningPass : public PassState {
 public:
  // REQUIRES: slot not taken; sequences and plan valid (checked: rows, blocks, positions, tokens within their ranges).
  RunningPass(PassSlot& slot, std::span<const StepSequence> sequences, const StepPlan& plan, const ModelConfig& model,
              const EngineConfig& config);
  ~RunningPass() override;
  RunningPass(const RunningPass&) = delete;
  RunningPass& operator=(const RunningPass&) = delete;

  // Takes a sequence's rows out; those behind it move up. Waits for what the pass has enqueued. Returns false when the
  // id is not in the pass.
  bool drop(SequenceId id, Stream& stream);
  bool empty() const;

  RowViews rows(const Half& half) const { return slot_->buffers.rows(half.row_begin, half.num_rows); }
  std::span<const AttentionSpan> spans(const Half& half) const {
    return {slot_->buffers.spans() + half.span_begin, half.members.size()};
  }
  std::span<const Half> halves() const { return halves_; }
  const PassBuffers& buffers() const { return slot_->buffers; }
  StepClock& clock() { return slot_->clock; }

  int32_t layer = 0;  // that advance() runs next

 private:
  void add(Half& half, const StepSequence& sequence, int64_t& table_used);
  void move_rows_up(const Half& half, int32_t begin, int32_t gap, Stream& stream);

  PassSlot* slot_;
  std::vector<Half> halves_;
  const int32_t vocab_size_;
  const int32_t block_tokens_;
  const int32_t max_model_len_;
  const int32_t rows_max_;
  const int64_t num_blocks_;
};

}  // namespace moed
