#include <algorithm>

#include "base/check.h"
#include "kernels/host/host_ops.h"

namespace moed {
namespace {

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

}  // namespace

void HostOps::attention(const Attention& args, Stream&) {
  const KvLayer& kv = args.kv;
  MOED_CHECK(kv.num_kv_heads > 0 && args.num_heads % kv.num_kv_heads == 0 && args.num_heads <= limits_.num_heads)
      << args.num_heads << " heads over " << kv.num_kv_heads << ", reserved for " << limits_.num_heads;
  MOED_CHECK(kv.head_dim % 2 == 0 && kv.head_dim <= limits_.head_dim)
      << "head_dim " << kv.head_dim << ", reserved for " << limits_.head_dim;
  MOED_CHECK(kv.block_tokens % 16 == 0 && kChunkPositions % kv.block_tokens == 0) << "blocks of " << kv.block_tokens;
  const int32_t heads = kv.num_kv_heads;
  plan_attention(args);
  pool_.run(static_cast<int64_t>(attention_tasks_.size()) * heads, [&](int64_t index, int thread) {
    const AttentionTask& task = attention_tasks_[index / heads];
    const auto head = static_cast<int32_t>(index % heads);
    if (task.split_offset < 0) {
      run_whole_tile(args, task, head, thread);
    } else {
      const int32_t vectors = task.num_rows * group_of(args);
      const AttentionPartial out = partial_at(split_at(args, task, head), vectors);
      compute_chunk(args, task, {head, task.chunk_begin, out}, thread);
    }
  });
  pool_.run(static_cast<int64_t>(split_tiles_.size()) * heads, [&](int64_t index, int) {
    merge_split_tile(args, split_tiles_[index / heads], static_cast<int32_t>(index % heads));
  });
}

// Tiles of a span's rows; those that alone would keep a thread busy while others have nothing left are split by chunks.
void HostOps::plan_attention(const Attention& args) {
  const int32_t rows_a_tile = std::max(1, kTileVectors / group_of(args));
  attention_tasks_.clear();
  split_tiles_.clear();
  int64_t total = 0;
  int64_t rows = 0;
  for (const AttentionSpan& span : args.spans) {
    rows += span.num_rows;
    for (int32_t row = 0; row < span.num_rows; row += rows_a_tile) {
      const int32_t count = std::min(rows_a_tile, span.num_rows - row);
      total += int64_t{count} * chunks_of(seen_by(span, row + count - 1));
    }
  }
  MOED_CHECK(rows <= limits_.rows) << rows << " rows of attention, reserved for " << limits_.rows;
  const int64_t share = total * args.kv.num_kv_heads / (int64_t{4} * pool_.num_threads());
  int64_t offset = 0;
  for (size_t span_index = 0; span_index < args.spans.size(); ++span_index) {
    const AttentionSpan& span = args.spans[span_index];
    for (int32_t row = 0; row < span.num_rows; row += rows_a_tile) {
      AttentionTask task;
      task.span = static_cast<int32_t>(span_index);
      task.row = row;
      task.num_rows = std::min(rows_a_tile, span.num_rows - row);
      task.chunk_end = chunks_of(seen_by(span, row + task.num_rows - 1));
      const int64_t floats = partial_floats(task.num_rows * args.num_heads, args.kv.head_dim);
      const bool fits = offset + floats * task.chunk_end <= static_cast<int64_t>(split_partials_.size());
      if (task.chunk_end == 1 || !fits || int64_t{task.num_rows} * task.chunk_end <= share) {
        attention_tasks_.push_back(task);
        continue;
      }
      split_tiles_.push_back({static_cast<int32_t>(attention_tasks_.size()), task.chunk_end});
      for (int32_t chunk = 0; chunk < split_tiles_.back().num_chunks; ++chunk, offset += floats) {
        task.chunk_begin = chunk;
        task.chunk_end = chunk + 1;
        task.split_offset = offset;
        attention_tasks_.push_back(task);
      }
    }
  }
}

float* HostOps::split_at(const Attention& args, const AttentionTask& task, int32_t head) {
  return split_partials_.data() + task.split_offset +
         head * partial_floats(task.num_rows * group_of(args), args.kv.head_dim);
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

void HostOps::merge_split_tile(const Attention& args, const SplitTile& tile, int32_t head) {
  const AttentionTask* tasks = attention_tasks_.data() + tile.first_task;
  const AttentionSpan& span = args.spans[tasks->span];
  const int32_t group = group_of(args);
  const int32_t vectors = tasks->num_rows * group;
  const AttentionPartial done = partial_at(split_at(args, tasks[0], head), vectors);
  for (int32_t chunk = 1; chunk < tile.num_chunks; ++chunk) {
    const AttentionPartial next = partial_at(split_at(args, tasks[chunk], head), vectors);
    const int32_t skipped = rows_before(span, tasks->row, chunk) * group;
    kernels_.attention_merge(skip(done, skipped, args.kv.head_dim), skip(next, skipped, args.kv.head_dim),
                             vectors - skipped, args.kv.head_dim);
  }
  write_attention(args, *tasks, head, done);
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
