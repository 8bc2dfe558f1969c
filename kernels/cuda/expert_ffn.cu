#include <algorithm>

#include "cuda_port.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/tile.cuh"
#include "kernels/cuda/workspace.cuh"

namespace moed::cuda {
namespace {

// As shared memory allows: with few rows what counts is how many loads are under way.
constexpr int kBlocksOfSm = 3;

// Blocks that share the columns of one where few rows are multiplied: a warp alone has too few loads under way.
constexpr unsigned kDotBlocks = 4;

// Some rows of one expert.
struct Task {
  const Bf16* blob;
  int32_t begin;  // of scratch and of pairs
  int32_t rows;   // <= kTileRows
};

// In the workspace, as the host lays it out and plan_tasks() fills it.
struct Tasks {
  int32_t* count;
  Task* tasks;
};

struct FfnArgs {
  Matrix<const Bf16> x;
  int32_t hidden;
  int32_t intermediate;
  const std::byte* const* blobs;
  int32_t num_experts;
  const int32_t* offsets;
  const int32_t* pairs;
  int32_t choices;
  Matrix<Bf16> scratch;
  Matrix<float> y;
  Tasks plan;
  bool wide_x;        // rows of x may be read 16 bytes at a time
  bool wide_scratch;  // and those of scratch
  bool deterministic;
};

// Blobs lie where the host put them: their addresses come from a table that only the device reads.
__device__ inline bool blob_is_wide(const Bf16* blob) { return reinterpret_cast<uintptr_t>(blob) % 16 == 0; }

// Cuts each expert that has a blob and rows into tasks, in the order of experts. One block: the tables that the host
// wrote are read once, by neighbours, and not by every block of the products.
__global__ void __launch_bounds__(kTileThreads) plan_tasks(FfnArgs args) {
  MOED_SHARED(int, tasks_of_warp, kTileWarps);
  const int lane = lane_of_thread();
  const int warp = warp_of_thread();
  int32_t done = 0;
  for (int32_t base = 0; base < args.num_experts; base += kTileThreads) {
    const int32_t expert = base + static_cast<int32_t>(threadIdx.x);
    const bool there = expert < args.num_experts && args.blobs[expert] != nullptr;
    const int32_t begin = there ? args.offsets[expert] : 0;
    const int32_t rows = there ? args.offsets[expert + 1] - begin : 0;
    const auto mine = static_cast<int32_t>(divide_up(rows, kTileRows));
    const int32_t up_to_mine = warp_inclusive_sum(mine);
    if (lane == kWarpSize - 1) tasks_of_warp[warp] = up_to_mine;
    __syncthreads();
    int32_t at = done + up_to_mine - mine;
    for (int i = 0; i < kTileWarps; ++i) {
      if (i < warp) at += tasks_of_warp[i];
      done += tasks_of_warp[i];
    }
    for (int32_t i = 0; i < mine; ++i) {
      args.plan.tasks[at + i] = {reinterpret_cast<const Bf16*>(args.blobs[expert]), begin + i * kTileRows,
                                 min(rows - i * kTileRows, kTileRows)};
    }
    __syncthreads();  // before the next experts' counts
  }
  if (threadIdx.x == 0) *args.plan.count = done;
}

__device__ inline Panel panel_at(const Bf16* matrix, int32_t depth, int32_t column, int32_t columns) {
  return {matrix + int64_t{min(column, columns)} * depth, min(max(columns - column, 0), kPanelColumns)};
}

// scratch = bf16(silu(gate x) * up x)
__global__ void __launch_bounds__(kTileThreads, kBlocksOfSm) gate_up(FfnArgs args) {
  MOED_SHARED(uint16_t, stages, kStages * kStageElements);
  if (static_cast<int32_t>(blockIdx.x) >= *args.plan.count) return;
  const Task task = args.plan.tasks[blockIdx.x];
  const int32_t column = static_cast<int32_t>(blockIdx.y) * kPanelColumns;
  const Bf16* up = task.blob + int64_t{args.hidden} * args.intermediate;
  const TileShape shape{task.rows, args.hidden, args.wide_x && blob_is_wide(task.blob), args.deterministic};
  const auto row_of = [&](int row) {
    return args.x.data + args.pairs[task.begin + row] / args.choices * args.x.stride;
  };
  const auto store = [&](int row, int to, float gate, float value) {
    if (column + to >= args.intermediate) return;
    const float silu = gate / (1.0F + expf(-gate));
    args.scratch.data[(task.begin + row) * args.scratch.stride + column + to].bits = to_bf16(silu * value);
  };
  multiply(stages, shape, panel_at(task.blob, args.hidden, column, args.intermediate),
           panel_at(up, args.hidden, column, args.intermediate), row_of, store);
}

// y = down scratch
__global__ void __launch_bounds__(kTileThreads, kBlocksOfSm) down(FfnArgs args) {
  MOED_SHARED(uint16_t, stages, kStages * kStageElements);
  if (static_cast<int32_t>(blockIdx.x) >= *args.plan.count) return;
  const Task task = args.plan.tasks[blockIdx.x];
  const int32_t column = static_cast<int32_t>(blockIdx.y) * 2 * kPanelColumns;
  const Bf16* weights = task.blob + int64_t{2} * args.hidden * args.intermediate;
  const TileShape shape{task.rows, args.intermediate, args.wide_scratch && blob_is_wide(task.blob), args.deterministic};
  const auto row_of = [&](int row) { return args.scratch.data + (task.begin + row) * args.scratch.stride; };
  const auto store = [&](int row, int to, float first, float second) {
    float* y = args.y.data + args.pairs[task.begin + row] * args.y.stride;
    if (column + to < args.hidden) y[column + to] = first;
    if (column + kPanelColumns + to < args.hidden) y[column + kPanelColumns + to] = second;
  };
  multiply(stages, shape, panel_at(weights, args.intermediate, column, args.hidden),
           panel_at(weights, args.intermediate, column + kPanelColumns, args.hidden), row_of, store);
}

int64_t tasks_max(int64_t pairs_max, int64_t num_experts) {
  return divide_up(pairs_max, kTileRows) + std::min(pairs_max, num_experts);
}

int64_t plan_bytes(int64_t tasks) { return kWorkspaceAlignment + align_up(tasks * int64_t{sizeof(Task)}); }

}  // namespace

int64_t expert_workspace_bytes(const OpLimits& limits) {
  return plan_bytes(tasks_max(int64_t{limits.rows} * (limits.choices + 1), std::max(limits.num_experts, 1)));
}

void expert_ffn(const ExpertFfn& args, const Launch& launch) {
  const auto num_experts = static_cast<int32_t>(args.blobs.size());
  const int64_t tasks = tasks_max(args.pairs_max, num_experts);
  check_workspace("expert_ffn", plan_bytes(tasks), launch);
  FfnArgs ffn;
  ffn.x = args.x;
  ffn.hidden = args.shape.hidden;
  ffn.intermediate = args.shape.intermediate;
  ffn.blobs = args.blobs.data();
  ffn.num_experts = num_experts;
  ffn.offsets = args.offsets;
  ffn.pairs = args.pairs;
  ffn.choices = args.choices;
  ffn.scratch = args.scratch;
  ffn.y = args.y;
  ffn.plan = {reinterpret_cast<int32_t*>(launch.workspace),
              reinterpret_cast<Task*>(launch.workspace + kWorkspaceAlignment)};
  // gate, up and down begin a multiple of hidden * intermediate elements apart.
  const bool wide_blobs = args.shape.hidden % 8 == 0 && args.shape.intermediate % 8 == 0;
  ffn.wide_x = wide_blobs && rows_are_wide(args.x.data, args.x.stride);
  ffn.wide_scratch = wide_blobs && rows_are_wide(args.scratch.data, args.scratch.stride);
  ffn.deterministic = launch.deterministic;
  if (tasks == 0) return;
  const bool few_rows = args.pairs_max <= int64_t{kDotRows} * num_experts && !launch.deterministic;
  const unsigned blocks_z = few_rows ? kDotBlocks : 1;
  const auto grid = [&](int64_t columns, int64_t columns_a_block) {
    return dim3{static_cast<unsigned>(tasks), static_cast<unsigned>(divide_up(columns, columns_a_block)), blocks_z};
  };
  run_kernel(plan_tasks, dim3{1}, dim3{kTileThreads}, 0, launch.stream, ffn);
  run_kernel(gate_up, grid(ffn.intermediate, kPanelColumns), dim3{kTileThreads}, 0, launch.stream, ffn);
  run_kernel(down, grid(ffn.hidden, 2 * kPanelColumns), dim3{kTileThreads}, 0, launch.stream, ffn);
}

void load_expert_ffn_kernels() {
  load_kernel(plan_tasks);
  load_kernel(gate_up);
  load_kernel(down);
}

}  // namespace moed::cuda
