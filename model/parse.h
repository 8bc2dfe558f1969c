#pragma once

#include "model/architectures.h"
#include "model/json.h"

namespace moed {

// The parts that config.json spells the same way in most architectures. All record what is wrong in `fields`.

// Defaults that differ between architectures, as the configuration classes of transformers set them. 0 means: derived.
struct CommonDefaults {
  int64_t vocab_size = 32000;
  int64_t hidden_size = 4096;
  int64_t num_layers = 32;
  int64_t num_heads = 32;
  int64_t num_kv_heads = 0;  // 0: num_heads
  int64_t head_dim = 0;      // 0: hidden_size / num_heads
  int64_t max_positions = 2048;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  int32_t eos_token_id = -1;  // -1: none
  bool window_flag = false;   // sliding_window counts only when use_sliding_window is true (Qwen)
};

// Sizes, attention without biases and norms, rope, eos; refuses what no architecture here knows (quantisation, sliding
// windows, other activations).
ModelConfig parse_common(Fields& fields, const CommonDefaults& defaults);

struct MoeDefaults {
  const char* intermediate_key = "moe_intermediate_size";
  int64_t intermediate_size = 0;
  int64_t num_experts = 0;
  int64_t top_k = 0;
};
// Experts and router; every layer becomes kMoe. num_experts 0 leaves all layers dense.
void parse_moe(Fields& fields, const MoeDefaults& defaults, ModelConfig* config);
// Qwen's mlp_only_layers and decoder_sparse_step turn some layers into dense ones.
void parse_dense_layers(Fields& fields, ModelConfig* config);

// intermediate_size of dense layers.
int32_t parse_intermediate(Fields& fields, const char* key, int64_t fallback);

// What holds across fields: head counts, top_k, the number of bytes of all weights. Drops eos ids outside the
// vocabulary, which can never be sampled, and the MoE part of a model without MoE layers.
void finish_config(Fields& fields, ModelConfig* config);

// eos_token_id: an integer, a list, or nothing (then `fallback`).
std::vector<int32_t> parse_eos(Fields& fields, std::vector<int32_t> fallback);
GenerationDefaults parse_generation(Fields& fields, const ModelConfig& config);

}  // namespace moed
