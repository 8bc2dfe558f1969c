#include "engine/kv_pool.h"

#include <limits>
#include <utility>

namespace moed {
StatusOr<KvPool> KvPool::make(const ModelConfig& model, int64_t num_blocks, int32_t block_tokens) {
  if (num_blocks < 1 || num_blocks > std::numeric_limits<int32_t>::max()) {
    return invalid_argument("kv_blocks is " + std::to_string(num_blocks) + "; it must be between 1 and " +
                            std::to_string(std::numeric_limits<int32_t>::max()));
  }
  if (block_tokens < 1)
    return invalid_argument("block_tokens is " + std::to_string(block_tokens) + "; it must be positive");
  KvPool pool;
  pool.num_blocks_ = num_blocks;
  pool.block_tokens_ = block_tokens;
  pool.num_layers_ = model.num_layers;
  pool.num_kv_heads_ = model.attention.num_kv_heads;
  pool.head_dim_ = model.attention.head_dim;
  pool.block_elements_ = int64_t{2} * model.kv_size() * block_tokens;
  const int64_t layer_bytes = pool.block_elements_ * int64_t{sizeof(Bf16)} * model.num_layers;
  if (num_blocks > std::numeric_limits<int64_t>::max() / layer_bytes) {
    return Status(StatusCode::kResourceExhausted, std::to_string(num_blocks) + " KV blocks of " +
                                                      std::to_string(layer_bytes) + " bytes cannot be addressed");
  }
  MOED_ASSIGN_OR_RETURN(pool.memory_, HugePages::allocate(num_blocks * layer_bytes));
  pool.memory_.touch();
  return pool;
}

KvLayer KvPool::layer(int32_t layer) const {
  KvLayer view;
  view.base = reinterpret_cast<Bf16*>(memory_.data()) + layer * num_blocks_ * block_elements_;
  view.block_stride = block_elements_;
  view.block_tokens = block_tokens_;
  view.num_kv_heads = num_kv_heads_;
  view.head_dim = head_dim_;
  return view;
}

void KvPool::copy_block(int32_t from, int32_t to, Stream& stream) {
  MOED_CHECK(from >= 0 && from < num_blocks_ && to >= 0 && to < num_blocks_) << from << " -> " << to;
  if (from == to) return;
  for (int32_t index = 0; index < num_layers_; ++index) {
    const KvLayer view = layer(index);
    stream.copy(view.base + to * block_elements_, view.base + from * block_elements_,
                block_elements_ * int64_t{sizeof(Bf16)});
  }
}

}  // namespace moed
