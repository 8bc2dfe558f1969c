#pragma once

#include <cstdint>

#include "base/bf16.h"

// Included by files compiled for one ISA each: plain data only, so that no inline function of theirs can be taken by
// the linker for the whole program.
namespace moed {

// y[m][i] = sum over k of x[m][k] * w[i][k], for every m and i in [0, n): one block of a product. Each sum runs over k
// in one order that depends on k alone, so that neither m, n, nor a row's place in the block changes a bit.
struct DotBlock {
  const Bf16* const* x = nullptr;  // [m] rows of k
  int32_t m = 0;
  const Bf16* w = nullptr;  // [n, k], rows k apart
  int32_t n = 0;
  int32_t k = 0;
  float* const* y = nullptr;  // [m] rows; column y_begin belongs to w's row 0
  int32_t y_begin = 0;
  const float* bias = nullptr;  // [n] or null
  bool accumulate = false;      // y += instead of y =
};

// Positions that one partial softmax covers. Chunks begin at multiples of it, whatever the batch.
constexpr int32_t kChunkPositions = 256;

// Softmax over some positions, not yet divided: out = sums / total, both relative to exp(peak).
struct AttentionPartial {
  float* peak = nullptr;   // [vectors]
  float* total = nullptr;  // [vectors]
  float* sums = nullptr;   // [vectors, head_dim]
};

// Some query vectors of one KV head against one chunk of its positions.
struct AttentionChunk {
  const Bf16* const* q = nullptr;    // [vectors] of head_dim
  const int32_t* visible = nullptr;  // [vectors], 1..kChunkPositions: positions seen, from the chunk's first
  int32_t vectors = 0;
  int32_t visible_max = 0;         // largest of visible
  const Bf16* const* k = nullptr;  // blocks of [block_tokens, head_dim]
  const Bf16* const* v = nullptr;
  int32_t block_tokens = 0;  // a multiple of 16
  int32_t head_dim = 0;      // even
  float scale = 0.0F;
  uint32_t* transposed_k = nullptr;  // scratch [head_dim / 2, kChunkPositions]
  float* scores = nullptr;           // scratch [vectors, kChunkPositions]
  AttentionPartial out;
};

// One head of one row between projection and cache: norm, clip, rope, bf16.
struct RopeHead {
  const float* x = nullptr;  // [head_dim]
  int32_t head_dim = 0;
  const float* norm = nullptr;  // [head_dim] or null
  float inverse_rms = 1.0F;     // used when norm is set
  float clip = 0.0F;
  const float* cos_sin = nullptr;  // [rotary_dim]
  int32_t rotary_dim = 0;
  float* scratch = nullptr;  // [head_dim]
  Bf16* out = nullptr;       // [head_dim]
};

// The inner loops of one ISA. Pointers need no alignment; ranges may have any length.
struct KernelTable {
  void (*dot_block)(const DotBlock& block);
  void (*attention_chunk)(const AttentionChunk& chunk);
  // into = into combined with `from`, the chunk that follows.
  void (*attention_merge)(const AttentionPartial& into, const AttentionPartial& from, int32_t vectors,
                          int32_t head_dim);
  // out[i] = bf16(x[i] / divisor)
  void (*divide_to_bf16)(const float* x, float divisor, int32_t n, Bf16* out);
  void (*rope_head)(const RopeHead& head);
  // out = bf16(silu(gate) * up)
  void (*silu_mul)(const float* gate, const float* up, int32_t n, Bf16* out);
  float (*sum_squares)(const float* x, int32_t n);
  // out = bf16(x * factor * weight)
  void (*scale_to_bf16)(const float* x, float factor, const float* weight, int32_t n, Bf16* out);
  void (*to_float)(const Bf16* x, int32_t n, float* out);
  // y += factor * x
  void (*add_scaled)(const float* x, float factor, int32_t n, float* y);
  // x = exp(x - shift); returns the sum.
  float (*exp_shifted)(float* x, float shift, int32_t n);
};

}  // namespace moed
