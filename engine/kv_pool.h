#pragma once

#include <cstdint>

#include "base/huge_pages.h"
#include "base/status.h"
#include "kernels/ops.h"
#include "model/config.h"

namespace moed {

// The paged bf16 KV of one pool, all layers: layer by layer, then block by block, K before V. Knows no sequences: who
// holds which block is the scheduler's. Lies in host memory, every page of
// it touched at the start: nothing runs out of memory later. Serving thread only.
class KvPool {
 public:
  // Errors: kResourceExhausted with the bytes asked for.
  static StatusOr<KvPool> make(const ModelConfig& model, int64_t num_blocks, int32_t block_tokens);

  KvLayer layer(int32_t layer) const;
  // Enqueued: ordered with what else runs on the stream. REQUIRES: both in [0, num_blocks()).
  void copy_block(int32_t from, int32_t to, Stream& stream);
  int64_t num_blocks() const { return num_blocks_; }
  int32_t block_tokens() const { return block_tokens_; }

 private:
  KvPool() = default;
  HugePages memory_;
  int64_t num_blocks_ = 0;
  int64_t block_elements_ = 0;  // of one layer
  int32_t block_tokens_ = 0;
  int32_t num_layers_ = 0;
  int32_t num_kv_heads_ = 0;
  int32_t head_dim_ = 0;
};

}  // namespace moed
