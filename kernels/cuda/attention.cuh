#pragma once

#include "cuda_port.cuh"
#include "kernels/cuda/kv.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/ops.h"

// Attention of a tile of query vectors, 16 a warp, over the KV of one head: what its kernels are made of. A vector is
// one head of one row; those of a span are numbered row by row. All warps of a block go through the same positions.
namespace moed::cuda {

// Positions of one partial softmax, from a multiple of it, whatever the batch: partials of chunks are merged in order,
// so that a vector's bits depend neither on its tile nor on whether its chunks were computed apart.
constexpr int kChunkPositions = 256;
constexpr int kStepPositions = 32;
constexpr int kWarpVectors = 16;

struct AttentionTask {
  const int32_t* blocks;
  int32_t row_begin;   // the span's first row
  int32_t num_cached;  // and its position
  int32_t first_vector;
  int32_t num_vectors;
  int32_t chunk_begin;
  int32_t chunk_end;
};

// What of a K or V comes next: positions [begin, begin + kStepPositions), of which those from `end` on do not exist,
// and columns from first_column.
struct AttentionWindow {
  int32_t begin;
  int32_t end;
  int first_column;
};

struct AttentionArgs {
  Matrix<const Bf16> q;
  KvLayer kv;
  int32_t group;  // query heads of a KV head
  float scale;
  Matrix<Bf16> out;
  bool wide;  // all rows may be read 16 bytes at a time
};

// Softmax over some positions for the two vectors of a lane (lane / 4 and that + 8), not yet divided: out = sums /
// total, both relative to exp(scale * peak). sums: columns as mma_m16n8k16 lays them out. total: a quarter each of four
// lanes until finish_chunk().
template <int kValues>
struct SoftmaxState {
  float peak[2] = {-INFINITY, -INFINITY};
  float total[2] = {};
  float sums[kValues / 8][4] = {};
};

struct MergeWeights {
  float peak;
  float into;
  float from;
};
__device__ inline MergeWeights merge_weights(float into, float from, float scale) {
  const float peak = fmaxf(into, from);
  return {peak, expf((into - peak) * scale), expf((from - peak) * scale)};
}
// Where partials meet, in registers or in memory, they do it by these very operations.
__device__ inline float merge(float into, float from, const MergeWeights& weights) {
  return fmaf(into, weights.into, from * weights.from);
}

template <int kValues>
__device__ inline void merge_states(SoftmaxState<kValues>& into, const SoftmaxState<kValues>& from, float scale) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const MergeWeights weights = merge_weights(into.peak[i], from.peak[i], scale);
    into.peak[i] = weights.peak;
    into.total[i] = merge(into.total[i], from.total[i], weights);
#pragma unroll
    for (int j = 0; j < kValues / 8; ++j) {
      into.sums[j][2 * i] = merge(into.sums[j][2 * i], from.sums[j][2 * i], weights);
      into.sums[j][2 * i + 1] = merge(into.sums[j][2 * i + 1], from.sums[j][2 * i + 1], weights);
    }
  }
}

template <int kValues>
__device__ inline void finish_chunk(SoftmaxState<kValues>& state) {
  for (float& total : state.total) {
    total += __shfl_xor_sync(kWarp, total, 1);
    total += __shfl_xor_sync(kWarp, total, 2);
  }
}

// kDim: the head's dimensions, padded. kValues: those of V that the block sums up; registers hold no more than 128.
template <int kDim, int kValues, int kWarps>
struct AttentionTile {
  static constexpr int kThreads = kWarps * kWarpSize;
  // Rows 16 bytes further apart than a multiple of 128: eight of them meet 32 different banks.
  static constexpr int kStride = kDim + 8;
  static constexpr int kValueStride = kValues + 8;
  static constexpr int64_t kSharedBytes =
      int64_t{2} * ((kWarps * kWarpVectors + kStepPositions) * kStride + kStepPositions * kValueStride) +
      int64_t{4} * kChunkPositions;

  uint16_t* q;   // [kWarps * 16, kStride]
  uint16_t* k;   // [kStepPositions, kStride]
  uint16_t* v;   // [kStepPositions, kValueStride]
  int32_t* ids;  // [kChunkPositions]: the blocks of one chunk, from the one on that holds its first position

  explicit __device__ AttentionTile(uint16_t* shared)
      : q(shared),
        k(q + kWarps * kWarpVectors * kStride),
        v(k + kStepPositions * kStride),
        ids(reinterpret_cast<int32_t*>(v + kStepPositions * kValueStride)) {}

