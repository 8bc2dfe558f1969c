#include "kernels/cuda/attention.cuh"

#include <algorithm>

#include "base/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/workspace.cuh"

namespace moed::cuda {
namespace {

// Spans of few vectors (decode) run a warp a block, their chunks apart where the workspace has room for the partials;
// others (prefill) in tiles of four warps that go through all chunks.
constexpr int kLongWarps = 4;
constexpr int kLongVectors = kLongWarps * kWarpVectors;
constexpr int kHeadDimMax = 256;
constexpr int kPlanThreads = 256;
constexpr int kPlanWarps = kPlanThreads / kWarpSize;
constexpr int kMergeWarps = 4;
constexpr int64_t kPartialBytesMax = int64_t{64} << 20;
constexpr int64_t kSplitTasksMax = int64_t{1} << 16;

// Where the chunks of a short span went.
struct Merge {
  int32_t first_task;
  int32_t num_chunks;
};

// In the workspace. A partial of a task and a KV head: for each of `partial_vectors` vectors peak, total and sums.
struct Plan {
  AttentionTask* short_tasks;
  Merge* merges;
  AttentionTask* long_tasks;
  float* partials;
  int32_t partial_vectors;
  bool split;
};

struct SpanShape {
  int32_t vectors;
  int32_t chunks;
  bool is_short;
};
__host__ __device__ inline SpanShape shape_of(const AttentionSpan& span, int32_t group) {
  const int32_t vectors = span.num_rows * group;
  return {vectors, static_cast<int32_t>(divide_up(span.num_cached + span.num_rows, kChunkPositions)),
          vectors <= kWarpVectors};
}

// Sum over the threads before this one; `total` over all. partials: [kPlanWarps], free again after the next barrier, so
// that two calls in turn with partials of their own need no other.
__device__ inline int sum_before(int x, int* partials, int& total) {
  const int up_to_mine = warp_inclusive_sum(x);
  if (lane_of_thread() == kWarpSize - 1) partials[warp_of_thread()] = up_to_mine;
  __syncthreads();
  int before = up_to_mine - x;
  total = 0;
  for (int warp = 0; warp < kPlanWarps; ++warp) {
    if (warp < warp_of_thread()) before += partials[warp];
    total += partials[warp];
  }
  return before;
}

// One block: the spans, which the host wrote, are read once and not by every block of the work.
__global__ void __launch_bounds__(kPlanThreads)
    plan_tasks(const AttentionSpan* spans, int32_t num_spans, int32_t group, Plan plan) {
  MOED_SHARED(int, short_sums, kPlanWarps);
  MOED_SHARED(int, merge_sums, kPlanWarps);
  MOED_SHARED(int, long_sums, kPlanWarps);
  int short_done = 0;
  int merges_done = 0;
  int long_done = 0;
  for (int32_t base = 0; base < num_spans; base += kPlanThreads) {
    const int32_t index = base + static_cast<int32_t>(threadIdx.x);
    const AttentionSpan span = index < num_spans ? spans[index] : AttentionSpan{};
    const SpanShape shape = shape_of(span, group);
    const bool there = shape.vectors > 0;
    const int num_short = there && shape.is_short ? (plan.split ? shape.chunks : 1) : 0;
    const int num_long = there && !shape.is_short ? static_cast<int>(divide_up(shape.vectors, kLongVectors)) : 0;
    int total = 0;
    const int short_at = short_done + sum_before(num_short, short_sums, total);
    short_done += total;
    const int merge_at = merges_done + sum_before(num_short > 0 ? 1 : 0, merge_sums, total);
    merges_done += total;
    const int long_at = long_done + sum_before(num_long, long_sums, total);
    long_done += total;
    AttentionTask task{span.blocks, span.row_begin, span.num_cached, 0, shape.vectors, 0, shape.chunks};
    for (int i = 0; i < num_short; ++i) {
      if (plan.split) task.chunk_begin = i;
      if (plan.split) task.chunk_end = i + 1;
      plan.short_tasks[short_at + i] = task;
    }
    if (num_short > 0) plan.merges[merge_at] = {short_at, shape.chunks};
    for (int i = 0; i < num_long; ++i) {
      task.first_vector = i * kLongVectors;
      task.num_vectors = min(shape.vectors - task.first_vector, kLongVectors);
      plan.long_tasks[long_at + i] = task;
    }
  }
}

__device__ inline float* partial_at(const Plan& plan, const AttentionArgs& args, int64_t task, int32_t head,
                                    int32_t vector) {
  const int64_t index = (task * args.kv.num_kv_heads + head) * plan.partial_vectors + vector;
  return plan.partials + index * (args.kv.head_dim + 2);
}

__device__ inline Bf16* out_of(const AttentionArgs& args, const AttentionTask& task, int32_t head, int32_t vector) {
  const int32_t number = task.first_vector + vector;
  return args.out.data + (task.row_begin + number / args.group) * args.out.stride +
         (int64_t{head} * args.group + number % args.group) * args.kv.head_dim;
}

// write(vector of the tile, column, sum, which of the lane's vectors) for what this lane holds.
template <int kValues, class Write>
__device__ inline void for_results(const SoftmaxState<kValues>& state, const Write& write) {
  const int lane = lane_of_thread();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int vector = warp_of_thread() * kWarpVectors + lane / 4 + i * 8;
#pragma unroll
    for (int j = 0; j < kValues / 8; ++j) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        write(vector, j * 8 + lane % 4 * 2 + part, state.sums[j][2 * i + part], i);
      }
    }
  }
}

