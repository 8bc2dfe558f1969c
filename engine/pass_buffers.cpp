#include "engine/pass_buffers.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

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
  top_k_ = std::max(1, model.moe.router.top_k);
  all_.residual = device.take<float>(rows, model.hidden_size);
  all_.normed = device.take<Bf16>(rows, model.hidden_size);
  all_.qkv = device.take<float>(rows, q_size + 2 * model.kv_size());
  all_.q = device.take<Bf16>(rows, q_size);
  all_.attention = device.take<Bf16>(rows, q_size);
  all_.expert_outputs = device.take<float>(int64_t{rows} * choices_max_ * model.hidden_size);
  all_.expert_scratch = device.take<Bf16>(rows * scratch_elements_);
  all_.experts = device.take<int32_t>(rows, top_k_);
  all_.expert_weights = device.take<float>(rows, choices_max_);
  all_.pairs = device.take<int32_t>(int64_t{rows} * top_k_);
  for (HalfTables& half : halves_) {
    half.offsets = device.take<int32_t>(model.moe.num_experts + 1);
    half.whole_offsets = mapped.take<int32_t>(2);
  }
  identity_ = device.take<int32_t>(rows);
  shared_pairs_ = device.take<int32_t>(rows);
  all_.tokens = mapped.take<int32_t>(rows);
  all_.positions = mapped.take<int32_t>(rows);
  all_.slots = mapped.take<int64_t>(rows);
  spans_ = mapped.take<AttentionSpan>(config.sequences_max);
  const int64_t blocks_a_context = (int64_t{config.max_model_len} + config.block_tokens - 1) / config.block_tokens;
  block_table_entries_ = config.sequences_max * blocks_a_context;
  block_table_ = mapped.take<int32_t>(block_table_entries_);
}

void PassBuffers::carve_mirrors(const ModelConfig& model, const EngineConfig& config, Carver& device, Carver& mapped) {
  const int32_t rows = config.rows_max;
  expert_elements_ = int64_t{top_k_} * model.moe.intermediate_size;
  all_.host_q = mapped.take<Bf16>(rows, model.q_size());
  all_.host_attention = mapped.take<Bf16>(rows, model.q_size());
  if (model.moe.num_experts == 0) return;
  all_.host_normed = mapped.take<Bf16>(rows, model.hidden_size);
  all_.host_outputs = mapped.take<float>(int64_t{rows} * choices_max_ * model.hidden_size);
  all_.host_scratch = mapped.take<Bf16>(rows * expert_elements_);
  all_.host_pairs = mapped.take<int32_t>(int64_t{rows} * top_k_);
  all_.next_experts = device.take<int32_t>(rows, top_k_);
  all_.next_weights = device.take<float>(rows, choices_max_);
  all_.next_pairs = device.take<int32_t>(int64_t{rows} * top_k_);
  for (HalfTables& half : halves_) {
    half.host_offsets = mapped.take<int32_t>(model.moe.num_experts + 1);
    half.next_offsets = device.take<int32_t>(model.moe.num_experts + 1);
    half.next_host_offsets = mapped.take<int32_t>(model.moe.num_experts + 1);
    half.host_blobs = mapped.take<const std::byte*>(model.moe.num_experts);
  }
}

EngineBytes PassBuffers::bytes(const ModelConfig& model, const EngineConfig& config, bool device_is_host) {
  PassBuffers buffers;
  Carver device(nullptr);
  Carver mapped(nullptr);
  buffers.carve(model, config, device, mapped);
  if (!device_is_host) buffers.carve_mirrors(model, config, device, mapped);
  return {device.used_bytes(), mapped.used_bytes()};
}

StatusOr<PassBuffers> PassBuffers::allocate(const ModelConfig& model, const EngineConfig& config, Device& device) {
  PassBuffers buffers;
  const EngineBytes bytes = PassBuffers::bytes(model, config, device.is_host());
  MOED_ASSIGN_OR_RETURN(buffers.device_memory_, device.allocate(bytes.device_bytes, Memory::kDevice));
  MOED_ASSIGN_OR_RETURN(buffers.mapped_memory_, device.allocate(bytes.host_bytes, Memory::kMapped));
  Carver device_memory(buffers.device_memory_.data());
  Carver mapped_memory(buffers.mapped_memory_.data());
  buffers.carve(model, config, device_memory, mapped_memory);
  if (!device.is_host()) buffers.carve_mirrors(model, config, device_memory, mapped_memory);
  MOED_RETURN_IF_ERROR(buffers.write_constants(config.rows_max, device));
  return buffers;
}

Status PassBuffers::write_constants(int32_t rows, Device& device) {
  const int64_t bytes = int64_t{rows} * int64_t{sizeof(int32_t)};
  std::vector<int32_t> identity(rows);
  std::vector<int32_t> shared_pairs(rows);
  std::iota(identity.begin(), identity.end(), 0);
  for (int32_t row = 0; row < rows; ++row) shared_pairs[row] = row * (top_k_ + 1) + top_k_;
  const auto stream = device.make_stream();
  const auto written = device.make_event();
  stream->copy(identity_, identity.data(), bytes);
  stream->copy(shared_pairs_, shared_pairs.data(), bytes);
  stream->record(*written);
  return written->join();
}

RowViews PassBuffers::rows(int32_t begin, int32_t count) const {
  MOED_CHECK(begin >= 0 && count >= 0 && begin + count <= all_.residual.rows) << begin << " + " << count;
  RowViews views = all_;
  views.residual = all_.residual.slice(begin, count);
  views.normed = all_.normed.slice(begin, count);
  views.qkv = all_.qkv.slice(begin, count);
  views.q = all_.q.slice(begin, count);
  views.attention = all_.attention.slice(begin, count);
  views.experts = all_.experts.slice(begin, count);
  views.expert_weights = all_.expert_weights.slice(begin, count);
  views.expert_outputs += int64_t{begin} * choices_max_ * all_.residual.cols;
  views.expert_scratch += begin * scratch_elements_;
  views.pairs += int64_t{begin} * top_k_;
  if (all_.host_q.data != nullptr) {
    views.host_q = all_.host_q.slice(begin, count);
    views.host_attention = all_.host_attention.slice(begin, count);
  }
  if (all_.host_normed.data != nullptr) {
    views.host_normed = all_.host_normed.slice(begin, count);
    views.host_outputs += int64_t{begin} * choices_max_ * all_.residual.cols;
    views.host_scratch += begin * expert_elements_;
    views.host_pairs += int64_t{begin} * top_k_;
    views.next_experts = all_.next_experts.slice(begin, count);
    views.next_weights = all_.next_weights.slice(begin, count);
    views.next_pairs += int64_t{begin} * top_k_;
  }
  views.identity = identity_;
  views.shared_pairs = shared_pairs_;
  views.tokens += begin;
  views.positions += begin;
  views.slots += begin;
  return views;
}

}  // namespace moed
