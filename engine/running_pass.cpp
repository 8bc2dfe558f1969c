#include "engine/running_pass.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace moed {
namespace {

// A span of so many rows is worth bringing its earlier KV to the device: each byte of KV that crosses the link serves
// all of them, while the host's cores would do rows times as many products as they read bytes.
constexpr int32_t kStagedRowsMin = 8;

}  // namespace

PassSlot::PassSlot(int32_t slot_index, PassBuffers pass_buffers, Device& device, Stream& stream, StepClock::Turn& turn)
    : index(slot_index), buffers(std::move(pass_buffers)), clock(device, stream, turn) {
  if (device.is_host()) return;
  for (auto& half : attention) half.emplace(device);
}

RunningPass::RunningPass(PassSlot& slot, std::span<const StepSequence> sequences, const StepPlan& plan,
                         const ModelConfig& model, const EngineConfig& config)
    : slot_(&slot), config_(config), vocab_size_(model.vocab_size), plan_(plan) {
  MOED_CHECK(!slot.taken) << "a pass slot is used twice";
  MOED_CHECK(static_cast<int64_t>(sequences.size()) <= config.sequences_max)
      << sequences.size() << " sequences in a pass of at most " << config.sequences_max;
  slot.taken = true;
  int32_t row = 0;
  int64_t table_used = 0;
  const auto num_sequences = static_cast<int32_t>(sequences.size());
  int32_t begin = 0;
  for (const int32_t end : {plan.split, num_sequences}) {
    if (begin == end) continue;
    Half& half = halves_.emplace_back();
    half.index = static_cast<int32_t>(halves_.size()) - 1;
    half.row_begin = row;
    half.span_begin = begin;
    // The compute stream takes one half's layer after the other's, so both may use the whole staging pool.
    int64_t staging_left = config.staging_blocks;
    std::vector<Member> members;
    for (int32_t i = begin; i < end; ++i) {
      check(sequences[i]);
      Member member{.sequence = sequences[i], .order = i};
      choose_path(member, staging_left);
      members.push_back(member);
    }
    std::stable_sort(members.begin(), members.end(), [](const Member& a, const Member& b) { return a.path < b.path; });
    for (const Member& member : members) add(half, member, table_used);
    count_runs(half);
    row += half.num_rows;
    begin = end;
  }
}

RunningPass::~RunningPass() {
  for (auto& attention : slot_->attention) {
    if (attention.has_value()) attention->abandon();
  }
  // The next pass writes its tables where this one's work may still read.
  slot_->clock.join();
  slot_->taken = false;
}

void RunningPass::choose_path(Member& member, int64_t& staging_left) const {
  member.path = KvPath::kDevice;
  if (member.sequence.pool == Pool::kDevice) return;
  const int32_t num_blocks = blocks_of(member.sequence);
  if (member.sequence.num_new < kStagedRowsMin || num_blocks > staging_left) {
    member.path = KvPath::kHost;
    return;
  }
  member.staging_begin = static_cast<int32_t>(config_.staging_blocks - staging_left);
  staging_left -= num_blocks;
}

void RunningPass::check(const StepSequence& sequence) const {
  const int64_t num_tokens = int64_t{sequence.num_cached} + sequence.num_new;
  MOED_CHECK(sequence.pool == Pool::kHost || config_.device_kv_blocks > 0)
      << "sequence " << sequence.id << " is in a pool this engine has not";
  MOED_CHECK(sequence.num_cached >= 0 && sequence.num_new > 0 && num_tokens <= config_.max_model_len &&
             num_tokens <= static_cast<int64_t>(sequence.tokens.size()))
      << "sequence " << sequence.id << ": " << sequence.num_cached << " cached, " << sequence.num_new << " new of "
      << sequence.tokens.size() << " tokens, contexts of at most " << config_.max_model_len;
  MOED_CHECK(sequence.sampling == nullptr || num_tokens == static_cast<int64_t>(sequence.tokens.size()))
      << "sequence " << sequence.id << " samples before its last token is computed";
  const int32_t num_blocks = blocks_of(sequence);
  MOED_CHECK(num_blocks <= static_cast<int64_t>(sequence.blocks.size()))
      << "sequence " << sequence.id << " needs " << num_blocks << " KV blocks and has " << sequence.blocks.size();
  const int64_t pool_blocks = sequence.pool == Pool::kHost ? config_.kv_blocks : config_.device_kv_blocks;
  for (const int32_t block : sequence.blocks.first(num_blocks)) {
    MOED_CHECK(block >= 0 && block < pool_blocks) << "sequence " << sequence.id << " names KV block " << block;
  }
}

