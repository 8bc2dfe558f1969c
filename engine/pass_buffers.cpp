#include "engine/pass_buffers.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/check.h"

namespace moed {

// Hands out consecutive, aligned pieces of a run of bytes; with no memory behind it, it only counts.
class PassBuffers::Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_bytes_);
    used_bytes_ += (count * int64_t{sizeof(T)} + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
    return piece;
  }
  template <class T>
  Matrix<T> take(int32_t rows, int32_t cols) {
    return Matrix<T>(take<T>(int64_t{rows} * cols), rows, cols);
  }
  int64_t used_bytes() const { return used_bytes_; }

 private:
  static constexpr int64_t kAlignmentBytes = 64;
  std::byte* base_;
  int64_t used_bytes_ = 0;
};

int32_t PassBuffers::choices_max(const ModelConfig& model) {
  int32_t most = 1;
  for (int32_t layer = 0; layer < model.num_layers; ++layer) most = std::max(most, model.ffn_choices(layer));
  return most;
}

int64_t PassBuffers::scratch_elements(const ModelConfig& model) {
  int64_t widest = 0;
  for (const LayerKind kind : model.layers) {
    if (kind == LayerKind::kDense) {
      widest = std::max<int64_t>(widest, model.dense_intermediate_size);
    } else {
      widest = std::max({widest, int64_t{model.moe.router.top_k} * model.moe.intermediate_size,
                         int64_t{model.moe.shared_intermediate_size}});
    }
  }
  return widest;
}

void PassBuffers::carve(const ModelConfig& model, const EngineConfig& config, Carver& device, Carver& mapped) {
  const int32_t rows = config.rows_max;
  const int32_t q_size = model.q_size();
  choices_max_ = choices_max(model);
  scratch_elements_ = scratch_elements(model);
  all_.residual = device.take<float>(rows, model.hidden_size);
  all_.normed = device.take<Bf16>(rows, model.hidden_size);
  all_.qkv = device.take<float>(rows, q_size + 2 * model.kv_size());
  all_.q = device.take<Bf16>(rows, q_size);
  all_.attention = device.take<Bf16>(rows, q_size);
  all_.expert_outputs = device.take<float>(int64_t{rows} * choices_max_ * model.hidden_size);
  all_.expert_scratch = device.take<Bf16>(rows * scratch_elements_);
  all_.experts = mapped.take<int32_t>(rows, std::max(1, model.moe.router.top_k));
  all_.expert_weights = mapped.take<float>(rows, choices_max_);
  all_.pairs = mapped.take<int32_t>(int64_t{rows} * choices_max_);
  identity_ = mapped.take<int32_t>(rows);
  all_.tokens = mapped.take<int32_t>(rows);
  all_.positions = mapped.take<int32_t>(rows);
  all_.slots = mapped.take<int64_t>(rows);
  spans_ = mapped.take<AttentionSpan>(config.sequences_max);
  const int64_t blocks_a_context = (int64_t{config.max_model_len} + config.block_tokens - 1) / config.block_tokens;
  block_table_entries_ = config.sequences_max * blocks_a_context;
  block_table_ = mapped.take<int32_t>(block_table_entries_);
}

int64_t PassBuffers::bytes(const ModelConfig& model, const EngineConfig& config) {
  PassBuffers buffers;
  Carver device(nullptr);
  Carver mapped(nullptr);
  buffers.carve(model, config, device, mapped);
  return device.used_bytes() + mapped.used_bytes();
}

StatusOr<PassBuffers> PassBuffers::allocate(const ModelConfig& model, const EngineConfig& config, Device& device) {
  PassBuffers buffers;
  Carver device_size(nullptr);
  Carver mapped_size(nullptr);
  buffers.carve(model, config, device_size, mapped_size);
  MOED_ASSIGN_OR_RETURN(buffers.device_memory_, device.allocate(device_size.used_bytes(), Memory::kDevice));
  MOED_ASSIGN_OR_RETURN(buffers.mapped_memory_, device.allocate(mapped_size.used_bytes(), Memory::kMapped));
  Carver device_memory(buffers.device_memory_.data());
  Carver mapped_memory(buffers.mapped_memory_.data());
  buffers.carve(model, config, device_memory, mapped_memory);
  std::iota(buffers.identity_, buffers.identity_ + config.rows_max, 0);
  return buffers;
}

RowViews PassBuffers::rows(int32_t begin, int32_t count) const {
  MOED_CHECK(begin >= 0 && count >= 0 && begin + count <= all_.residual.rows) << begin << " + " << count;
  RowViews views;
  views.residual = all_.residual.slice(begin, count);
  views.normed = all_.normed.slice(begin, count);
  views.qkv = all_.qkv.slice(begin, count);
  views.q = all_.q.slice(begin, count);
  views.attention = all_.attention.slice(begin, count);
  views.experts = all_.experts.slice(begin, count);
  views.expert_weights = all_.expert_weights.slice(begin, count);
  views.expert_outputs = all_.expert_outputs + int64_t{begin} * choices_max_ * all_.residual.cols;
  views.expert_scratch = all_.expert_scratch + begin * scratch_elements_;
  views.pairs = all_.pairs + int64_t{begin} * choices_max_;
  views.identity = identity_;
  views.tokens = all_.tokens + begin;
  views.positions = all_.positions + begin;
  views.slots = all_.slots + begin;
  return views;
}

}  // namespace moed
