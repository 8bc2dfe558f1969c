#include <cmath>
#include <fstream>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "model/architectures.h"
#include "model/json.h"
#include "tests/model/checkpoint_writer.h"

namespace moed {
namespace {

// A small valid config.json of an architecture with some fields replaced; a value given as JSON, "" removes the field.
std::string config_with(const std::string& architecture, std::vector<std::pair<std::string, std::string>> fields) {
  nlohmann::json config = {{"architectures", {architecture}},
                           {"hidden_size", 64},
                           {"intermediate_size", 96},
                           {"num_hidden_layers", 4},
                           {"num_attention_heads", 4},
                           {"num_key_value_heads", 2},
                           {"vocab_size", 128},
                           {"max_position_embeddings", 4096}};
  for (const auto& [key, value] : fields) {
    if (value.empty()) {
      config.erase(key);
    } else {
      config[key] = nlohmann::json::parse(value);
    }
  }
  return config.dump();
}

ModelConfig parsed(const std::string& text) {
  StatusOr<Model> model = parse_model_config(text, "");
  EXPECT_TRUE(model.ok()) << model.status().message();
  return model.ok() ? model->config : ModelConfig();
}

TEST(Config, DefaultsAreThoseOfTransformers) {
  std::ifstream file(MOED_SOURCE_DIR "/tests/model/default_expected.json");
  const nlohmann::json cases = nlohmann::json::parse(file).at("cases");
  ASSERT_EQ(cases.size(), known_architectures().size());
  for (const nlohmann::json& want : cases) {
    const std::string name = want.at("architecture");
    SCOPED_TRACE(name);
    const ModelConfig config = parsed(R"({"architectures": [")" + name + "\"]}");
    EXPECT_EQ(config.architecture, name);
    EXPECT_EQ(config.hidden_size, want.at("hidden_size"));
    EXPECT_EQ(config.num_layers, want.at("num_hidden_layers"));
    EXPECT_EQ(config.vocab_size, want.at("vocab_size"));
    EXPECT_EQ(config.max_positions, want.at("max_position_embeddings"));
    EXPECT_EQ(config.rms_norm_eps, want.at("rms_norm_eps").get<float>());
    EXPECT_EQ(config.tied_embeddings, want.at("tie_word_embeddings"));
    EXPECT_EQ(config.attention.num_heads, want.at("num_attention_heads"));
    EXPECT_EQ(config.attention.num_kv_heads, want.at("num_key_value_heads"));
    const bool explicit_dim = want.contains("head_dim") && !want.at("head_dim").is_null();
    const int32_t head_dim =
        explicit_dim ? want.at("head_dim").get<int32_t>() : config.hidden_size / config.attention.num_heads;
    EXPECT_EQ(config.attention.head_dim, head_dim);
    EXPECT_EQ(config.rope.rotary_dim, head_dim);
    EXPECT_EQ(config.rope.theta, want.at("rope_parameters").at("rope_theta"));
    EXPECT_EQ(config.rope.scaling, RopeConfig::Scaling::kNone);
    EXPECT_EQ(config.attention.qkv_bias, want.value("qkv_bias", want.value("attention_bias", false)));
    EXPECT_EQ(config.attention.output_bias, want.value("attention_bias", false));
    const nlohmann::json eos = want.at("eos_token_id");
    EXPECT_EQ(config.eos_token_ids, eos.is_null() ? std::vector<int32_t>{} : std::vector<int32_t>{eos.get<int32_t>()});
    EXPECT_EQ(config.moe.num_experts, want.value("num_experts", 0));
    const LayerKind kind = want.contains("num_experts") ? LayerKind::kMoe : LayerKind::kDense;
    EXPECT_EQ(config.layers, std::vector<LayerKind>(config.num_layers, kind));
    if (kind == LayerKind::kDense) {
      EXPECT_EQ(config.dense_intermediate_size, want.at("intermediate_size"));
      continue;
    }
    EXPECT_EQ(config.moe.router.top_k, want.at("num_experts_per_tok"));
    EXPECT_EQ(config.moe.intermediate_size,
              want.value("moe_intermediate_size", want.at("intermediate_size").get<int>()));
    EXPECT_EQ(config.moe.shared_intermediate_size, want.value("shared_expert_intermediate_size", 0));
    // Mixtral has no flag: its router always renormalises.
    EXPECT_EQ(config.moe.router.renormalize, want.value("norm_topk_prob", true));
  }
}

TEST(Config, ReadsMixtral) {
  const ModelConfig config =
      parsed(R"({"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32000})");
  EXPECT_EQ(config.moe.intermediate_size, 14336);
  EXPECT_EQ(config.dense_intermediate_size, 0);
  EXPECT_TRUE(config.moe.router.renormalize);
  EXPECT_EQ(config.moe.router.score, RouterConfig::Score::kSoftmax);
  EXPECT_EQ(config.attention.qk_norm, AttentionConfig::QkNorm::kNone);
  EXPECT_EQ(config.attention.scale, 0.08838834764831845F);
  EXPECT_EQ(config.kv_bytes_per_token(), 2 * 2 * 1024 * 32);
  EXPECT_EQ(config.ffn_choices(0), 2);
}

