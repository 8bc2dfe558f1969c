#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "engine/engine.h"
#include "engine/host_lane.h"
#include "engine/pass_buffers.h"
#include "engine/step_clock.h"
#include "offload/rows_id.h"

namespace moed {

// Where a sequence's K and V are written and its attention computed: on the device, over its own pool or over a staged
// copy of the layer's blocks of the host pool; or over the host pool, by the host lane where the device is not the
// host.
enum class KvPath : uint8_t { kDevice, kHost };
inline constexpr int kKvPaths = 2;

// A sequence of a live pass and where its rows stand in its half.
struct Member {
  StepSequence sequence;
  int32_t order = 0;  // in begin()
  int32_t row_begin = 0;
  KvPath path = KvPath::kHost;
  int32_t staging_begin = -1;  // its first block in the staging pool; -1: its blocks stay where they are

  bool staged() const { return staging_begin >= 0; }
};

// Rows and members of one path: one run of each.
struct RowRun {
  int32_t row_begin = 0;
  int32_t num_rows = 0;
  int32_t member_begin = 0;
  int32_t num_members = 0;
};

// Some of a pass's sequences, which go through a layer together. A sequence is never split between halves. Members are
// sorted by path.
struct Half {
  int32_t index = 0;
  int32_t row_begin = 0;   // in the pass's buffers; fixed
  int32_t num_rows = 0;    // shrinks when sequences are dropped
  int32_t span_begin = 0;  // in the pass's span table; fixed
  std::vector<Member> members;
  std::array<RowRun, kKvPaths> runs;

  const RowRun& run(KvPath path) const { return runs[static_cast<size_t>(path)]; }
  int32_t num_paths() const {
    return static_cast<int32_t>(
        std::count_if(runs.begin(), runs.end(), [](const RowRun& r) { return r.num_rows > 0; }));
  }
};

// One of the two places for a live pass: what is taken at start and kept.
struct PassSlot {
  PassSlot(int32_t index, PassBuffers pass_buffers, Device& device, Stream& stream, StepClock::Turn& turn);

  const int32_t index;  // among the engine's

  PassBuffers buffers;
  StepClock clock;
  // Of the halves; none where the device is the host, whose attention has run when its op returns.
  std::array<std::optional<HalfAttention>, PassBuffers::kHalvesMax> attention;
  bool taken = false;
};

// The state of a live pass: halves and their row tables in the slot's mapped memory. Gives the slot back when it dies.
// Between layers the rows' state is their residual and the attention output of the layer to come, which the host lane
// may still be at.
class RunningPass : public PassState {
 public:
  // REQUIRES: slot not taken, its clock reset; sequences and plan valid (checked: rows, blocks, positions, tokens
  // within their ranges).
  RunningPass(PassSlot& slot, std::span<const StepSequence> sequences, const StepPlan& plan, const ModelConfig& model,
              const EngineConfig& config);
  ~RunningPass() override;
  RunningPass(const RunningPass&) = delete;
  RunningPass& operator=(const RunningPass&) = delete;

  // The half that the sequence is in, and its place there. Null when it is not in the pass.
  Half* find(SequenceId id, size_t& index);
  // Takes a member's rows out; those behind it move up. REQUIRES: the half's attention is not pending. Waits for what
  // the pass has enqueued.
  void drop(Half& half, size_t index, Stream& stream);
  bool empty() const;

  RowViews rows(const Half& half) const { return slot_->buffers.rows(half.row_begin, half.num_rows); }
  // Their rows are counted within the half.
  std::span<const AttentionSpan> spans(const Half& half, KvPath path) const {
    const RowRun& run = half.run(path);
    return {slot_->buffers.spans() + half.span_begin + run.member_begin, static_cast<size_t>(run.num_members)};
  }
  const HalfTables& tables(const Half& half) const { return slot_->buffers.half(half.index); }
  HalfAttention* attention(const Half& half) const {
    std::optional<HalfAttention>& attention = slot_->attention[half.index];
    return attention.has_value() ? &*attention : nullptr;
  }
  RowsId id(const Half& half) const { return {.pass = slot_->index, .half = half.index}; }
  std::span<const Half> halves() const { return halves_; }
  const PassBuffers& buffers() const { return slot_->buffers; }
  StepClock& clock() { return slot_->clock; }
  const StepPlan& plan() const { return plan_; }

  int32_t layer = 0;              // that advance() runs next
  int32_t prefetched_layer = -1;  // layer, when the ring was last told what the pass wants
  size_t num_passed = 0;          // of the plan's prefetches, the first ones whose layers are behind

 private:
  // Sets the member's path; a staged one takes its blocks from `staging_left`.
  void choose_path(Member& member, int64_t& staging_left) const;
  void check(const StepSequence& sequence) const;
  void add(Half& half, Member member, int64_t& table_used);
  void count_runs(Half& half);
  void move_rows_up(const Half& half, int32_t begin, int32_t gap, Stream& stream);
  int32_t blocks_of(const StepSequence& sequence) const {
    return (sequence.num_cached + sequence.num_new + config_.block_tokens - 1) / config_.block_tokens;
  }

  PassSlot* slot_;
  const EngineConfig& config_;
  const int32_t vocab_size_;
  const StepPlan plan_;
  std::vector<Half> halves_;
};

}  // namespace moed