// All chunks of the task. The K of a step comes while the weights of the one before are worked out, its V while its K
// is scored.
template <int kDim, int kValues, int kWarps>
__device__ inline SoftmaxState<kValues> attend_chunks(const AttentionArgs& args, const AttentionTask& task,
                                                      int32_t head, int first_value,
                                                      const AttentionTile<kDim, kValues, kWarps>& tile) {
  const int32_t last_row = (task.first_vector + task.num_vectors - 1) / args.group;
  const int32_t begin = task.chunk_begin * kChunkPositions;
  const int32_t end = min(task.chunk_end * kChunkPositions, task.num_cached + last_row + 1);
  const auto bring_ids = [&](int32_t position) {
    tile.bring_ids(task.blocks, position, end, args.kv.block_tokens);
    __syncthreads();  // the chunk's ids are there
  };
  const auto bring_k = [&](int32_t position) {
    tile.template bring_window<kDim>(tile.k, args, {position, end, 0},
                                     [&](int32_t block) { return k_of(args.kv, block, head); });
  };
  const auto bring_v = [&](int32_t position) {
    tile.template bring_window<kValues>(tile.v, args, {position, end, first_value},
                                        [&](int32_t block) { return v_of(args.kv, block, head); });
  };
  int32_t seen[2];
  for (int i = 0; i < 2; ++i) {
    const int vector = warp_of_thread() * kWarpVectors + lane_of_thread() / 4 + i * 8;
    seen[i] = vector < task.num_vectors ? task.num_cached + (task.first_vector + vector) / args.group + 1 : 0;
  }
  SoftmaxState<kValues> all;
  SoftmaxState<kValues> chunk;
  tile.bring_q(args, task, head);
  bring_ids(begin);
  bring_k(begin);
  copy_async_commit();
  for (int32_t position = begin; position < end; position += kStepPositions) {
    bring_v(position);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();  // q and this step's K are there
    float scores[kStepPositions / 8][4] = {};
    tile.score(scores);
    __syncthreads();  // all have done with K
    const int32_t next = position + kStepPositions;
    const bool chunk_ends = next % kChunkPositions == 0;
    if (chunk_ends && next < end) bring_ids(next);
    if (next < end) bring_k(next);
    copy_async_commit();
    const int32_t visible[2] = {seen[0] - position, seen[1] - position};
    soften<kValues>(visible, args.scale, scores, chunk);
    copy_async_wait<1>();
    __syncthreads();  // this step's V is there
    tile.add_values(scores, chunk);
    __syncthreads();  // all have done with V
    if (!chunk_ends && next < end) continue;
    finish_chunk(chunk);
    if (position / kChunkPositions == task.chunk_begin) {
      all = chunk;
    } else {
      merge_states(all, chunk, args.scale);
    }
    chunk = SoftmaxState<kValues>();
  }
  return all;
}

template <int kDim, int kValues, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    attend(AttentionArgs args, const AttentionTask* tasks, Plan plan, bool to_partials) {
  MOED_DYNAMIC_SHARED(uint16_t, shared);
  const AttentionTask task = tasks[blockIdx.x];
  const auto head = static_cast<int32_t>(blockIdx.y);
  const int first_value = static_cast<int>(blockIdx.z) * kValues;
  const SoftmaxState<kValues> state =
      attend_chunks(args, task, head, first_value, AttentionTile<kDim, kValues, kWarps>(shared));
  const int32_t dim = args.kv.head_dim;
  if (to_partials) {
    for_results(state, [&](int vector, int column, float sum, int i) {
      const int at = first_value + column;
      if (vector >= task.num_vectors || at >= dim) return;
      float* partial = partial_at(plan, args, blockIdx.x, head, vector);
      if (at == 0) partial[0] = state.peak[i];
      if (at == 0) partial[1] = state.total[i];
      partial[2 + at] = sum;
    });
  } else {
    for_results(state, [&](int vector, int column, float sum, int i) {
      const int at = first_value + column;
      if (vector >= task.num_vectors || at >= dim) return;
      out_of(args, task, head, vector)[at].bits = to_bf16(sum / state.total[i]);
    });
  }
}