TEST(Config, ReadsQwen2Moe) {
  const ModelConfig config =
      parsed(R"({"architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
    "moe_intermediate_size": 1408, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "use_sliding_window": false, "vocab_size": 151936})");
  EXPECT_TRUE(config.attention.qkv_bias);
  EXPECT_FALSE(config.attention.output_bias);
  EXPECT_EQ(config.moe.shared_intermediate_size, 5632);
  EXPECT_TRUE(config.moe.shared_gate);
  EXPECT_FALSE(config.moe.router.renormalize);
  EXPECT_EQ(config.ffn_choices(3), 5);
  EXPECT_EQ(config.eos_token_ids, std::vector<int32_t>{151643});
}

TEST(Config, ReadsQwen3Moe) {
  const ModelConfig config =
      parsed(R"({"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "decoder_sparse_step": 1,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
    "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0, "sliding_window": null,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 151936})");
  EXPECT_EQ(config.attention.head_dim, 128);
  EXPECT_EQ(config.q_size(), 4096);
  EXPECT_EQ(config.kv_size(), 512);
  EXPECT_EQ(config.attention.qk_norm, AttentionConfig::QkNorm::kPerHead);
  EXPECT_TRUE(config.moe.router.renormalize);
  EXPECT_EQ(config.moe.shared_intermediate_size, 0);
}

TEST(Config, ReadsOlmoe) {
  const ModelConfig config = parsed(config_with("OlmoeForCausalLM", {{"clip_qkv", "8.0"}, {"norm_topk_prob", "true"}}));
  EXPECT_EQ(config.attention.qk_norm, AttentionConfig::QkNorm::kWhole);
  EXPECT_EQ(config.attention.clip_qkv, 8.0F);
  EXPECT_TRUE(config.moe.router.renormalize);
  EXPECT_TRUE(std::isinf(parsed(config_with("OlmoeForCausalLM", {{"clip_qkv", "null"}})).attention.clip_qkv));
}

TEST(Config, DenseCousins) {
  const ModelConfig llama =
      parsed(config_with("LlamaForCausalLM", {{"attention_bias", "true"}, {"tie_word_embeddings", "true"}}));
  EXPECT_TRUE(llama.attention.qkv_bias && llama.attention.output_bias && llama.tied_embeddings);
  EXPECT_EQ(llama.dense_intermediate_size, 96);
  EXPECT_EQ(llama.moe.num_experts, 0);
  EXPECT_EQ(llama.ffn_choices(0), 1);
  EXPECT_EQ(parsed(config_with("Qwen3ForCausalLM", {})).attention.qk_norm, AttentionConfig::QkNorm::kPerHead);
}

