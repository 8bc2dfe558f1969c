#include "model/required_tensors.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "model/tensor_source.h"

namespace moed {
namespace {

std::string replaced(std::string text, std::string_view what, int64_t number) {
  if (const size_t at = text.find(what); at != std::string::npos) text.replace(at, what.size(), std::to_string(number));
  return text;
}

class Requirements {
 public:
  explicit Requirements(const Model& model) : config_(model.config), names_(model.names) {}

  std::vector<RequiredTensor> all() && {
    add(names_.embedding, {config_.vocab_size, config_.hidden_size}, TensorUse::kEmbedding);
    for (layer_ = 0; layer_ < config_.num_layers; ++layer_) {
      attention();
      add(names_.ffn_norm, {config_.hidden_size}, TensorUse::kNorm);
      if (config_.layers[layer_] == LayerKind::kDense) {
        ffn({names_.dense_gate, names_.dense_up, names_.dense_down}, config_.dense_intermediate_size);
      } else {
        moe();
      }
    }
    add(names_.final_norm, {config_.hidden_size}, TensorUse::kNorm);
    if (!config_.tied_embeddings) add(names_.head, {config_.vocab_size, config_.hidden_size}, TensorUse::kHead);
    return std::move(tensors_);
  }

 private:
  struct FfnNames {
    const std::string &gate, &up, &down;
  };

  void add(const std::string& pattern, std::vector<int64_t> shape, TensorUse use) {
    tensors_.push_back({tensor_name(pattern, layer_, expert_), std::move(shape), use});
  }

  void attention() {
    const AttentionConfig& attention = config_.attention;
    const int64_t hidden = config_.hidden_size;
    const int64_t q = config_.q_size();
    const int64_t kv = config_.kv_size();
    add(names_.attention_norm, {hidden}, TensorUse::kNorm);
    add(names_.q, {q, hidden}, TensorUse::kMatrix);
    add(names_.k, {kv, hidden}, TensorUse::kMatrix);
    add(names_.v, {kv, hidden}, TensorUse::kMatrix);
    add(names_.o, {hidden, q}, TensorUse::kResidualMatrix);
    if (attention.qkv_bias) {
      add(names_.q_bias, {q}, TensorUse::kBias);
      add(names_.k_bias, {kv}, TensorUse::kBias);
      add(names_.v_bias, {kv}, TensorUse::kBias);
    }
    if (attention.output_bias) add(names_.o_bias, {hidden}, TensorUse::kBias);
    if (attention.qk_norm != AttentionConfig::QkNorm::kNone) {
      const bool whole = attention.qk_norm == AttentionConfig::QkNorm::kWhole;
      add(names_.q_norm, {whole ? q : attention.head_dim}, TensorUse::kNorm);
      add(names_.k_norm, {whole ? kv : attention.head_dim}, TensorUse::kNorm);
    }
  }

  void ffn(const FfnNames& names, int64_t intermediate) {
    add(names.gate, {intermediate, config_.hidden_size}, TensorUse::kMatrix);
    add(names.up, {intermediate, config_.hidden_size}, TensorUse::kMatrix);
    add(names.down, {config_.hidden_size, intermediate}, TensorUse::kResidualMatrix);
  }

  void moe() {
    const MoeConfig& moe = config_.moe;
    add(names_.router, {moe.num_experts, config_.hidden_size}, TensorUse::kMatrix);
    if (moe.router.correction_bias) add(names_.router_correction, {moe.num_experts}, TensorUse::kBias);
    for (expert_ = 0; expert_ < moe.num_experts; ++expert_) {
      ffn({names_.expert_gate, names_.expert_up, names_.expert_down}, moe.intermediate_size);
    }
    if (moe.shared_intermediate_size == 0) return;
    ffn({names_.shared_gate, names_.shared_up, names_.shared_down}, moe.shared_intermediate_size);
    if (moe.shared_gate) add(names_.shared_router, {1, config_.hidden_size}, TensorUse::kMatrix);
  }

  const ModelConfig& config_;
  const TensorNames& names_;
  int64_t layer_ = 0;
  int64_t expert_ = 0;
  std::vector<RequiredTensor> tensors_;
};

}  // namespace

std::string tensor_name(std::string_view pattern, int64_t layer, int64_t expert) {
  return replaced(replaced(std::string(pattern), "{l}", layer), "{e}", expert);
}

std::vector<RequiredTensor> required_tensors(const Model& model) { return Requirements(model).all(); }

std::string shown_shape(const std::vector<int64_t>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

Status TensorSource::check(std::string_view name, std::span<const int64_t> wanted) const {
  const std::vector<int64_t>* found = shape(name);
  const std::vector<int64_t> want(wanted.begin(), wanted.end());
  if (found == nullptr) {
    return invalid_argument(fmt::format("tensor {} is missing, want one of shape {}", name, shown_shape(want)));
  }
  if (*found == want) return Status();
  return invalid_argument(fmt::format("tensor {} has shape {}, want {}", name, shown_shape(*found), shown_shape(want)));
}

StatusOr<int64_t> check_tensors(const Model& model, const TensorSource& source) {
  const std::vector<RequiredTensor> required = required_tensors(model);
  for (const RequiredTensor& tensor : required) MOED_RETURN_IF_ERROR(source.check(tensor.name, tensor.shape));
  return static_cast<int64_t>(source.names().size()) - static_cast<int64_t>(required.size());
}

}  // namespace moed