void RunningPass::add(Half& half, Member member, int64_t& table_used) {
  const StepSequence& sequence = member.sequence;
  MOED_CHECK(half.row_begin + half.num_rows + sequence.num_new <= config_.rows_max)
      << "more than " << config_.rows_max << " rows";
  const int32_t num_blocks = blocks_of(sequence);
  int32_t* blocks = slot_->buffers.block_table() + table_used;
  const int32_t first_staged = static_cast<int32_t>(config_.device_kv_blocks) + member.staging_begin;
  for (int32_t i = 0; i < num_blocks; ++i) blocks[i] = member.staged() ? first_staged + i : sequence.blocks[i];
  table_used += num_blocks;
  const RowViews rows = slot_->buffers.rows(half.row_begin + half.num_rows, sequence.num_new);
  const int32_t block_tokens = config_.block_tokens;
  for (int32_t row = 0; row < sequence.num_new; ++row) {
    const int32_t position = sequence.num_cached + row;
    const int32_t token = sequence.tokens[position];
    MOED_CHECK(token >= 0 && token < vocab_size_) << "sequence " << sequence.id << " holds token " << token;
    rows.tokens[row] = token;
    rows.positions[row] = position;
    rows.slots[row] = int64_t{blocks[position / block_tokens]} * block_tokens + position % block_tokens;
  }
  slot_->buffers.spans()[half.span_begin + half.members.size()] = {
      .row_begin = half.num_rows, .num_rows = sequence.num_new, .num_cached = sequence.num_cached, .blocks = blocks};
  member.row_begin = half.num_rows;
  half.num_rows += sequence.num_new;
  half.members.push_back(member);
}

void RunningPass::count_runs(Half& half) {
  half.runs = {};
  for (const Member& member : half.members) {
    RowRun& run = half.runs[static_cast<size_t>(member.path)];
    ++run.num_members;
    run.num_rows += member.sequence.num_new;
  }
  for (size_t path = 1; path < half.runs.size(); ++path) {
    const RowRun& before = half.runs[path - 1];
    half.runs[path].row_begin = before.row_begin + before.num_rows;
    half.runs[path].member_begin = before.member_begin + before.num_members;
  }
  int32_t* offsets = slot_->buffers.half(half.index).whole_offsets;
  offsets[0] = 0;
  offsets[1] = half.num_rows;
}

Half* RunningPass::find(SequenceId id, size_t& index) {
  for (Half& half : halves_) {
    for (index = 0; index < half.members.size(); ++index) {
      if (half.members[index].sequence.id == id) return &half;
    }
  }
  return nullptr;
}

void RunningPass::drop(Half& half, size_t index, Stream& stream) {
  // The host moves tables that the work enqueued so far reads.
  slot_->clock.join();
  const int32_t gap = half.members[index].sequence.num_new;
  move_rows_up(half, half.members[index].row_begin, gap, stream);
  AttentionSpan* spans = slot_->buffers.spans() + half.span_begin;
  std::copy(spans + index + 1, spans + half.members.size(), spans + index);
  half.members.erase(half.members.begin() + static_cast<int64_t>(index));
  half.num_rows -= gap;
  for (size_t i = index; i < half.members.size(); ++i) {
    half.members[i].row_begin -= gap;
    spans[i].row_begin -= gap;
  }
  count_runs(half);
}

// Rows [begin + gap, end) go to [begin, ...). Between layers the rows' queries and outputs of experts are free: what
// would overlap goes by way of them.
void RunningPass::move_rows_up(const Half& half, int32_t begin, int32_t gap, Stream& stream) {
  const int32_t behind = half.num_rows - begin - gap;
  if (behind == 0) return;
  const RowViews views = rows(half);
  const auto move = [&](auto* to, const auto* from, auto* free, int64_t stride) {
    const int64_t bytes = behind * stride * static_cast<int64_t>(sizeof(*to));
    if (behind > gap) {
      stream.copy(free, from, bytes);
      from = free;
    }
    stream.copy(to, from, bytes);
  };
  move(views.residual.row(begin), views.residual.row(begin + gap), views.expert_outputs, views.residual.stride);
  move(views.attention.row(begin), views.attention.row(begin + gap), views.q.row(0), views.attention.stride);
  std::memmove(views.tokens + begin, views.tokens + begin + gap, behind * sizeof(*views.tokens));
  std::memmove(views.positions + begin, views.positions + begin + gap, behind * sizeof(*views.positions));
  std::memmove(views.slots + begin, views.slots + begin + gap, behind * sizeof(*views.slots));
}

bool RunningPass::empty() const {
  return std::all_of(halves_.begin(), halves_.end(), [](const Half& half) { return half.num_rows == 0; });
}

}  // namespace moed