TEST(Config, MixesDenseAndMoeLayers) {
  constexpr LayerKind kDense = LayerKind::kDense;
  constexpr LayerKind kMoe = LayerKind::kMoe;
  EXPECT_EQ(parsed(config_with("Qwen3MoeForCausalLM", {{"decoder_sparse_step", "2"}})).layers,
            (std::vector{kDense, kMoe, kDense, kMoe}));
  EXPECT_EQ(parsed(config_with("Qwen2MoeForCausalLM", {{"mlp_only_layers", "[0, 3]"}})).layers,
            (std::vector{kDense, kMoe, kMoe, kDense}));
  const ModelConfig both =
      parsed(config_with("Qwen2MoeForCausalLM", {{"decoder_sparse_step", "2"}, {"mlp_only_layers", "[1]"}}));
  EXPECT_EQ(both.layers, (std::vector{kDense, kDense, kDense, kMoe}));
  EXPECT_EQ(both.dense_intermediate_size, 96);
}

TEST(Config, NoMoeLayerMeansNoMoe) {
  for (const auto& field : {std::pair("num_experts", "0"), std::pair("decoder_sparse_step", "5"),
                            std::pair("mlp_only_layers", "[0, 1, 2, 3]")}) {
    const ModelConfig config = parsed(config_with("Qwen2MoeForCausalLM", {{field.first, field.second}}));
    EXPECT_EQ(config.layers, std::vector<LayerKind>(4, LayerKind::kDense)) << field.first;
    EXPECT_EQ(config.moe.num_experts, 0);
    EXPECT_EQ(config.moe.shared_intermediate_size, 0);
  }
}

TEST(Config, BothNamesOfTheNumberOfExperts) {
  for (const char* key : {"num_experts", "num_local_experts"}) {
    for (const char* name : {"MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"}) {
      EXPECT_EQ(parsed(config_with(name, {{key, "16"}})).moe.num_experts, 16) << key << name;
    }
  }
}

TEST(Config, BothSpellingsOfDtypeAndAbsentOnes) {
  for (const char* key : {"dtype", "torch_dtype"}) {
    for (const char* dtype : {"\"bfloat16\"", "\"float16\"", "\"float32\"", "null"}) {
      EXPECT_EQ(parsed(config_with("LlamaForCausalLM", {{key, dtype}})).hidden_size, 64);
    }
  }
}

TEST(Config, EosIsANumberAListOrNothing) {
  EXPECT_EQ(parsed(config_with("LlamaForCausalLM", {{"eos_token_id", "[3, 5]"}})).eos_token_ids,
            (std::vector<int32_t>{3, 5}));
  EXPECT_EQ(parsed(config_with("LlamaForCausalLM", {{"eos_token_id", "7"}})).eos_token_ids, std::vector<int32_t>{7});
  // Ids that no model of this vocabulary can say.
  EXPECT_EQ(parsed(config_with("LlamaForCausalLM", {{"eos_token_id", "[-1, 128, 127]"}})).eos_token_ids,
            std::vector<int32_t>{127});
}

TEST(Config, SlidingWindowsThatAreNotInUse) {
  parsed(config_with("MixtralForCausalLM", {{"sliding_window", "4096"}}));
  parsed(config_with("MixtralForCausalLM", {{"sliding_window", "null"}}));
  parsed(config_with("Qwen3MoeForCausalLM", {{"sliding_window", "128"}, {"use_sliding_window", "false"}}));
  parsed(config_with("Qwen3ForCausalLM", {{"sliding_window", "128"}}));
  parsed(config_with("Qwen2MoeForCausalLM", {{"layer_types", R"(["full_attention", "full_attention"])"}}));
}

struct BadConfig {
  const char* architecture;
  const char* key;
  const char* value;
  const char* error;  // a part of the message
};

class BadConfigs : public testing::TestWithParam<BadConfig> {};

