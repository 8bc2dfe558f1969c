#include "server/model_shapes.h"

namespace moed {
namespace {

struct Shape {
  std::string_view name;
  std::string_view config_json;
};

constexpr Shape kShapes[] = {
    {"mixtral-8x7b", R"({"architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "tie_word_embeddings": false})"},
    {"olmoe-1b-7b", R"({"architectures": ["OlmoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": false, "vocab_size": 50304, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false})"},
    {"qwen3-30b-a3b", R"({"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "tie_word_embeddings": false})"},
};

}  // namespace

std::string model_shape_names() {
  std::string names;
  for (const Shape& shape : kShapes) names += (names.empty() ? "" : ", ") + std::string(shape.name);
  return names;
}

StatusOr<Model> model_of_shape(std::string_view name) {
  for (const Shape& shape : kShapes) {
    if (shape.name == name) return parse_model_config(shape.config_json, "{}");
  }
  return invalid_argument("unknown shape \"" + std::string(name) + "\"; there are " + model_shape_names(), "shape");
}

}  // namespace moed