  // The block table may lie in the host's memory, so it is read once a chunk and not once a step. begin: a multiple of
  // kChunkPositions, below `end`.
  __device__ void bring_ids(const int32_t* blocks, int32_t begin, int32_t end, int32_t block_tokens) const {
    const int32_t first = begin / block_tokens;
    const int32_t last = (min(begin + kChunkPositions, end) - 1) / block_tokens;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i <= last - first; i += kThreads) ids[i] = blocks[first + i];
  }

  // Eight elements of a row of head_dim, from `column`; zeros past its end or without a row.
  static __device__ void bring(uint16_t* to, const Bf16* row, int column, int32_t head_dim, bool wide) {
    if (wide) {
      const bool there = row != nullptr && column < head_dim;
      copy_async_16(to, there ? row + column : nullptr, there ? 16 : 0);
      return;
    }
    for (int i = 0; i < 8; ++i) to[i] = row != nullptr && column + i < head_dim ? row[column + i].bits : uint16_t{0};
  }

  __device__ void bring_q(const AttentionArgs& args, const AttentionTask& task, int32_t head) const {
    constexpr int kPieces = kDim / 8;
    for (int i = static_cast<int>(threadIdx.x); i < kWarps * kWarpVectors * kPieces; i += kThreads) {
      const int vector = i / kPieces;
      const int column = i % kPieces * 8;
      const int32_t number = task.first_vector + vector;
      const Bf16* row = vector >= task.num_vectors
                            ? nullptr
                            : args.q.data + (task.row_begin + number / args.group) * args.q.stride +
                                  (int64_t{head} * args.group + number % args.group) * args.kv.head_dim;
      bring(q + vector * kStride + column, row, column, args.kv.head_dim, args.wide);
    }
  }

  // The window of K or V, kColumns wide; zeros where nothing exists. of_block(block): where a block of the head begins.
  // REQUIRES: bring_ids() of its chunk.
  template <int kColumns, class OfBlock>
  __device__ void bring_window(uint16_t* to, const AttentionArgs& args, const AttentionWindow& window,
                               const OfBlock& of_block) const {
    constexpr int kPieces = kColumns / 8;
    const int32_t first = window.begin / kChunkPositions * kChunkPositions / args.kv.block_tokens;
    for (int i = static_cast<int>(threadIdx.x); i < kStepPositions * kPieces; i += kThreads) {
      const int column = i % kPieces * 8;
      const int32_t position = window.begin + i / kPieces;
      const Bf16* row = nullptr;
      if (position < window.end) {
        row = of_block(ids[position / args.kv.block_tokens - first]) +
              int64_t{position % args.kv.block_tokens} * args.kv.head_dim;
      }
      bring(to + i / kPieces * (kColumns + 8) + column, row, window.first_column + column, args.kv.head_dim, args.wide);
    }
  }

  // scores[j]: positions j * 8 .. of the step, unscaled.
  __device__ void score(float (&scores)[kStepPositions / 8][4]) const {
    const int lane = lane_of_thread();
    const uint16_t* my_q = q + (warp_of_thread() * kWarpVectors + lane % 16) * kStride + lane / 16 * 8;
    const uint16_t* my_k = k + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t x[4];
      load_matrices(x, my_q + d);
#pragma unroll
      for (int j = 0; j < kStepPositions / 8; j += 2) {
        uint32_t w[4];
        load_matrices(w, my_k + j * 8 * kStride + d);
        mma_m16n8k16(scores[j], x, {w[0], w[1]});
        mma_m16n8k16(scores[j + 1], x, {w[2], w[3]});
      }
    }
  }

  // sums += weights v. A weight goes as two bf16, its rounding and what that left: the sums stay as good as fp32.
  __device__ void add_values(const float (&weights)[kStepPositions / 8][4], SoftmaxState<kValues>& state) const {
    const int lane = lane_of_thread();
    const uint16_t* my_v = v + lane % 16 * kValueStride + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < kStepPositions / 16; ++step) {
      uint32_t high[4];
      uint32_t low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = weights[2 * step + i / 2] + i % 2 * 2;
        const uint16_t first = to_bf16(pair[0]);
        const uint16_t second = to_bf16(pair[1]);
        high[i] = first | static_cast<uint32_t>(second) << 16;
        low[i] = to_bf16(pair[0] - from_bf16(first)) | static_cast<uint32_t>(to_bf16(pair[1] - from_bf16(second)))
                                                           << 16;
      }
#pragma unroll
      for (int j = 0; j < kValues / 8; j += 2) {
        uint32_t w[4];
        load_matrices_transposed(w, my_v + step * 16 * kValueStride + j * 8);
        mma_m16n8k16(state.sums[j], high, {w[0], w[1]});
        mma_m16n8k16(state.sums[j], low, {w[0], w[1]});
        mma_m16n8k16(state.sums[j + 1], high, {w[2], w[3]});
        mma_m16n8k16(state.sums[j + 1], low, {w[2], w[3]});
      }
    }
  }
};

// Scores of a step to weights, and what came before to their peak. Vector i of the lane sees positions below
// visible[i], counted from the step's first; a step of which it sees nothing leaves its bits as they are.
template <int kValues>
__device__ inline void soften(const int32_t (&visible)[2], float scale, float (&scores)[kStepPositions / 8][4],
                              SoftmaxState<kValues>& state) {
  const int lane = lane_of_thread();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float peak = state.peak[i];
#pragma unroll
    for (int j = 0; j < kStepPositions / 8; ++j) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        float& score = scores[j][2 * i + part];
        if (j * 8 + lane % 4 * 2 + part >= visible[i]) score = -INFINITY;
        peak = fmaxf(peak, score);
      }
    }
    peak = fmaxf(peak, __shfl_xor_sync(kWarp, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(kWarp, peak, 2));
    const bool nothing_seen = peak == -INFINITY;
    const float correction = nothing_seen ? 1.0F : expf((state.peak[i] - peak) * scale);
    float sum = 0.0F;
#pragma unroll
    for (int j = 0; j < kStepPositions / 8; ++j) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        float& score = scores[j][2 * i + part];
        score = nothing_seen ? 0.0F : expf((score - peak) * scale);
        sum += score;
      }
    }
    state.peak[i] = peak;
    state.total[i] = fmaf(state.total[i], correction, sum);
#pragma unroll
    for (int j = 0; j < kValues / 8; ++j) {
      state.sums[j][2 * i] *= correction;
      state.sums[j][2 * i + 1] *= correction;
    }
  }
}

}  // namespace moed::cuda
