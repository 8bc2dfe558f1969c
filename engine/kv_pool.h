#pragma once

#include <cstdint>

#include "base/status.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "model/config.h"

namespace moed {

struct KvPoolConfig {
  int64_t num_blocks = 0;
  int32_t block_tokens = 0;
  int32_t num_layers = 0;
  Memory memory = Memory::kMapped;  // kMapped: the host's, which the device reads and writes in place
};

// The paged bf16 KV of one pool: layer by layer, then block by block, K before V. Knows no sequences: who holds which
// block is the scheduler's. All of it is taken at the start: nothing runs out of memory later. Serving thread only.
class KvPool {
 public:
  // Errors: kInvalidArgument for sizes out of range, kResourceExhausted with the bytes asked for.
  static StatusOr<KvPool> make(const ModelConfig& model, const KvPoolConfig& config, Device& device);

  KvLayer layer(int32_t layer) const;
  // Enqueued: ordered with what else runs on the stream. One kernel for all layers: between two places of the host's
  // memory a stream's copy would wait on the host until the stream has come to it. REQUIRES: both in [0, num_blocks()).
  void copy_block(int32_t from, int32_t to, Ops& ops, Stream& stream) const;
  int64_t num_blocks() const { return config_.num_blocks; }
  int32_t block_tokens() const { return config_.block_tokens; }
  int64_t block_bytes() const { return block_elements_ * int64_t{sizeof(Bf16)}; }  // of one layer

 private:
  KvPool() = default;
  KvPoolConfig config_;
  Buffer memory_;
  int64_t block_elements_ = 0;  // of one layer
  int32_t num_kv_heads_ = 0;
  int32_t head_dim_ = 0;
};

}  // namespace moed
