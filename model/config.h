#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace moed {

// One expert of the model. Ordered by layer, then expert.
struct ExpertId {
  int32_t layer = 0;
  int32_t expert = 0;
  friend auto operator<=>(const ExpertId&, const ExpertId&) = default;
};

// Rotary position embedding, as transformers' modeling_rope_utils computes it.
struct RopeConfig {
  enum class Scaling : uint8_t { kNone, kLinear, kLlama3, kYarn };
  double theta = 10000.0;
  int32_t rotary_dim = 0;  // leading dimensions of each head that turn; head_dim unless partial_rotary_factor says less
  Scaling scaling = Scaling::kNone;
  double factor = 1.0;
  int32_t original_max_positions = 0;  // llama3, yarn
  double low_freq_factor = 1.0;        // llama3
  double high_freq_factor = 4.0;       // llama3
  double beta_fast = 32.0;             // yarn
  double beta_slow = 1.0;              // yarn
  double attention_factor = 1.0;       // yarn: cos and sin are multiplied by it
  bool truncate = true;                // yarn: correction range rounded to whole dimensions
};

struct AttentionConfig {
  enum class QkNorm : uint8_t { kNone, kPerHead, kWhole };  // kWhole: one norm over the whole projection (OLMoE)
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  bool qkv_bias = false;
  bool output_bias = false;
  QkNorm qk_norm = QkNorm::kNone;
  float clip_qkv = std::numeric_limits<float>::infinity();  // q, k and v are clamped to +-clip_qkv after their norms
  float scale = 0.0F;  // of q.k; 1 / sqrt(head_dim) unless the model says otherwise
};

// How rows choose experts. All arithmetic in fp32.
struct RouterConfig {
  enum class Score : uint8_t { kSoftmax, kSigmoid };
  Score score = Score::kSoftmax;  // over all experts, before the choice
  int32_t top_k = 0;
  bool renormalize = false;  // chosen scores are divided by their sum
  float scaling = 1.0F;      // then multiplied by this
  int32_t num_groups = 1;    // group-limited choice: only experts of the best groups_kept groups compete
  int32_t groups_kept = 1;
  bool correction_bias = false;  // a learned bias joins the scores for choosing, never for weighing
};

struct MoeConfig {
  int32_t num_experts = 0;
  int32_t intermediate_size = 0;  // of one routed expert
  RouterConfig router;
  int32_t shared_intermediate_size = 0;  // 0: no shared expert
  bool shared_gate = false;              // sigmoid(x . w) weighs the shared expert (Qwen2-MoE)
};

enum class LayerKind : uint8_t { kDense, kMoe };

// A checkpoint's architecture as data: all that the engine, the planner and the memory budget know of a model.
// Immutable after parse_config.
struct ModelConfig {
  std::string architecture;  // config.json's architectures[0]
  int32_t hidden_size = 0;
  int32_t num_layers = 0;
  int32_t vocab_size = 0;
  int32_t max_positions = 0;            // config.json's max_position_embeddings, or what yarn stretches it to
  int32_t dense_intermediate_size = 0;  // of layers of kind kDense
  float rms_norm_eps = 1e-6F;
  bool tied_embeddings = false;
  AttentionConfig attention;
  RopeConfig rope;
  MoeConfig moe;                       // num_experts 0 when no layer is kMoe
  std::vector<LayerKind> layers;       // [num_layers]
  std::vector<int32_t> eos_token_ids;  // of config.json alone; generation_config.json and the tokenizer may add more

  int32_t q_size() const { return attention.num_heads * attention.head_dim; }
  int32_t kv_size() const { return attention.num_kv_heads * attention.head_dim; }
  // Outputs a row sends to combine: the chosen experts, then the shared one.
  int32_t ffn_choices(int32_t layer) const {
    if (layers[layer] == LayerKind::kDense) return 1;
    return moe.router.top_k + (moe.shared_intermediate_size > 0 ? 1 : 0);
  }
  // KV bytes of one token over all layers (bf16).
  int64_t kv_bytes_per_token() const { return int64_t{2} * 2 * kv_size() * num_layers; }
};

}  // namespace moed