TEST_P(BadConfigs, AreRefusedByName) {
  const BadConfig& bad = GetParam();
  const StatusOr<Model> model = parse_model_config(config_with(bad.architecture, {{bad.key, bad.value}}), "");
  ASSERT_FALSE(model.ok()) << bad.key << " " << bad.value;
  EXPECT_EQ(model.status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(model.status().message().find("config.json: "), 0U) << model.status().message();
  EXPECT_NE(model.status().message().find(bad.error), std::string::npos) << model.status().message();
}

constexpr const char* kLlama = "LlamaForCausalLM";
constexpr const char* kMixtral = "MixtralForCausalLM";
constexpr const char* kQwen = "Qwen3MoeForCausalLM";
constexpr const char* kOlmoe = "OlmoeForCausalLM";
INSTANTIATE_TEST_SUITE_P(
    Table, BadConfigs,
    testing::Values(
        BadConfig{kLlama, "architectures", "null", "architectures is null, want a list of one of MixtralForCausalLM"},
        BadConfig{kLlama, "architectures", "", "architectures is absent"},
        BadConfig{kLlama, "architectures", "[]", "architectures is []"},
        BadConfig{kLlama, "architectures", "[\"GPT2LMHeadModel\"]",
                  "unknown architecture \"GPT2LMHeadModel\", known are Mixtral"},
        BadConfig{kLlama, "hidden_size", "0", "hidden_size is 0, want an integer from 1 to 131072"},
        BadConfig{kLlama, "hidden_size", "-64", "hidden_size is -64"},
        BadConfig{kLlama, "hidden_size", "64.5", "hidden_size is 64.5"},
        BadConfig{kLlama, "hidden_size", "\"64\"", "hidden_size is \"64\""},
        BadConfig{kLlama, "hidden_size", "[64]", "hidden_size is [64]"},
        BadConfig{kLlama, "hidden_size", "18446744073709551615", "hidden_size is 18446744073709551615"},
        BadConfig{kLlama, "hidden_size", "1e300", "hidden_size is 1e+300"},
        BadConfig{kLlama, "num_hidden_layers", "1000000", "num_hidden_layers is 1000000"},
        BadConfig{kLlama, "vocab_size", "1000000000", "vocab_size is 1000000000"},
        BadConfig{kLlama, "max_position_embeddings", "0", "max_position_embeddings is 0"},
        BadConfig{kLlama, "rms_norm_eps", "-1e-5", "rms_norm_eps is -1e-05"},
        BadConfig{kLlama, "rms_norm_eps", "\"small\"", "rms_norm_eps is \"small\""},
        BadConfig{kLlama, "num_key_value_heads", "3",
                  "num_attention_heads (4) is no multiple of num_key_value_heads (3)"},
        BadConfig{kLlama, "num_attention_heads", "6", "hidden_size (64) is no multiple of num_attention_heads (6)"},
        BadConfig{kLlama, "head_dim", "17", "head_dim is 17, want an even number"},
        BadConfig{kLlama, "head_dim", "100000", "head_dim is 100000"},
        BadConfig{kLlama, "num_attention_heads", "4096", "hidden_size (64) is no multiple"},
        BadConfig{kLlama, "intermediate_size", "0", "intermediate_size is 0"},
        BadConfig{kLlama, "mlp_bias", "true", "mlp_bias is true, want false"},
        BadConfig{kLlama, "attention_bias", "1", "attention_bias is 1, want true or false"},
        BadConfig{kLlama, "hidden_act", "\"gelu\"", "hidden_act is \"gelu\", want \"silu\""},
        BadConfig{kLlama, "dtype", "\"float8_e4m3fn\"", "dtype is \"float8_e4m3fn\""},
        BadConfig{kLlama, "torch_dtype", "\"int8\"", "torch_dtype is \"int8\""},
        BadConfig{kLlama, "eos_token_id", "\"</s>\"", "eos_token_id is \"</s>\""},
        BadConfig{kLlama, "eos_token_id", "[2, 2.5]", "eos_token_id is [2,2.5]"},
        BadConfig{kLlama, "quantization_config", R"({"quant_method": "gptq", "bits": 4})",
                  "quantization_config (\"gptq\")"},
        BadConfig{kLlama, "quantization_config", "{}", "quantization_config: quantised checkpoints"},
        BadConfig{kMixtral, "sliding_window", "1024", "sliding_window is 1024 and in use"},
        BadConfig{kLlama, "layer_types", R"(["full_attention", "sliding_attention"])", "layer_types"},
        BadConfig{kMixtral, "num_local_experts", "0", "num_local_experts is 0, want at least 1"},
        BadConfig{kMixtral, "num_local_experts", "100000", "num_local_experts is 100000"},
        BadConfig{kMixtral, "num_experts_per_tok", "9",
                  "num_experts_per_tok is 9, want at most the number of experts (8)"},
        BadConfig{kMixtral, "num_experts_per_tok", "0", "num_experts_per_tok is 0"},
        BadConfig{kQwen, "decoder_sparse_step", "0", "decoder_sparse_step is 0"},
        BadConfig{kQwen, "mlp_only_layers", "[4]", "mlp_only_layers is [4], want a list of layers below 4"},
        BadConfig{kQwen, "mlp_only_layers", "[-1]", "mlp_only_layers is [-1]"},
        BadConfig{kQwen, "mlp_only_layers", "3", "mlp_only_layers is 3"},
        BadConfig{kQwen, "num_experts", "4", "num_experts_per_tok is 8, want at most the number of experts (4)"},
        BadConfig{kOlmoe, "clip_qkv", "-1", "clip_qkv is -1"},
        BadConfig{kOlmoe, "head_dim", "32", "num_attention_heads * head_dim is 128, want hidden_size (64)"},
        BadConfig{kLlama, "rope_theta", "0", "rope_theta is 0"},
        BadConfig{kLlama, "rope_theta", "\"big\"", "rope_theta is \"big\""},
        BadConfig{kLlama, "partial_rotary_factor", "0.5", "partial_rotary_factor is not 1"},
        BadConfig{kLlama, "rope_scaling", "[1]", "rope_scaling is [1], want an object"},
        BadConfig{kLlama, "rope_scaling", R"({"type": "dynamic", "factor": 2})",
                  "rope_scaling: rope_type is \"dynamic\", want default, linear, llama3 or yarn"},
        BadConfig{kLlama, "rope_scaling", R"({"rope_type": "longrope"})", "rope_type is \"longrope\""},
        BadConfig{kLlama, "rope_scaling", R"({"rope_type": "mrope"})", "rope_type is \"mrope\""},
        BadConfig{kLlama, "rope_scaling", R"({"rope_type": 3})", "rope_type is 3, want a string"},
        BadConfig{kLlama, "rope_scaling", R"({"rope_type": "linear"})", "rope_scaling: factor is absent"},
        BadConfig{kLlama, "rope_scaling", R"({"rope_type": "linear", "factor": 0})", "rope_scaling: factor is 0"},
        BadConfig{kLlama, "rope_scaling", R"({"rope_type": "llama3", "factor": 8})", "low_freq_factor is absent"},
        BadConfig{kLlama, "rope_parameters",
                  R"({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4})",
                  "rope_parameters: high_freq_factor must be more than low_freq_factor"},
        BadConfig{kLlama, "rope_parameters", R"({"rope_type": "yarn", "factor": 8, "rope_theta": 1})",
                  "rope_theta must be more than 1"},
        BadConfig{kLlama, "rope_parameters", R"({"full_attention": {"rope_type": "default"}})",
                  "full_attention: rope that differs between layers"}));

TEST(Config, ConflictsBetweenFields) {
  const auto error = [](const std::string& text) { return parse_model_config(text, "").status().message(); };
  EXPECT_NE(error(config_with(kQwen, {{"num_experts", "16"}, {"num_local_experts", "32"}}))
                .find("num_experts is 16 but num_local_experts is 32"),
            std::string::npos);
  EXPECT_NE(error(config_with(kQwen, {{"use_sliding_window", "true"}, {"sliding_window", "128"}}))
                .find("sliding_window is 128 and in use"),
            std::string::npos);
  EXPECT_NE(
      error(config_with(kLlama, {{"num_attention_heads", "4096"}, {"head_dim", "1024"}})).find("rows of q, k and v"),
      std::string::npos);
  // Each size within its limit, all together 3e18 weights.
  EXPECT_NE(error(config_with(kMixtral, {{"hidden_size", "131072"},
                                         {"head_dim", "128"},
                                         {"intermediate_size", "1048576"},
                                         {"num_local_experts", "4096"},
                                         {"num_hidden_layers", "1024"}}))
                .find("weights, want at most 1e+14"),
            std::string::npos);
}

// A model card of Qwen's tells to add rope_scaling and says nothing of max_position_embeddings.
TEST(Config, YarnStretchesTheContext) {
  const auto positions = [](const std::string& scaling, const char* own) {
    return parsed(config_with("Qwen3MoeForCausalLM", {{"rope_scaling", scaling}, {"max_position_embeddings", own}}))
        .max_positions;
  };
  const char* qwen = R"({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})";
  EXPECT_EQ(positions(qwen, "40960"), 131072);
  EXPECT_EQ(positions(qwen, "32768"), 131072);
  // What the checkpoint names itself is never cut; without an original length, its own is stretched.
  EXPECT_EQ(positions(qwen, "262144"), 262144);
  EXPECT_EQ(positions(R"({"type": "yarn", "factor": 2.5})", "1001"), 2502);
  EXPECT_EQ(positions(R"({"rope_type": "yarn", "original_max_position_embeddings": 1024})", "4096"), 4096);
  EXPECT_EQ(positions(R"({"rope_type": "yarn", "factor": 1e6})", "4096"), 1 << 24);
  // Others do not stretch.
  EXPECT_EQ(positions(R"({"rope_type": "linear", "factor": 4.0})", "4096"), 4096);
  EXPECT_EQ(
      positions(R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0})", "4096"),
      4096);
}