// Of the columns of a head those that one lane merges.
constexpr int kColumnsOfLane = kHeadDimMax / kWarpSize;
// Chunks whose partials are loaded together: one by one each would wait for the memory anew.
constexpr int kMergedAtOnce = 4;

__device__ inline void load_columns(const float* from, int32_t head_dim, float (&to)[kColumnsOfLane]) {
#pragma unroll
  for (int i = 0; i < kColumnsOfLane; ++i) {
    const int column = i * kWarpSize + lane_of_thread();
    to[i] = column < head_dim ? from[column] : 0.0F;
  }
}

// A warp a vector of a short span.
__global__ void __launch_bounds__(kMergeWarps* kWarpSize) merge_partials(AttentionArgs args, Plan plan) {
  const Merge merge_of = plan.merges[blockIdx.x];
  const AttentionTask task = plan.short_tasks[merge_of.first_task];
  const auto head = static_cast<int32_t>(blockIdx.y);
  const int lane = lane_of_thread();
  for (int32_t vector = warp_of_thread(); vector < task.num_vectors; vector += kMergeWarps) {
    const float* first = partial_at(plan, args, merge_of.first_task, head, vector);
    float peak = first[0];
    float total = first[1];
    float sums[kColumnsOfLane];
    load_columns(first + 2, args.kv.head_dim, sums);
    for (int32_t begin = 1; begin < merge_of.num_chunks; begin += kMergedAtOnce) {
      float peaks[kMergedAtOnce];
      float totals[kMergedAtOnce];
      float columns[kMergedAtOnce][kColumnsOfLane];
#pragma unroll
      for (int i = 0; i < kMergedAtOnce; ++i) {
        const float* next =
            partial_at(plan, args, merge_of.first_task + min(begin + i, merge_of.num_chunks - 1), head, vector);
        peaks[i] = next[0];
        totals[i] = next[1];
        load_columns(next + 2, args.kv.head_dim, columns[i]);
      }
#pragma unroll
      for (int i = 0; i < kMergedAtOnce; ++i) {
        if (begin + i >= merge_of.num_chunks) break;
        const MergeWeights weights = merge_weights(peak, peaks[i], args.scale);
        peak = weights.peak;
        total = merge(total, totals[i], weights);
#pragma unroll
        for (int c = 0; c < kColumnsOfLane; ++c) sums[c] = merge(sums[c], columns[i][c], weights);
      }
    }
    Bf16* out = out_of(args, task, head, vector);
#pragma unroll
    for (int i = 0; i < kColumnsOfLane; ++i) {
      const int column = i * kWarpSize + lane;
      if (column < args.kv.head_dim) out[column].bits = to_bf16(sums[i] / total);
    }
  }
}

// What the spans add up to; the same sums as plan_tasks() makes.
struct Counts {
  int64_t short_spans = 0;
  int64_t short_chunks = 0;
  int64_t long_tasks = 0;
  int32_t short_vectors_max = 0;
};

Counts count(const Attention& args, int32_t group) {
  Counts counts;
  for (const AttentionSpan& span : args.spans) {
    const SpanShape shape = shape_of(span, group);
    if (shape.vectors == 0) continue;
    if (shape.is_short) {
      ++counts.short_spans;
      counts.short_chunks += shape.chunks;
      counts.short_vectors_max = std::max(counts.short_vectors_max, shape.vectors);
    } else {
      counts.long_tasks += divide_up(shape.vectors, kLongVectors);
    }
  }
  return counts;
}

int64_t task_bytes(int64_t tasks) { return align_up(tasks * int64_t{sizeof(AttentionTask)}); }
int64_t merge_bytes(int64_t merges) { return align_up(merges * int64_t{sizeof(Merge)}); }
int64_t partial_bytes(int64_t vectors, int64_t head_dim) {
  return align_up(vectors * (head_dim + 2) * int64_t{sizeof(float)});
}

// Takes parts of a piece of memory, one behind the other.
class Carver {
 public:
  explicit Carver(std::byte* next) : next_(next) {}
  template <class T>
  T* take(int64_t bytes) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += bytes;
    return taken;
  }

 private:
  std::byte* next_;
};

