#include "cuda_port.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/workspace.cuh"

namespace moed::cuda {
namespace {

constexpr int kRouteThreads = 128;
constexpr int kRouteWarps = kRouteThreads / kWarpSize;

struct RouteArgs {
  const float* logits;         // [rows, num_experts]
  const float* shared_logits;  // [rows] or null
  int32_t rows;
  int32_t num_experts;
  Route::Score score;
  int32_t top_k;
  bool renormalize;
  float scaling;
  int32_t num_groups;
  int32_t groups_kept;
  const float* correction_bias;
  bool shared;
  Matrix<int32_t> experts;
  Matrix<float> weights;
};

// Below every score and every rank.
__device__ inline float nothing() { return -INFINITY; }

__device__ inline float sigmoid(float x) { return 1.0F / (1.0F + expf(-x)); }

__device__ inline float warp_max(float x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kWarp, x, distance));
  }
  return x;
}

// By one warp: index of the largest, the lower among equals; the same in each lane.
__device__ inline int32_t best_of(const float* x, int32_t n) {
  float best = nothing();
  int32_t at = n;
  for (int32_t i = lane_of_thread(); i < n; i += kWarpSize) {
    if (x[i] > best || at == n) {
      best = x[i];
      at = i;
    }
  }
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kWarp, best, distance);
    const int32_t other_at = __shfl_xor_sync(kWarp, at, distance);
    if (other_at < n && (at == n || other > best || (other == best && other_at < at))) {
      best = other;
      at = other_at;
    }
  }
  return at;
}

// By one warp: logits to scores.
__device__ inline void score_row(const RouteArgs& args, const float* logits, float* scores) {
  const int lane = lane_of_thread();
  if (args.score == Route::Score::kSigmoid) {
    for (int32_t i = lane; i < args.num_experts; i += kWarpSize) scores[i] = sigmoid(logits[i]);
    return;
  }
  float peak = nothing();
  for (int32_t i = lane; i < args.num_experts; i += kWarpSize) peak = fmaxf(peak, logits[i]);
  peak = warp_max(peak);
  float total = 0.0F;
  for (int32_t i = lane; i < args.num_experts; i += kWarpSize) {
    scores[i] = expf(logits[i] - peak);
    total += scores[i];
  }
  total = warp_sum(total);
  for (int32_t i = lane; i < args.num_experts; i += kWarpSize) scores[i] /= total;
}

// By one warp: rules out all groups but the best. A group is worth the sum of its two best when scores are corrected by
// a bias (DeepSeek-V3), else its best (DeepSeek-V2).
__device__ inline void keep_best_groups(const RouteArgs& args, float* ranks, float* worth) {
  const int lane = lane_of_thread();
  const int32_t size = args.num_experts / args.num_groups;
  const bool two = args.correction_bias != nullptr && size > 1;
  for (int32_t group = lane; group < args.num_groups; group += kWarpSize) {
    float first = nothing();
    float second = nothing();
    for (int32_t i = 0; i < size; ++i) {
      const float rank = ranks[group * size + i];
      second = fmaxf(second, fminf(first, rank));
      first = fmaxf(first, rank);
    }
    worth[group] = two ? first + second : first;
  }
  for (int32_t kept = 0; kept < args.groups_kept; ++kept) {
    const int32_t best = best_of(worth, args.num_groups);
    // The lane that will look there again is the one that forgets it.
    if (lane == best % kWarpSize) worth[best] = nothing();
  }
  __syncwarp();  // all lanes read all groups
  for (int32_t i = lane; i < args.num_experts; i += kWarpSize) {
    if (worth[i / size] != nothing()) ranks[i] = nothing();
  }
}

// A warp a row.
__global__ void __launch_bounds__(kRouteThreads) choose_experts(RouteArgs args) {
  MOED_DYNAMIC_SHARED(float, shared);
  const int64_t row = int64_t{blockIdx.x} * kRouteWarps + warp_of_thread();
  if (row >= args.rows) return;
  const int lane = lane_of_thread();
  float* scores = shared + warp_of_thread() * (2 * args.num_experts + args.num_groups);
  float* ranks = scores + args.num_experts;
  score_row(args, args.logits + row * args.num_experts, scores);
  for (int32_t i = lane; i < args.num_experts; i += kWarpSize) {
    ranks[i] = scores[i] + (args.correction_bias == nullptr ? 0.0F : args.correction_bias[i]);
  }
  __syncwarp();  // scores and ranks are read by all lanes from here on
  if (args.groups_kept < args.num_groups) keep_best_groups(args, ranks, ranks + args.num_experts);

  int32_t* experts = args.experts.data + row * args.experts.stride;
  float* weights = args.weights.data + row * args.weights.stride;
  float total = 0.0F;
  for (int32_t choice = 0; choice < args.top_k; ++choice) {
    const int32_t best = best_of(ranks, args.num_experts);
    total += scores[best];
    if (lane == 0) {
      experts[choice] = best;
      weights[choice] = scores[best];
    }
    if (lane == best % kWarpSize) ranks[best] = nothing();
  }
  if (lane != 0) return;
  // 1e-20 as in DeepSeek-V3: sigmoids of very negative logits may all be 0.
  const float divisor = args.renormalize ? total + 1e-20F : 1.0F;
  for (int32_t choice = 0; choice < args.top_k; ++choice) weights[choice] = weights[choice] / divisor * args.scaling;
  if (args.shared) weights[args.top_k] = args.shared_logits == nullptr ? 1.0F : sigmoid(args.shared_logits[row]);
}

int64_t logits_bytes(int64_t rows, int64_t num_experts) {
  return align_up(rows * num_experts * int64_t{sizeof(float)});
}

}  // namespace

int64_t route_workspace_bytes(const OpLimits& limits) {
  return logits_bytes(limits.rows, limits.num_experts) + logits_bytes(limits.rows, 1);
}

void route(const Route& args, const Launch& launch) {
  const int32_t rows = args.x.rows;
  const int64_t shared_at = logits_bytes(rows, args.gate.out);
  check_workspace("route", shared_at + logits_bytes(rows, 1), launch);
  auto* logits = reinterpret_cast<float*>(launch.workspace);
  auto* shared_logits = reinterpret_cast<float*>(launch.workspace + shared_at);
  linear_dots(args.x, args.gate, false, {logits, rows, args.gate.out}, launch);
  const bool gated = args.shared && args.shared_gate.weight != nullptr;
  if (gated) linear_dots(args.x, args.shared_gate, false, {shared_logits, rows, 1}, launch);
  RouteArgs route_args;
  route_args.logits = logits;
  route_args.shared_logits = gated ? shared_logits : nullptr;
  route_args.rows = rows;
  route_args.num_experts = args.gate.out;
  route_args.score = args.score;
  route_args.top_k = args.top_k;
  route_args.renormalize = args.renormalize;
  route_args.scaling = args.scaling;
  route_args.num_groups = args.num_groups;
  route_args.groups_kept = args.groups_kept;
  route_args.correction_bias = args.correction_bias;
  route_args.shared = args.shared;
  route_args.experts = args.experts;
  route_args.weights = args.weights;
  const int64_t shared_bytes =
      kRouteWarps * (2 * args.gate.out + args.num_groups) * static_cast<int64_t>(sizeof(float));
  run_kernel(choose_experts, dim3{static_cast<unsigned>(divide_up(rows, kRouteWarps))}, dim3{kRouteThreads},
             shared_bytes, launch.stream, route_args);
}

void load_route_kernels() { load_kernel(choose_experts); }

}  // namespace moed::cuda