TEST(Config, TextThatIsNoConfig) {
  const auto error = [](const std::string& text) { return parse_model_config(text, "").status().message(); };
  EXPECT_EQ(error(""), "config.json: not valid JSON at byte 1");
  EXPECT_NE(error("{").find("not valid JSON"), std::string::npos);
  EXPECT_NE(error("{} x").find("not valid JSON"), std::string::npos);
  EXPECT_NE(error("{\"a\": NaN}").find("not valid JSON"), std::string::npos);
  EXPECT_NE(error("{\"a\": 1e999}").find("not valid JSON"), std::string::npos);
  EXPECT_NE(error("{\"a\": \"\xff\"}").find("not valid JSON"), std::string::npos);
  EXPECT_EQ(error("[]"), "config.json: not an object");
  EXPECT_EQ(error("7"), "config.json: not an object");
  EXPECT_EQ(error("{\"a\": 1, \"a\": 2}"), "config.json: the key \"a\" stands twice");
  EXPECT_EQ(error("{\"a\": [{\"b\": 1, \"b\": 2}]}"), "config.json: the key \"b\" stands twice");
  EXPECT_EQ(error(std::string(100000, '[')), "config.json: nested deeper than 32 levels");
  std::string many = "[0";
  for (int64_t i = 0; i < kJsonValuesMax; ++i) many += ",0";
  EXPECT_EQ(error(many + "]"), "config.json: more than 4000000 values");
}