template <int kDim, int kValues>
void launch_tiles(const AttentionArgs& args, const Counts& counts, const Plan& plan, const Launch& launch) {
  using ShortTile = AttentionTile<kDim, kValues, 1>;
  using LongTile = AttentionTile<kDim, kValues, kLongWarps>;
  const auto heads = static_cast<unsigned>(args.kv.num_kv_heads);
  const auto values = static_cast<unsigned>(divide_up(args.kv.head_dim, kValues));
  const auto short_tasks = static_cast<unsigned>(plan.split ? counts.short_chunks : counts.short_spans);
  run_kernel(attend<kDim, kValues, 1>, dim3{short_tasks, heads, values}, dim3{ShortTile::kThreads},
             ShortTile::kSharedBytes, launch.stream, args, plan.short_tasks, plan, plan.split);
  run_kernel(attend<kDim, kValues, kLongWarps>, dim3{static_cast<unsigned>(counts.long_tasks), heads, values},
             dim3{LongTile::kThreads}, LongTile::kSharedBytes, launch.stream, args, plan.long_tasks, plan, false);
  if (!plan.split) return;
  run_kernel(merge_partials, dim3{static_cast<unsigned>(counts.short_spans), heads}, dim3{kMergeWarps * kWarpSize}, 0,
             launch.stream, args, plan);
}

template <int kDim, int kValues>
void load_tiles() {
  load_kernel(attend<kDim, kValues, 1>);
  load_kernel(attend<kDim, kValues, kLongWarps>);
}

}  // namespace

int64_t attention_workspace_bytes(const OpLimits& limits) {
  const int64_t chunks = divide_up(limits.context_tokens, kChunkPositions);
  const int64_t short_tasks = limits.rows + std::min(limits.rows * chunks, kSplitTasksMax);
  const int64_t long_tasks = limits.rows * (divide_up(limits.num_heads, kLongVectors) + 1);
  const int64_t vectors = int64_t{limits.rows} * limits.num_heads * chunks;
  return task_bytes(short_tasks) + merge_bytes(limits.rows) + task_bytes(long_tasks) +
         std::min(partial_bytes(vectors, limits.head_dim), kPartialBytesMax);
}

void attention(const Attention& args, const Launch& launch) {
  MOED_CHECK(args.kv.head_dim <= kHeadDimMax)
      << "attention: head_dim " << args.kv.head_dim << ", at most " << kHeadDimMax;
  const int32_t group = args.num_heads / args.kv.num_kv_heads;
  const Counts counts = count(args, group);
  const int64_t partials =
      partial_bytes(counts.short_chunks * args.kv.num_kv_heads * counts.short_vectors_max, args.kv.head_dim);
  const int64_t left = launch.workspace_bytes - task_bytes(counts.short_chunks) - merge_bytes(counts.short_spans) -
                       task_bytes(counts.long_tasks);
  Plan plan;
  plan.split = counts.short_chunks > counts.short_spans && counts.short_chunks <= kSplitTasksMax && partials <= left;
  const int64_t short_bytes = task_bytes(plan.split ? counts.short_chunks : counts.short_spans);
  check_workspace(
      "attention",
      short_bytes + merge_bytes(counts.short_spans) + task_bytes(counts.long_tasks) + (plan.split ? partials : 0),
      launch);
  Carver carver(launch.workspace);
  plan.short_tasks = carver.take<AttentionTask>(short_bytes);
  plan.merges = carver.take<Merge>(merge_bytes(counts.short_spans));
  plan.long_tasks = carver.take<AttentionTask>(task_bytes(counts.long_tasks));
  plan.partials = carver.take<float>(partials);
  plan.partial_vectors = counts.short_vectors_max;
  if (counts.short_spans + counts.long_tasks == 0) return;
  run_kernel(plan_tasks, dim3{1}, dim3{kPlanThreads}, 0, launch.stream, args.spans.data(),
             static_cast<int32_t>(args.spans.size()), group, plan);
  AttentionArgs attention_args;
  attention_args.q = args.q;
  attention_args.kv = args.kv;
  attention_args.group = group;
  attention_args.scale = args.scale;
  attention_args.out = args.out;
  attention_args.wide = args.kv.head_dim % 8 == 0 && rows_are_wide(args.q.data, args.q.stride) &&
                        rows_are_wide(args.kv.base, args.kv.block_stride) &&
                        rows_are_wide(args.kv.staging, args.kv.block_stride);
  if (args.kv.head_dim <= 64) {
    launch_tiles<64, 64>(attention_args, counts, plan, launch);
  } else if (args.kv.head_dim <= 128) {
    launch_tiles<128, 128>(attention_args, counts, plan, launch);
  } else {
    launch_tiles<kHeadDimMax, 128>(attention_args, counts, plan, launch);
  }
}

void load_attention_kernels() {
  load_kernel(plan_tasks);
  load_tiles<64, 64>();
  load_tiles<128, 128>();
  load_tiles<kHeadDimMax, 128>();
  load_kernel(merge_partials);
}

}  // namespace moed::cuda
