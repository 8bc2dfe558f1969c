#pragma once

#include "cuda_port.cuh"
#include "kernels/ops.h"

namespace moed::cuda {

// KvLayer::k() and v() for kernels: where [block_tokens, head_dim] of a block and a KV head begins.
__device__ inline Bf16* k_of(const KvLayer& kv, int64_t block, int64_t head) {
  Bf16* first = block < kv.staging_begin ? kv.base + block * kv.block_stride
                                         : kv.staging + (block - kv.staging_begin) * kv.block_stride;
  return first + head * kv.block_tokens * kv.head_dim;
}
__device__ inline Bf16* v_of(const KvLayer& kv, int64_t block, int64_t head) {
  return k_of(kv, block, head + kv.num_kv_heads);
}

}  // namespace moed::cuda