// Whatever a byte is changed to, the parser answers with a model or an error.
TEST(Config, SurvivesChangedBytes) {
  const std::string good = config_with(kQwen, {{"rope_scaling", R"({"rope_type": "yarn", "factor": 4.0})"}});
  int64_t accepted = 0;
  for (size_t at = 0; at < good.size(); ++at) {
    for (const char byte : {'0', '9', '-', '"', '}', '[', 'e', '\0', '\x80'}) {
      std::string text = good;
      text[at] = byte;
      const StatusOr<Model> model = parse_model_config(text, "");
      accepted += model.ok() ? 1 : 0;
      if (model.ok()) continue;
      ASSERT_EQ(model.status().code(), StatusCode::kInvalidArgument) << text;
    }
  }
  EXPECT_GT(accepted, 0);
}

TEST(Generation, TakesTheNumbersThatAreGiven) {
  const std::string config = config_with(kLlama, {{"eos_token_id", "3"}});
  const StatusOr<Model> model =
      parse_model_config(config, R"({"do_sample": false, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05,
                  "repetition_penalty": 1.05, "eos_token_id": [5, 6], "max_new_tokens": 2048, "transformers_version": "4.51.0"})");
  ASSERT_TRUE(model.ok()) << model.status().message();
  const GenerationDefaults& generation = model->generation;
  EXPECT_EQ(generation.temperature, 0.6);
  EXPECT_EQ(generation.top_p, 0.95);
  EXPECT_EQ(generation.top_k, 20);
  EXPECT_EQ(generation.min_p, 0.05);
  EXPECT_EQ(generation.repetition_penalty, 1.05);
  EXPECT_EQ(generation.eos_token_ids, (std::vector<int32_t>{5, 6}));
  EXPECT_EQ(model->config.eos_token_ids, std::vector<int32_t>{3});
}

