#include <algorithm>
#include <atomic>
#include <chrono>

#include "base/check.h"
#include "kernels/host/host_ops.h"

namespace moed {
namespace {

constexpr int64_t kFloatBytes = sizeof(float);
// Partials of split contexts: within what the memory budget allows the process for such things. Those of attention in
// slices are used again and again.
constexpr int64_t kSplitBytesMax = int64_t{64} << 20;
constexpr int64_t kSlicedBytesMax = int64_t{16} << 20;
// What one task of attention in slices may do, so that slices end in time: some 50 us of a core.
constexpr int32_t kSlicedChunks = 8;
constexpr int32_t kSlicedVectors = 64;  // times chunks

int32_t group_of(const Attention& args) { return args.num_heads / args.kv.num_kv_heads; }

// Positions that the row sees.
int32_t seen_by(const AttentionSpan& span, int32_t row) { return span.num_cached + row + 1; }

int32_t chunks_of(int32_t positions) { return (positions + kChunkPositions - 1) / kChunkPositions; }

AttentionPartial partial_at(float* base, int32_t vectors) {
  return {base, base + vectors, base + 2 * int64_t{vectors}};
}

AttentionPartial skip(const AttentionPartial& partial, int32_t vectors, int32_t head_dim) {
  return {partial.peak + vectors, partial.total + vectors, partial.sums + int64_t{vectors} * head_dim};
}

int64_t partial_floats(int32_t vectors, int32_t head_dim) { return int64_t{vectors} * (head_dim + 2); }

// Rows of the tile, from its first, that see nothing of the chunk.
int32_t rows_before(const AttentionSpan& span, int32_t row, int32_t chunk) {
  return std::max(0, chunk * kChunkPositions - (span.num_cached + row));
}

int32_t rows_of_tile(const Attention& args) { return std::max(1, kTileVectors / group_of(args)); }

// Of one head, among the partials of all heads that begin at `base`.
AttentionPartial split_at(const Attention& args, float* base, int32_t num_rows, int32_t head) {
  const int32_t vectors = num_rows * group_of(args);
  return partial_at(base + head * partial_floats(vectors, args.kv.head_dim), vectors);
}

}  // namespace

// Attention cut into slices of time. Other ops may run in between: only what a slice needs for itself is shared with
// them.
class HostOps::SlicedAttention final : public HostAttention {
 public:
  explicit SlicedAttention(HostOps& ops) : ops_(ops) {
    ops_.sliced_.push_back(this);
    reserve();
  }
  ~SlicedAttention() override { std::erase(ops_.sliced_, this); }

  void reserve() {
    const OpLimits& limits = ops_.limits_;
    ops_.reserve_run(run_, std::min<int64_t>(int64_t{limits.rows} * limits.num_heads * chunks_of(limits.context_tokens),
                                             kSlicedBytesMax / (partial_floats(1, limits.head_dim) * kFloatBytes)));
  }

  void begin(const Attention& args) override {
    MOED_CHECK(done_) << "attention begins while one is under way";
    ops_.begin_attention(run_, args);
    done_ = !plan();
  }

  void run(double slice_us) override {
    MOED_CHECK(!done_) << "there is no attention under way";
    const auto slice = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double, std::micro>(slice_us));
    const Clock::time_point end = Clock::now() + slice;
    do {
      run_units(end);
      if (next_ < num_units()) continue;
      next_ = 0;
      if (!merges_ && run_.num_merged() > 0) {
        merges_ = true;
      } else {
        done_ = !plan();
      }
    } while (!done_ && Clock::now() < end);
  }

  bool done() const override { return done_; }

 private:
  using Clock = std::chrono::steady_clock;

  int64_t num_units() const { return merges_ ? run_.num_merged() : run_.num_computed(); }

  // The next tiles, as many as there is room for the partials of.
  bool plan() {
    merges_ = false;
    const int32_t group = group_of(run_.args);
    return ops_.plan_attention(run_, true, [&](int32_t num_rows, int32_t num_chunks) {
      return num_chunks > kSlicedChunks || num_rows * group * num_chunks > kSlicedVectors;
    });
  }

  // Each thread takes units until the time is up, and at least one when there are enough.
  void run_units(Clock::time_point end) {
    const int64_t count = num_units();
    std::atomic<int64_t> next{next_};
    ops_.pool_.run(std::min<int64_t>(ops_.pool_.num_threads(), count - next_), [&](int64_t, int thread) {
      do {
        const int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
        if (unit >= count) return;
        if (merges_) {
          ops_.merge_unit(run_, unit);
        } else {
          ops_.compute_unit(run_, unit, thread);
        }
      } while (Clock::now() < end);
    });
    next_ = std::min(next.load(std::memory_order_relaxed), count);
  }

  HostOps& ops_;
  AttentionRun run_;
  bool done_ = true;
  bool merges_ = false;  // all tasks of the plan have run; its split tiles are being merged
  int64_t next_ = 0;     // unit
};

std::unique_ptr<HostAttention> HostOps::make_sliced_attention() { return std::make_unique<SlicedAttention>(*this); }

