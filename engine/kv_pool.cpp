#include "engine/kv_pool.h"

#include <limits>
#include <string>
#include <utility>

#include "base/check.h"

namespace moed {

StatusOr<KvPool> KvPool::make(const ModelConfig& model, const KvPoolConfig& config, Device& device) {
  if (config.num_blocks < 1 || config.num_blocks > std::numeric_limits<int32_t>::max()) {
    return invalid_argument("kv_blocks is " + std::to_string(config.num_blocks) + "; it must be between 1 and " +
                            std::to_string(std::numeric_limits<int32_t>::max()));
  }
  if (config.block_tokens < 1) {
    return invalid_argument("block_tokens is " + std::to_string(config.block_tokens) + "; it must be positive");
  }
  KvPool pool;
  pool.config_ = config;
  pool.num_kv_heads_ = model.attention.num_kv_heads;
  pool.head_dim_ = model.attention.head_dim;
  pool.block_elements_ = int64_t{2} * model.kv_size() * config.block_tokens;
  if (pool.block_elements_ > std::numeric_limits<int32_t>::max()) {
    return invalid_argument("block_tokens is " + std::to_string(config.block_tokens) +
                            "; a block of a layer may hold at most " +
                            std::to_string(std::numeric_limits<int32_t>::max()) + " elements");
  }
  const int64_t bytes = pool.block_bytes() * config.num_layers;
  if (config.num_blocks > std::numeric_limits<int64_t>::max() / bytes) {
    return Status(StatusCode::kResourceExhausted, std::to_string(config.num_blocks) + " KV blocks of " +
                                                      std::to_string(bytes) + " bytes cannot be addressed");
  }
  MOED_ASSIGN_OR_RETURN(pool.memory_, device.allocate(config.num_blocks * bytes, config.memory));
  return pool;
}

KvLayer KvPool::layer(int32_t layer) const {
  KvLayer view;
  view.base = memory_.as<Bf16>() + layer * config_.num_blocks * block_elements_;
  view.block_stride = block_elements_;
  view.block_tokens = config_.block_tokens;
  view.num_kv_heads = num_kv_heads_;
  view.head_dim = head_dim_;
  return view;
}

void KvPool::copy_block(int32_t from, int32_t to, Ops& ops, Stream& stream) const {
  MOED_CHECK(from >= 0 && from < num_blocks() && to >= 0 && to < num_blocks()) << from << " -> " << to;
  if (from == to) return;
  const auto layers = [&](int32_t block) {
    return Matrix<Bf16>(memory_.as<Bf16>() + block * block_elements_, config_.num_layers,
                        static_cast<int32_t>(block_elements_), config_.num_blocks * block_elements_);
  };
  ops.move(layers(from), layers(to), stream);
}

}  // namespace moed