TEST(Generation, AbsentFieldsKeepTheDefaults) {
  for (const char* text : {"", "{}", R"({"temperature": null, "top_k": -1})"}) {
    const StatusOr<Model> model = parse_model_config(config_with(kLlama, {{"eos_token_id", "3"}}), text);
    ASSERT_TRUE(model.ok()) << model.status().message();
    EXPECT_EQ(model->generation.temperature, 1.0);
    EXPECT_EQ(model->generation.top_p, 1.0);
    EXPECT_EQ(model->generation.top_k, 0);
    EXPECT_EQ(model->generation.eos_token_ids, std::vector<int32_t>{3});
  }
}

// A server brings them within what requests may ask for; a checkpoint that says so can be served.
TEST(Generation, NumbersBeyondARequestsAreTaken) {
  const StatusOr<Model> model = parse_model_config(
      config_with(kLlama, {}), R"({"temperature": 2.5, "top_p": 0, "min_p": 1.5, "repetition_penalty": 0})");
  ASSERT_TRUE(model.ok()) << model.status().message();
  EXPECT_EQ(model->generation.temperature, 2.5);
  EXPECT_EQ(model->generation.top_p, 0.0);
}

TEST(Generation, BadFieldsAreNamed) {
  const std::pair<const char*, const char*> bad[] = {{R"({"temperature": -1})", "temperature is -1"},
                                                     {R"({"top_p": -0.5})", "top_p is -0.5"},
                                                     {R"({"top_k": -2})", "top_k is -2"},
                                                     {R"({"top_k": 2.5})", "top_k is 2.5"},
                                                     {R"({"min_p": "x"})", "min_p is \"x\""},
                                                     {R"({"repetition_penalty": -1})", "repetition_penalty is -1"},
                                                     {R"({"temperature": 1e7})", "temperature is 10000000.0"},
                                                     {R"({"eos_token_id": "x"})", "eos_token_id is \"x\""},
                                                     {"[]", "not an object"},
                                                     {"{", "not valid JSON"}};
  for (const auto& [text, error] : bad) {
    const StatusOr<Model> model = parse_model_config(config_with(kLlama, {}), text);
    ASSERT_FALSE(model.ok()) << text;
    EXPECT_EQ(model.status().message().find("generation_config.json: "), 0U) << model.status().message();
    EXPECT_NE(model.status().message().find(error), std::string::npos) << model.status().message();
  }
}

TEST(Config, FolderIsReadThroughSymlinks) {
  TemporaryFolder blobs, snapshot;
  write_file(blobs.file("0a1b"), config_with(kLlama, {}));
  write_file(blobs.file("2c3d"), R"({"temperature": 0.25})");
  std::filesystem::create_symlink(blobs.file("0a1b"), snapshot.file("config.json"));
  EXPECT_EQ(load_model_config(snapshot.path())->generation.temperature, 1.0);
  std::filesystem::create_symlink(blobs.file("2c3d"), snapshot.file("generation_config.json"));
  EXPECT_EQ(load_model_config(snapshot.path())->generation.temperature, 0.25);
}

TEST(Config, FolderWithoutConfig) {
  TemporaryFolder folder;
  const StatusOr<Model> none = load_model_config(folder.path());
  ASSERT_FALSE(none.ok());
  EXPECT_EQ(none.status().message(), folder.file("config.json") + ": No such file or directory");
  std::filesystem::create_directory(folder.file("config.json"));
  EXPECT_EQ(load_model_config(folder.path()).status().message(), folder.file("config.json") + ": not a regular file");
}

}  // namespace
}  // namespace moed