void HostOps::reserve_sliced() {
  for (SlicedAttention* sliced : sliced_) sliced->reserve();
}

void HostOps::reserve_run(AttentionRun& run, int64_t vectors) const {
  const int64_t vector_floats = partial_floats(1, limits_.head_dim);
  const int64_t fitting = std::min(vectors, kSplitBytesMax / (vector_floats * kFloatBytes));
  run.partials.resize(fitting * vector_floats);
  run.tasks.reserve(limits_.rows + fitting);
  run.splits.reserve(limits_.rows);
}

void HostOps::begin_attention(AttentionRun& run, const Attention& args) const {
  const KvLayer& kv = args.kv;
  MOED_CHECK(kv.num_kv_heads > 0 && args.num_heads % kv.num_kv_heads == 0 && args.num_heads <= limits_.num_heads)
      << args.num_heads << " heads over " << kv.num_kv_heads << ", reserved for " << limits_.num_heads;
  MOED_CHECK(kv.head_dim % 2 == 0 && kv.head_dim <= limits_.head_dim)
      << "head_dim " << kv.head_dim << ", reserved for " << limits_.head_dim;
  MOED_CHECK(kv.block_tokens % 16 == 0 && kChunkPositions % kv.block_tokens == 0) << "blocks of " << kv.block_tokens;
  int64_t rows = 0;
  for (const AttentionSpan& span : args.spans) rows += span.num_rows;
  MOED_CHECK(rows <= limits_.rows) << rows << " rows of attention, reserved for " << limits_.rows;
  run.args = args;
  run.next_span = 0;
  run.next_row = 0;
}

// Tiles that alone would keep a thread busy while others have nothing left are split.
void HostOps::attention(const Attention& args, Stream&) {
  AttentionRun& run = attention_run_;
  begin_attention(run, args);
  const int32_t rows_a_tile = rows_of_tile(args);
  int64_t total = 0;
  for (const AttentionSpan& span : args.spans) {
    for (int32_t row = 0; row < span.num_rows; row += rows_a_tile) {
      const int32_t count = std::min(rows_a_tile, span.num_rows - row);
      total += int64_t{count} * chunks_of(seen_by(span, row + count - 1));
    }
  }
  const int64_t share = total * args.kv.num_kv_heads / (int64_t{4} * pool_.num_threads());
  plan_attention(run, false,
                 [&](int32_t num_rows, int32_t num_chunks) { return int64_t{num_rows} * num_chunks > share; });
  pool_.run(run.num_computed(), [&](int64_t unit, int thread) { compute_unit(run, unit, thread); });
  pool_.run(run.num_merged(), [&](int64_t unit, int) { merge_unit(run, unit); });
}

bool HostOps::plan_attention(AttentionRun& run, bool full_stops,
                             FunctionRef<bool(int32_t num_rows, int32_t num_chunks)> splits) const {
  const Attention& args = run.args;
  const int32_t rows_a_tile = rows_of_tile(args);
  run.tasks.clear();
  run.splits.clear();
  run.partials_used = 0;
  for (; run.next_span < args.spans.size(); ++run.next_span, run.next_row = 0) {
    const AttentionSpan& span = args.spans[run.next_span];
    for (; run.next_row < span.num_rows; run.next_row += rows_a_tile) {
      AttentionTask task;
      task.span = static_cast<int32_t>(run.next_span);
      task.row = run.next_row;
      task.num_rows = std::min(rows_a_tile, span.num_rows - run.next_row);
      task.chunk_end = chunks_of(seen_by(span, run.next_row + task.num_rows - 1));
      const int64_t floats = partial_floats(task.num_rows * args.num_heads, args.kv.head_dim) * task.chunk_end;
      const bool split = task.chunk_end > 1 && splits(task.num_rows, task.chunk_end);
      const bool fits = run.partials_used + floats <= static_cast<int64_t>(run.partials.size()) &&
                        run.tasks.size() + task.chunk_end <= run.tasks.capacity();
      if (split && !fits && full_stops && !run.tasks.empty()) return true;
      plan_tile(run, task, split && fits);
    }
  }
  return !run.tasks.empty();
}

void HostOps::plan_tile(AttentionRun& run, AttentionTask task, bool split) const {
  if (!split) {
    run.tasks.push_back(task);
    return;
  }
  const int32_t num_chunks = task.chunk_end;
  run.splits.push_back({static_cast<int32_t>(run.tasks.size()), num_chunks});
  for (int32_t chunk = 0; chunk < num_chunks; ++chunk) {
    task.chunk_begin = chunk;
    task.chunk_end = chunk + 1;
    task.split_offset = run.partials_used;
    run.tasks.push_back(task);
    run.partials_used += partial_floats(task.num_rows * run.args.num_heads, run.args.kv.head_dim);
  }
}

