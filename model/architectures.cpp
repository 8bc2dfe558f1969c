#include "model/architectures.h"

#include <filesystem>
#include <span>

#include "model/parse.h"

namespace moed {
namespace {

constexpr int64_t kConfigBytesMax = 16 << 20;

// How Llama names its tensors, and nearly everyone after it.
TensorNames llama_names() {
  TensorNames names;
  names.embedding = "model.embed_tokens.weight";
  names.final_norm = "model.norm.weight";
  names.head = "lm_head.weight";
  const std::string layer = "model.layers.{l}.";
  names.attention_norm = layer + "input_layernorm.weight";
  names.ffn_norm = layer + "post_attention_layernorm.weight";
  names.q = layer + "self_attn.q_proj.weight";
  names.k = layer + "self_attn.k_proj.weight";
  names.v = layer + "self_attn.v_proj.weight";
  names.o = layer + "self_attn.o_proj.weight";
  names.q_bias = layer + "self_attn.q_proj.bias";
  names.k_bias = layer + "self_attn.k_proj.bias";
  names.v_bias = layer + "self_attn.v_proj.bias";
  names.o_bias = layer + "self_attn.o_proj.bias";
  names.q_norm = layer + "self_attn.q_norm.weight";
  names.k_norm = layer + "self_attn.k_norm.weight";
  names.dense_gate = layer + "mlp.gate_proj.weight";
  names.dense_up = layer + "mlp.up_proj.weight";
  names.dense_down = layer + "mlp.down_proj.weight";
  return names;
}

TensorNames qwen_moe_names() {
  TensorNames names = llama_names();
  const std::string mlp = "model.layers.{l}.mlp.";
  names.router = mlp + "gate.weight";
  names.expert_gate = mlp + "experts.{e}.gate_proj.weight";
  names.expert_up = mlp + "experts.{e}.up_proj.weight";
  names.expert_down = mlp + "experts.{e}.down_proj.weight";
  names.shared_gate = mlp + "shared_expert.gate_proj.weight";
  names.shared_up = mlp + "shared_expert.up_proj.weight";
  names.shared_down = mlp + "shared_expert.down_proj.weight";
  names.shared_router = mlp + "shared_expert_gate.weight";
  return names;
}

TensorNames mixtral_names() {
  TensorNames names = llama_names();
  const std::string moe = "model.layers.{l}.block_sparse_moe.";
  names.router = moe + "gate.weight";
  names.expert_gate = moe + "experts.{e}.w1.weight";
  names.expert_up = moe + "experts.{e}.w3.weight";
  names.expert_down = moe + "experts.{e}.w2.weight";
  return names;
}

ModelConfig parse_mixtral(Fields& fields) {
  CommonDefaults defaults{
      .num_kv_heads = 8, .max_positions = 4096 * 32, .rms_norm_eps = 1e-5, .rope_theta = 1e6, .eos_token_id = 2};
  ModelConfig config = parse_common(fields, defaults);
  parse_moe(fields, {.intermediate_key = "intermediate_size", .intermediate_size = 14336, .num_experts = 8, .top_k = 2},
            &config);
  if (config.moe.num_experts == 0) fields.refuse("num_local_experts", "at least 1");
  config.moe.router.renormalize = true;
  return config;
}

ModelConfig parse_qwen2_moe(Fields& fields) {
  CommonDefaults defaults{.vocab_size = 151936,
                          .hidden_size = 2048,
                          .num_layers = 24,
                          .num_heads = 16,
                          .num_kv_heads = 16,
                          .max_positions = 32768,
                          .window_flag = true};
  ModelConfig config = parse_common(fields, defaults);
  config.dense_intermediate_size = parse_intermediate(fields, "intermediate_size", 5632);
  config.attention.qkv_bias = fields.boolean("qkv_bias", true);
  parse_moe(fields, {.intermediate_size = 1408, .num_experts = 60, .top_k = 4}, &config);
  config.moe.shared_intermediate_size = parse_intermediate(fields, "shared_expert_intermediate_size", 5632);
  config.moe.shared_gate = true;
  parse_dense_layers(fields, &config);
  return config;
}

ModelConfig parse_qwen3_moe(Fields& fields) {
  CommonDefaults defaults{.vocab_size = 151936,
                          .hidden_size = 2048,
                          .num_layers = 24,
                          .num_heads = 32,
                          .num_kv_heads = 4,
                          .max_positions = 32768,
                          .window_flag = true};
  ModelConfig config = parse_common(fields, defaults);
  config.dense_intermediate_size = parse_intermediate(fields, "intermediate_size", 6144);
  config.attention.qkv_bias = config.attention.output_bias = fields.boolean("attention_bias", false);
  config.attention.qk_norm = AttentionConfig::QkNorm::kPerHead;
  parse_moe(fields, {.intermediate_size = 768, .num_experts = 128, .top_k = 8}, &config);
  parse_dense_layers(fields, &config);
  return config;
}

ModelConfig parse_olmoe(Fields& fields) {
  CommonDefaults defaults{.vocab_size = 50304,
                          .hidden_size = 2048,
                          .num_layers = 16,
                          .num_heads = 16,
                          .max_positions = 4096,
                          .rms_norm_eps = 1e-5,
                          .eos_token_id = 50279};
  ModelConfig config = parse_common(fields, defaults);
  config.attention.qkv_bias = config.attention.output_bias = fields.boolean("attention_bias", false);
  config.attention.qk_norm = AttentionConfig::QkNorm::kWhole;
  if (fields.find("clip_qkv") != nullptr) {
    config.attention.clip_qkv = static_cast<float>(fields.number("clip_qkv", 1.0, 1e-6, 1e30));
  }
  parse_moe(fields, {.intermediate_key = "intermediate_size", .intermediate_size = 2048, .num_experts = 64, .top_k = 8},
            &config);
  if (config.moe.num_experts == 0) fields.refuse("num_experts", "at least 1");
  return config;
}

ModelConfig parse_llama(Fields& fields) {
  ModelConfig config = parse_common(fields, {.eos_token_id = 2});
  config.dense_intermediate_size = parse_intermediate(fields, "intermediate_size", 11008);
  config.attention.qkv_bias = config.attention.output_bias = fields.boolean("attention_bias", false);
  if (fields.boolean("mlp_bias", false)) fields.refuse("mlp_bias", "false: biases in the FFN are not supported");
  return config;
}

ModelConfig parse_qwen3(Fields& fields) {
  CommonDefaults defaults{
      .vocab_size = 151936, .num_kv_heads = 32, .head_dim = 128, .max_positions = 32768, .window_flag = true};
  ModelConfig config = parse_common(fields, defaults);
  config.dense_intermediate_size = parse_intermediate(fields, "intermediate_size", 22016);
  config.attention.qkv_bias = config.attention.output_bias = fields.boolean("attention_bias", false);
  config.attention.qk_norm = AttentionConfig::QkNorm::kPerHead;
  return config;
}

// One row an architecture: what config.json calls it, how its fields and tensors are read.
struct Architecture {
  const char* name;
  ModelConfig (*parse)(Fields&);
  TensorNames (*names)();
};

constexpr Architecture kArchitectures[] = {
    {"MixtralForCausalLM", parse_mixtral, mixtral_names},     {"Qwen2MoeForCausalLM", parse_qwen2_moe, qwen_moe_names},
    {"Qwen3MoeForCausalLM", parse_qwen3_moe, qwen_moe_names}, {"OlmoeForCausalLM", parse_olmoe, qwen_moe_names},
    {"LlamaForCausalLM", parse_llama, llama_names},           {"Qwen3ForCausalLM", parse_qwen3, llama_names},
};

std::string listed_architectures() {
  std::string list;
  for (const Architecture& known : kArchitectures) list += (list.empty() ? "" : ", ") + std::string(known.name);
  return list;
}

StatusOr<const Architecture*> find_architecture(const Json& config) {
  const auto found = config.find("architectures");
  if (found == config.end() || !found->is_array() || found->size() != 1 || !(*found)[0].is_string()) {
    return invalid_argument("config.json: architectures is " + (found == config.end() ? "absent" : shown(*found)) +
                            ", want a list of one of " + listed_architectures());
  }
  for (const Architecture& known : kArchitectures) {
    if ((*found)[0] == known.name) return &known;
  }
  return invalid_argument("config.json: unknown architecture " + shown((*found)[0]) + ", known are " +
                          listed_architectures());
}

}  // namespace

std::vector<std::string> known_architectures() {
  std::vector<std::string> names;
  for (const Architecture& known : kArchitectures) names.emplace_back(known.name);
  return names;
}

StatusOr<Model> parse_model_config(std::string_view config_json, std::string_view generation_config_json) {
  MOED_ASSIGN_OR_RETURN(const Json json, parse_json(config_json, "config.json"));
  if (!json.is_object()) return invalid_argument("config.json: not an object");
  MOED_ASSIGN_OR_RETURN(const Architecture* const architecture, find_architecture(json));
  Fields fields(json, "config.json");
  Model model;
  model.config = architecture->parse(fields);
  model.config.architecture = architecture->name;
  finish_config(fields, &model.config);
  MOED_RETURN_IF_ERROR(fields.status());
  model.names = architecture->names();
  model.generation.eos_token_ids = model.config.eos_token_ids;
  if (generation_config_json.empty()) return model;
  MOED_ASSIGN_OR_RETURN(const Json generation, parse_json(generation_config_json, "generation_config.json"));
  if (!generation.is_object()) return invalid_argument("generation_config.json: not an object");
  Fields generation_fields(generation, "generation_config.json");
  model.generation = parse_generation(generation_fields, model.config);
  MOED_RETURN_IF_ERROR(generation_fields.status());
  return model;
}

StatusOr<Model> load_model_config(const std::string& model_dir) {
  MOED_ASSIGN_OR_RETURN(const std::string config, read_text_file(model_dir + "/config.json", kConfigBytesMax));
  const std::string generation_path = model_dir + "/generation_config.json";
  std::string generation;
  if (std::error_code error; std::filesystem::exists(generation_path, error)) {
    MOED_ASSIGN_OR_RETURN(generation, read_text_file(generation_path, kConfigBytesMax));
  }
  return parse_model_config(config, generation);
}

}  // namespace moed
