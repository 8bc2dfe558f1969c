#include "cuda_port.cuh"
#include "kernels/cuda/kv.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/reduce.cuh"

namespace moed::cuda {
namespace {

constexpr int kRopeThreads = 256;
constexpr int kRopeWarps = kRopeThreads / kWarpSize;

// RopeAppend with pointers instead of spans.
struct RopeArgs {
  Matrix<const float> qkv;
  int32_t num_heads;
  RopeAppend::Norm norm;
  const float* q_norm;
  const float* k_norm;
  float eps;
  float clip;
  const float* cos_sin;
  int32_t rotary_dim;
  const int32_t* positions;
  const int64_t* slots;
  KvLayer kv;
  Matrix<Bf16> q;
};

// One head of one row on its way from projection to cache.
struct Head {
  const float* x;
  const float* norm;  // null: none
  float factor;       // 1 / rms, with norm
  const float* cos_sin;
  int32_t rotary_dim;
  Bf16* out;
};

__device__ inline float inverse_rms(float squares, int32_t n, float eps) {
  return 1.0F / sqrtf(squares / static_cast<float>(n) + eps);
}

__device__ inline float sum_squares_in_warp(const float* x, int32_t n) {
  float squares = 0.0F;
  for (int i = lane_of_thread(); i < n; i += kWarpSize) squares += x[i] * x[i];
  return warp_sum(squares);
}

__device__ inline float sum_squares_in_block(const float* x, int32_t n, float* partials) {
  float squares = 0.0F;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kRopeThreads) squares += x[i] * x[i];
  return block_sum<kRopeThreads>(squares, partials);
}

// By one warp: norm, clip, rope, bf16.
__device__ inline void turn_head(const Head& head, int32_t head_dim, float clip) {
  const auto value = [&](int i) {
    const float x = head.norm == nullptr ? head.x[i] : head.x[i] * head.factor * head.norm[i];
    return fminf(fmaxf(x, -clip), clip);
  };
  const int half = head.rotary_dim / 2;
  for (int i = lane_of_thread(); i < half; i += kWarpSize) {
    const float a = value(i);
    const float b = value(half + i);
    const float cosine = head.cos_sin[i];
    const float sine = head.cos_sin[half + i];
    head.out[i].bits = to_bf16(a * cosine - b * sine);
    head.out[half + i].bits = to_bf16(b * cosine + a * sine);
  }
  for (int i = 2 * half + lane_of_thread(); i < head_dim; i += kWarpSize) head.out[i].bits = to_bf16(value(i));
}

// A block a row; its warps take the heads of q, k and v in turn.
__global__ void __launch_bounds__(kRopeThreads) turn_and_append(RopeArgs args) {
  MOED_SHARED(float, q_partials, kRopeWarps);
  MOED_SHARED(float, k_partials, kRopeWarps);
  const int64_t row = blockIdx.x;
  const int32_t dim = args.kv.head_dim;
  const int32_t num_kv_heads = args.kv.num_kv_heads;
  const float* qkv = args.qkv.data + row * args.qkv.stride;
  const float* k = qkv + args.num_heads * dim;
  const float* cos_sin = args.cos_sin + int64_t{args.positions[row]} * args.rotary_dim;
  const bool whole = args.norm == RopeAppend::Norm::kWhole;
  float q_factor = 1.0F;
  float k_factor = 1.0F;
  if (whole) {
    const int32_t q_size = args.num_heads * dim;
    const int32_t k_size = num_kv_heads * dim;
    q_factor = inverse_rms(sum_squares_in_block(qkv, q_size, q_partials), q_size, args.eps);
    k_factor = inverse_rms(sum_squares_in_block(k, k_size, k_partials), k_size, args.eps);
  }
  const auto head_norm = [&](const float* norm, int32_t index, float factor, Head& head) {
    if (args.norm == RopeAppend::Norm::kNone) return;
    head.norm = norm + (whole ? index * dim : 0);
    head.factor = whole ? factor : inverse_rms(sum_squares_in_warp(head.x, dim), dim, args.eps);
  };
  for (int32_t i = warp_of_thread(); i < args.num_heads; i += kRopeWarps) {
    Head head{qkv + i * dim, nullptr, 1.0F, cos_sin, args.rotary_dim, args.q.data + row * args.q.stride + i * dim};
    head_norm(args.q_norm, i, q_factor, head);
    turn_head(head, dim, args.clip);
  }
  const int64_t slot = args.slots[row];
  if (slot < 0) return;
  const int64_t block = slot / args.kv.block_tokens;
  const int64_t offset = slot % args.kv.block_tokens * dim;
  for (int32_t i = warp_of_thread(); i < 2 * num_kv_heads; i += kRopeWarps) {
    // V lies behind K as further heads would, and is only clipped.
    Head head{k + i * dim, nullptr, 1.0F, cos_sin, 0, k_of(args.kv, block, i) + offset};
    if (i < num_kv_heads) {
      head.rotary_dim = args.rotary_dim;
      head_norm(args.k_norm, i, k_factor, head);
    }
    turn_head(head, dim, args.clip);
  }
}

}  // namespace

void rope_append(const RopeAppend& args, const Launch& launch) {
  const RopeArgs rope{args.qkv,          args.num_heads, args.norm,    args.q_norm,     args.k_norm,
                      args.eps,          args.clip,      args.cos_sin, args.rotary_dim, args.positions.data(),
                      args.slots.data(), args.kv,        args.q};
  run_kernel(turn_and_append, dim3{static_cast<unsigned>(args.qkv.rows)}, dim3{kRopeThreads}, 0, launch.stream, rope);
}

void load_rope_append_kernels() { load_kernel(turn_and_append); }

}  // namespace moed::cuda