void HostOps::compute_unit(AttentionRun& run, int64_t unit, int thread) {
  const int32_t heads = run.args.kv.num_kv_heads;
  const AttentionTask& task = run.tasks[unit / heads];
  const auto head = static_cast<int32_t>(unit % heads);
  if (task.split_offset < 0) {
    run_whole_tile(run.args, task, head, thread);
  } else {
    const AttentionPartial out = split_at(run.args, run.partials.data() + task.split_offset, task.num_rows, head);
    compute_chunk(run.args, task, {head, task.chunk_begin, out}, thread);
  }
}

void HostOps::run_whole_tile(const Attention& args, const AttentionTask& task, int32_t head, int thread) {
  const AttentionSpan& span = args.spans[task.span];
  const int32_t group = group_of(args);
  const int32_t vectors = task.num_rows * group;
  float* base = scratch_[thread].partials.data();
  const AttentionPartial done = partial_at(base, vectors);
  const AttentionPartial next = partial_at(base + partial_floats(vectors, args.kv.head_dim), vectors);
  compute_chunk(args, task, {head, 0, done}, thread);
  for (int32_t chunk = 1; chunk < task.chunk_end; ++chunk) {
    compute_chunk(args, task, {head, chunk, next}, thread);
    const int32_t skipped = rows_before(span, task.row, chunk) * group;
    kernels_.attention_merge(skip(done, skipped, args.kv.head_dim), skip(next, skipped, args.kv.head_dim),
                             vectors - skipped, args.kv.head_dim);
  }
  write_attention(args, task, head, done);
}

void HostOps::merge_unit(AttentionRun& run, int64_t unit) {
  const Attention& args = run.args;
  const SplitTile& tile = run.splits[unit / args.kv.num_kv_heads];
  const auto head = static_cast<int32_t>(unit % args.kv.num_kv_heads);
  const AttentionTask* tasks = run.tasks.data() + tile.first_task;
  const AttentionSpan& span = args.spans[tasks->span];
  const int32_t group = group_of(args);
  const auto partial = [&](int32_t chunk) {
    return split_at(args, run.partials.data() + tasks[chunk].split_offset, tasks->num_rows, head);
  };
  for (int32_t chunk = 1; chunk < tile.num_chunks; ++chunk) {
    const int32_t skipped = rows_before(span, tasks->row, chunk) * group;
    kernels_.attention_merge(skip(partial(0), skipped, args.kv.head_dim),
                             skip(partial(chunk), skipped, args.kv.head_dim), tasks->num_rows * group - skipped,
                             args.kv.head_dim);
  }
  write_attention(args, *tasks, head, partial(0));
}

void HostOps::compute_chunk(const Attention& args, const AttentionTask& task, const ChunkOut& where, int thread) {
  const AttentionSpan& span = args.spans[task.span];
  const KvLayer& kv = args.kv;
  Scratch& scratch = scratch_[thread];
  const int32_t group = group_of(args);
  const int32_t begin = where.chunk * kChunkPositions;
  const int32_t skipped = rows_before(span, task.row, where.chunk);
  int32_t vectors = 0;
  for (int32_t row = task.row + skipped; row < task.row + task.num_rows; ++row) {
    const Bf16* q = args.q.row(span.row_begin + row) + int64_t{where.head} * group * kv.head_dim;
    for (int32_t i = 0; i < group; ++i, ++vectors) {
      scratch.q_rows[vectors] = q + i * kv.head_dim;
      scratch.visible[vectors] = std::min(kChunkPositions, seen_by(span, row) - begin);
    }
  }
  AttentionChunk chunk;
  chunk.q = scratch.q_rows.data();
  chunk.visible = scratch.visible.data();
  chunk.vectors = vectors;
  chunk.visible_max = scratch.visible[vectors - 1];
  const int32_t* blocks = span.blocks + begin / kv.block_tokens;
  for (int32_t i = 0; i * kv.block_tokens < chunk.visible_max; ++i) {
    scratch.k_blocks[i] = kv.k(blocks[i], where.head);
    scratch.v_blocks[i] = kv.v(blocks[i], where.head);
  }
  chunk.k = scratch.k_blocks.data();
  chunk.v = scratch.v_blocks.data();
  chunk.block_tokens = kv.block_tokens;
  chunk.head_dim = kv.head_dim;
  chunk.scale = args.scale;
  chunk.transposed_k = scratch.transposed_k.data();
  chunk.scores = scratch.scores.data();
  chunk.out = skip(where.out, skipped * group, kv.head_dim);
  kernels_.attention_chunk(chunk);
}

void HostOps::write_attention(const Attention& args, const AttentionTask& task, int32_t head,
                              const AttentionPartial& done) {
  const int32_t group = group_of(args);
  const int32_t dim = args.kv.head_dim;
  for (int32_t row = 0; row < task.num_rows; ++row) {
    Bf16* out = args.out.row(args.spans[task.span].row_begin + task.row + row) + int64_t{head} * group * dim;
    for (int32_t i = 0; i < group; ++i) {
      const int32_t vector = row * group + i;
      kernels_.divide_to_bf16(done.sums + int64_t{vector} * dim, done.total[vector], dim, out + i * dim);
    }
  }
}

}  // namespace moed
