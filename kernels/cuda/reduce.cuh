#pragma once

#include "cuda_port.cuh"

namespace moed::cuda {

constexpr int kWarpSize = 32;

__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarpSize; }

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sum over the lanes, the same bits in each.
template <class T>
__device__ inline T warp_sum(T x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kWarp, x, distance);
  return x;
}

// Sum over a block of kThreads, the same bits in each. `partials`: [kThreads / 32] of shared memory, free again after
// the next barrier.
template <int kThreads>
__device__ inline float block_sum(float x, float* partials) {
  x = warp_sum(x);
  if (lane_of_thread() == 0) partials[warp_of_thread()] = x;
  __syncthreads();
  float total = 0.0F;
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) total += partials[warp];
  return total;
}

// Sum over the lanes up to and with one's own.
template <class T>
__device__ inline T warp_inclusive_sum(T x) {
  for (unsigned distance = 1; distance < kWarpSize; distance *= 2) {
    const T below = __shfl_up_sync(kWarp, x, distance);
    if (lane_of_thread() >= static_cast<int>(distance)) x += below;
  }
  return x;
}

}  // namespace moed::cuda
