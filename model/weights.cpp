#include "model/weights.h"

#include <utility>

#include "model/load_tensors.h"
#include "model/required_tensors.h"

namespace moed {
namespace {

constexpr int64_t kAlignBytes = 64;

// Walks the model twice in the same order: once to add up the bytes, once, with an arena, to hand out places and note
// what is read there.
class Layout {
 public:
  Layout(const Model& model, std::byte* arena) : config_(model.config), names_(model.names), arena_(arena) {}

  const Bf16* embedding() { return matrix(names_.embedding, config_.vocab_size, config_.hidden_size); }
  const Bf16* head() { return matrix(names_.head, config_.vocab_size, config_.hidden_size); }
  const float* final_norm() { return vector({{names_.final_norm, config_.hidden_size}}); }

  LayerWeights layer(int32_t layer) {
    layer_ = layer;
    const AttentionConfig& attention = config_.attention;
    const int64_t hidden = config_.hidden_size;
    const int64_t q = config_.q_size();
    const int64_t kv = config_.kv_size();
    LayerWeights out;
    out.attention_norm = vector({{names_.attention_norm, hidden}});
    out.qkv = rows({{names_.q, q * hidden}, {names_.k, kv * hidden}, {names_.v, kv * hidden}});
    if (attention.qkv_bias) out.qkv_bias = vector({{names_.q_bias, q}, {names_.k_bias, kv}, {names_.v_bias, kv}});
    if (attention.qk_norm != AttentionConfig::QkNorm::kNone) {
      const bool whole = attention.qk_norm == AttentionConfig::QkNorm::kWhole;
      out.q_norm = vector({{names_.q_norm, whole ? q : attention.head_dim}});
      out.k_norm = vector({{names_.k_norm, whole ? kv : attention.head_dim}});
    }
    out.output = matrix(names_.o, hidden, q);
    if (attention.output_bias) out.output_bias = vector({{names_.o_bias, hidden}});
    out.ffn_norm = vector({{names_.ffn_norm, hidden}});
    if (config_.layers[layer] == LayerKind::kDense) {
      out.ffn = ffn(names_.dense_gate, names_.dense_up, names_.dense_down, config_.dense_intermediate_size);
    } else {
      moe(&out);
    }
    return out;
  }

  int64_t bytes() const { return bytes_; }
  const std::vector<TensorLoad>& loads() const { return loads_; }

 private:
  struct Part {
    const std::string& name;
    int64_t elements;
  };

  void moe(LayerWeights* out) {
    const MoeConfig& moe = config_.moe;
    out->router = matrix(names_.router, moe.num_experts, config_.hidden_size);
    if (moe.router.correction_bias) out->router_correction = vector({{names_.router_correction, moe.num_experts}});
    if (moe.shared_intermediate_size == 0) return;
    out->ffn = ffn(names_.shared_gate, names_.shared_up, names_.shared_down, moe.shared_intermediate_size);
    if (moe.shared_gate) out->shared_router = matrix(names_.shared_router, 1, config_.hidden_size);
  }

  const Bf16* matrix(const std::string& name, int64_t out, int64_t in) { return rows({{name, out * in}}); }
  const Bf16* ffn(const std::string& gate, const std::string& up, const std::string& down, int64_t intermediate) {
    const int64_t elements = intermediate * config_.hidden_size;
    return rows({{gate, elements}, {up, elements}, {down, elements}});
  }

  // Several tensors, one after another without a gap.
  const Bf16* rows(std::initializer_list<Part> parts) { return place<Bf16>(parts, &TensorLoad::bf16); }
  const float* vector(std::initializer_list<Part> parts) { return place<float>(parts, &TensorLoad::fp32); }

  template <class T>
  const T* place(std::initializer_list<Part> parts, T* TensorLoad::*target) {
    int64_t elements = 0;
    T* const begin = arena_ == nullptr ? nullptr : reinterpret_cast<T*>(arena_ + bytes_);
    for (const Part& part : parts) {
      if (begin != nullptr) {
        TensorLoad load{.name = tensor_name(part.name, layer_), .elements = part.elements};
        load.*target = begin + elements;
        loads_.push_back(std::move(load));
      }
      elements += part.elements;
    }
    const int64_t bytes = elements * static_cast<int64_t>(sizeof(T));
    bytes_ += (bytes + kAlignBytes - 1) / kAlignBytes * kAlignBytes;
    return begin;
  }

  const ModelConfig& config_;
  const TensorNames& names_;
  std::byte* const arena_;
  int32_t layer_ = 0;
  int64_t bytes_ = 0;
  std::vector<TensorLoad> loads_;
};

}  // namespace

StatusOr<DenseWeights> DenseWeights::load(const Model& model, const TensorSource& source,
                                          const std::function<void(int64_t)>& progress) {
  DenseWeights weights;
  const auto walk = [&](Layout& layout) {
    DenseViews& views = weights.views_;
    views.layers.clear();
    views.embedding = layout.embedding();
    for (int32_t layer = 0; layer < model.config.num_layers; ++layer) views.layers.push_back(layout.layer(layer));
    views.final_norm = layout.final_norm();
    views.head = model.config.tied_embeddings ? views.embedding : layout.head();
  };
  Layout sizes(model, nullptr);
  walk(sizes);
  MOED_ASSIGN_OR_RETURN(weights.arena_,
                        source.hollow() ? HugePages::reserve(sizes.bytes()) : HugePages::allocate(sizes.bytes()));
  Layout places(model, weights.arena_.data());
  walk(places);
  if (!source.hollow()) MOED_RETURN_IF_ERROR(load_tensors(source, places.loads(), progress));
  return weights;
}

DenseViews DenseWeights::views_at(const std::byte* copy) const {
  const auto move = [&]<class T>(const T*& view) {
    if (view == nullptr) return;
    view = reinterpret_cast<const T*>(copy + (reinterpret_cast<const std::byte*>(view) - arena_.data()));
  };
  DenseViews views = views_;
  move(views.embedding);
  move(views.head);
  move(views.final_norm);
  for (LayerWeights& layer : views.layers) {
    for (const float** view : {&layer.attention_norm, &layer.qkv_bias, &layer.q_norm, &layer.k_norm, &layer.output_bias,
                               &layer.ffn_norm, &layer.router_correction}) {
      move(*view);
    }
    for (const Bf16** view : {&layer.qkv, &layer.output, &layer.router, &layer.ffn, &layer.shared_router}) move(*view);
  }
  return views;
}

}  // namespace moed
