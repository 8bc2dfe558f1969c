#include "engine/running_pass.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace moed {

RunningPass::RunningPass(PassSlot& slot, std::span<const StepSequence> sequences, const StepPlan& plan,
                         const ModelConfig& model, const EngineConfig& config)
    : slot_(&slot),
      vocab_size_(model.vocab_size),
      block_tokens_(config.block_tokens),
      max_model_len_(config.max_model_len),
      rows_max_(config.rows_max),
      num_blocks_(config.kv_blocks) {
  MOED_CHECK(!slot.taken) << "a pass slot is used twice";
  MOED_CHECK(static_cast<int64_t>(sequences.size()) <= config.sequences_max)
      << sequences.size() << " sequences in a pass of at most " << config.sequences_max;
  slot.taken = true;
  slot.clock.reset();
  int32_t row = 0;
  int32_t index = 0;
  int64_t table_used = 0;
  const auto num_sequences = static_cast<int32_t>(sequences.size());
  for (const int32_t end : {plan.split, num_sequences}) {
    if (index == end) continue;
    Half& half = halves_.emplace_back();
    half.row_begin = row;
    half.span_begin = index;
    for (; index < end; ++index) add(half, sequences[index], table_used);
    row += half.num_rows;
  }
}

RunningPass::~RunningPass() {
  // The next pass writes its tables where this one's work may still read.
  slot_->clock.join();
  slot_->taken = false;
}

void RunningPass::add(Half& half, const StepSequence& sequence, int64_t& table_used) {
  const int32_t num_tokens = sequence.num_cached + sequence.num_new;
  MOED_CHECK(sequence.pool == Pool::kHost) << "sequence " << sequence.id << " is in a pool this engine has not";
  MOED_CHECK(sequence.num_cached >= 0 && sequence.num_new > 0 && num_tokens <= max_model_len_ &&
             num_tokens <= static_cast<int64_t>(sequence.tokens.size()))
      << "sequence " << sequence.id << ": " << sequence.num_cached << " cached, " << sequence.num_new << " new of "
      << sequence.tokens.size() << " tokens, contexts of at most " << max_model_len_;
  MOED_CHECK(sequence.sampling == nullptr || num_tokens == static_cast<int64_t>(sequence.tokens.size()))
      << "sequence " << sequence.id << " samples before its last token is computed";
  MOED_CHECK(half.row_begin + half.num_rows + sequence.num_new <= rows_max_) << "more than " << rows_max_ << " rows";
  const int64_t num_blocks = (int64_t{num_tokens} + block_tokens_ - 1) / block_tokens_;
  MOED_CHECK(num_blocks <= static_cast<int64_t>(sequence.blocks.size()))
      << "sequence " << sequence.id << " needs " << num_blocks << " KV blocks and has " << sequence.blocks.size();
  for (const int32_t block : sequence.blocks.first(num_blocks)) {
    MOED_CHECK(block >= 0 && block < num_blocks_) << "sequence " << sequence.id << " names KV block " << block;
  }

  int32_t* blocks = slot_->buffers.block_table() + table_used;
  std::copy_n(sequence.blocks.begin(), num_blocks, blocks);
  table_used += num_blocks;
  const RowViews rows = slot_->buffers.rows(half.row_begin + half.num_rows, sequence.num_new);
  for (int32_t row = 0; row < sequence.num_new; ++row) {
    const int32_t position = sequence.num_cached + row;
    const int32_t token = sequence.tokens[position];
    MOED_CHECK(token >= 0 && token < vocab_size_) << "sequence " << sequence.id << " holds token " << token;
    rows.tokens[row] = token;
    rows.positions[row] = position;
    rows.slots[row] = int64_t{blocks[position / block_tokens_]} * block_tokens_ + position % block_tokens_;
  }
  AttentionSpan& span = slot_->buffers.spans()[half.span_begin + half.members.size()];
  span = {
      .row_begin = half.num_rows, .num_rows = sequence.num_new, .num_cached = sequence.num_cached, .blocks = blocks};
  half.members.push_back({sequence, half.num_rows});
  half.num_rows += sequence.num_new;
}

bool RunningPass::drop(SequenceId id, Stream& stream) {
  for (Half& half : halves_) {
    const auto dropped =
        std::find_if(half.members.begin(), half.members.end(), [id](const Member& m) { return m.sequence.id == id; });
    if (dropped == half.members.end()) continue;
    // The host moves tables that the work enqueued so far reads.
    slot_->clock.join();
    const int32_t gap = dropped->sequence.num_new;
    const auto index = dropped - half.members.begin();
    move_rows_up(half, dropped->row_begin, gap, stream);
    AttentionSpan* spans = slot_->buffers.spans() + half.span_begin;
    std::copy(spans + index + 1, spans + half.members.size(), spans + index);
    half.members.erase(dropped);
    half.num_rows -= gap;
    for (auto i = static_cast<size_t>(index); i < half.members.size(); ++i) {
      half.members[i].row_begin -= gap;
      spans[i].row_begin -= gap;
    }
    return true;
  }
  return false;
}

// Rows [begin + gap, end) go to [begin, ...). Copies of at most `gap` rows never overlap.
void RunningPass::move_rows_up(const Half& half, int32_t begin, int32_t gap, Stream& stream) {
  const RowViews views = rows(half);
  for (int32_t to = begin; to + gap < half.num_rows; to += gap) {
    const int32_t from = to + gap;
    const int32_t count = std::min(gap, half.num_rows - from);
    stream.copy(views.residual.row(to), views.residual.row(from),
                count * views.residual.stride * int64_t{sizeof(float)});
    stream.copy(views.attention.row(to), views.attention.row(from),
                count * views.attention.stride * int64_t{sizeof(Bf16)});
  }
  const int32_t behind = half.num_rows - begin - gap;
  std::memmove(views.tokens + begin, views.tokens + begin + gap, behind * sizeof(*views.tokens));
  std::memmove(views.positions + begin, views.positions + begin + gap, behind * sizeof(*views.positions));
  std::memmove(views.slots + begin, views.slots + begin + gap, behind * sizeof(*views.slots));
}

bool RunningPass::empty() const {
  return std::all_of(halves_.begin(), halves_.end(), [](const Half& half) { return half.num_rows == 0; });
}

}  // namespace moed
