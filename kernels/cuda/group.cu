#include "cuda_port.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/reduce.cuh"

namespace moed::cuda {
namespace {

constexpr int kGroupThreads = 256;
constexpr int kGroupWarps = kGroupThreads / kWarpSize;

// A block finds the pairs of one expert: it counts those of lower experts, which says where its own begin, and its own
// per warp, so that each warp then writes its share in order. No block waits for another, and the order is that of the
// pairs without sorting.
__global__ void __launch_bounds__(kGroupThreads) group_pairs(Group args) {
  MOED_SHARED(int, lower_of_warp, kGroupWarps);
  MOED_SHARED(int, equal_of_warp, kGroupWarps);
  const auto expert = static_cast<int32_t>(blockIdx.x);
  const int32_t top_k = args.experts.cols;
  const int32_t count = args.experts.rows * top_k;
  const int warp = warp_of_thread();
  const int lane = lane_of_thread();
  // A warp's share, in whole warp loads.
  const auto share = static_cast<int32_t>(divide_up(count, kGroupThreads) * kWarpSize);
  const int32_t begin = min(warp * share, count);
  const int32_t end = min(begin + share, count);
  const auto chosen = [&](int32_t i) {
    return i < end ? args.experts.data[i / top_k * args.experts.stride + i % top_k] : args.num_experts;
  };

  int lower = 0;
  int equal = 0;
  for (int32_t base = begin; base < end; base += kWarpSize) {
    const int32_t other = chosen(base + lane);
    lower += __popc(__ballot_sync(kWarp, other < expert));
    equal += __popc(__ballot_sync(kWarp, other == expert));
  }
  if (lane == 0) {
    lower_of_warp[warp] = lower;
    equal_of_warp[warp] = equal;
  }
  __syncthreads();
  int32_t first = 0;
  int32_t total = 0;
  int32_t before = 0;
  for (int i = 0; i < kGroupWarps; ++i) {
    first += lower_of_warp[i];
    before += i < warp ? equal_of_warp[i] : 0;
    total += equal_of_warp[i];
  }

  int32_t next = first + before;
  for (int32_t base = begin; base < end; base += kWarpSize) {
    const int32_t i = base + lane;
    const bool mine = chosen(i) == expert;
    const unsigned votes = __ballot_sync(kWarp, mine);
    if (mine) {
      const int32_t at = next + __popc(votes & ((1U << lane) - 1U));
      const int32_t pair = i / top_k * args.choices + i % top_k;
      args.pairs[at] = pair;
      if (args.host_pairs != nullptr) args.host_pairs[at] = pair;
    }
    next += __popc(votes);
  }
  const auto write = [&](int32_t index, int32_t offset) {
    args.offsets[index] = offset;
    if (args.host_offsets != nullptr) args.host_offsets[index] = offset;
  };
  if (threadIdx.x == 0) write(expert, first);
  if (threadIdx.x == 0 && expert + 1 == args.num_experts) write(args.num_experts, first + total);
}

}  // namespace

void group(const Group& args, const Launch& launch) {
  run_kernel(group_pairs, dim3{static_cast<unsigned>(args.num_experts)}, dim3{kGroupThreads}, 0, launch.stream, args);
}

void load_group_kernels() { load_kernel(group_pairs); }

}  // namespace moed::cuda
