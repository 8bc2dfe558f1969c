#include "model/parse.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

namespace moed {
namespace {

// Far beyond any published model, near enough that no product of them overflows 64 bits.
constexpr int64_t kHiddenMax = 1 << 17;
constexpr int64_t kIntermediateMax = 1 << 20;
constexpr int64_t kLayersMax = 1024;
constexpr int64_t kVocabMax = 1 << 22;
constexpr int64_t kHeadsMax = 4096;
constexpr int64_t kHeadDimMax = 1024;
constexpr int64_t kExpertsMax = 4096;
constexpr int64_t kPositionsMax = 1 << 24;
constexpr int64_t kQkvRowsMax = 1 << 20;
constexpr double kParametersMax = 1e14;

void refuse_unsupported(Fields& fields, const ModelConfig& config, bool window_flag) {
  if (fields.find("quantization_config") != nullptr) {
    const Json& quantization = *fields.find("quantization_config");
    const bool named = quantization.is_object() && quantization.contains("quant_method");
    fields.refuse("quantization_config" + (named ? " (" + shown(quantization["quant_method"]) + ")" : std::string()) +
                  ": quantised checkpoints are not supported, want one in bf16, f16 or f32");
  }
  if (fields.text("hidden_act", "silu") != "silu") fields.refuse("hidden_act", "\"silu\"");
  for (const char* key : {"dtype", "torch_dtype"}) {
    const std::string dtype = fields.text(key, "auto");
    const auto known = {"auto", "bfloat16", "float16", "float32"};
    if (std::find(known.begin(), known.end(), dtype) == known.end()) {
      fields.refuse(key, "\"bfloat16\", \"float16\" or \"float32\"");
    }
  }
  const bool windowed = !window_flag || fields.boolean("use_sliding_window", false);
  const int64_t window = fields.integer("sliding_window", window_flag ? 4096 : 0, 0, int64_t{1} << 40);
  if (windowed && window > 0 && window < config.max_positions) {
    fields.refuse(fmt::format(
        "sliding_window is {} and in use (max_position_embeddings is {}): sliding-window attention is not supported",
        window, config.max_positions));
  }
  if (const Json* types = fields.find("layer_types")) {
    const bool full = types->is_array() && std::all_of(types->begin(), types->end(),
                                                       [](const Json& type) { return type == "full_attention"; });
    if (!full) fields.refuse("layer_types", "only \"full_attention\"");
  }
}

void parse_yarn(Fields& rope, RopeConfig* out) {
  const double factor = out->factor;
  // 0.1 m ln(factor) + 1; with both mscale fields set, a ratio of two of them (DeepSeek's spelling).
  const auto scale = [factor](double m) { return factor <= 1.0 ? 1.0 : 0.1 * m * std::log(factor) + 1.0; };
  const double mscale = rope.number("mscale", 0.0, 0.0, 1e6);
  const double mscale_all_dim = rope.number("mscale_all_dim", 0.0, 0.0, 1e6);
  const double inferred = mscale != 0 && mscale_all_dim != 0 ? scale(mscale) / scale(mscale_all_dim) : scale(1.0);
  out->attention_factor = rope.number("attention_factor", inferred, 0.0, 1e6);
  // A zero means the default, as in transformers.
  out->beta_fast = rope.number("beta_fast", 32.0, 0.0, 1e6);
  out->beta_slow = rope.number("beta_slow", 1.0, 0.0, 1e6);
  if (out->beta_fast == 0) out->beta_fast = 32.0;
  if (out->beta_slow == 0) out->beta_slow = 1.0;
  out->truncate = rope.boolean("truncate", true);
  if (out->theta <= 1.0) rope.refuse("rope_theta must be more than 1 for yarn");
}

void parse_scaling(Fields& fields, Fields& rope, const ModelConfig& config, RopeConfig* out) {
  const std::string type = rope.text("rope_type", rope.text("type", "default"));
  if (type == "default") return;
  // The model's own field wins over the one in the rope's dictionary, as in transformers.
  const int64_t in_rope = rope.integer("original_max_position_embeddings", config.max_positions, 1, kPositionsMax);
  out->original_max_positions = fields.int32("original_max_position_embeddings", in_rope, 1, kPositionsMax);
  double implied = 0;
  if (type == "linear") {
    out->scaling = RopeConfig::Scaling::kLinear;
  } else if (type == "llama3") {
    out->scaling = RopeConfig::Scaling::kLlama3;
    for (const char* key : {"low_freq_factor", "high_freq_factor"}) {
      if (rope.find(key) == nullptr) rope.refuse(key, "a number, because rope_type is llama3");
    }
    out->low_freq_factor = rope.number("low_freq_factor", 1.0, 1e-6, 1e6);
    out->high_freq_factor = rope.number("high_freq_factor", 4.0, 1e-6, 1e6);
    if (out->high_freq_factor <= out->low_freq_factor)
      rope.refuse("high_freq_factor must be more than low_freq_factor");
  } else if (type == "yarn") {
    out->scaling = RopeConfig::Scaling::kYarn;
    implied = static_cast<double>(config.max_positions) / out->original_max_positions;
  } else {
    rope.refuse(fmt::format("rope_type is \"{}\", want default, linear, llama3 or yarn", type.substr(0, 40)));
    return;
  }
  if (implied == 0 && rope.find("factor") == nullptr) rope.refuse("factor", "a number, because rope_type is " + type);
  out->factor = rope.number("factor", implied == 0 ? 1.0 : implied, 1e-3, 1e6);
  if (out->scaling == RopeConfig::Scaling::kYarn) parse_yarn(rope, out);
}

RopeConfig parse_rope(Fields& fields, const ModelConfig& config, double default_theta) {
  RopeConfig out;
  out.rotary_dim = config.attention.head_dim;
  // Two spellings: rope_theta with rope_scaling beside it, or both within rope_parameters. rope_scaling wins, as in
  // transformers.
  const char* key = "rope_scaling";
  if (const Json* scaling = fields.find(key); scaling == nullptr || scaling->empty()) key = "rope_parameters";
  const Json none = Json::object();
  const Json* object = fields.find(key) == nullptr ? &none : fields.find(key);
  if (!object->is_object()) {
    fields.refuse(key, "an object");
    return out;
  }
  Fields rope(*object, fields.where() + ": " + key);
  for (const auto& [name, value] : object->items()) {
    if (value.is_object()) rope.refuse(name + ": rope that differs between layers is not supported");
  }
  constexpr double kThetaMax = 1e15;
  out.theta = rope.number("rope_theta", fields.number("rope_theta", default_theta, 1e-3, kThetaMax), 1e-3, kThetaMax);
  const double partial = fields.number("partial_rotary_factor", 1.0, 0.0, 1.0);
  if (rope.number("partial_rotary_factor", partial, 0.0, 1.0) != 1.0) {
    rope.refuse("partial_rotary_factor is not 1: this architecture turns whole heads");
  }
  parse_scaling(fields, rope, config, &out);
  if (!rope.status().ok() && fields.status().ok())
    fields.refuse(rope.status().message().substr(fields.where().size() + 2));
  return out;
}

// In double: every factor is capped, so the result has no range to overflow.
double parameters(const ModelConfig& config) {
  const double hidden = config.hidden_size;
  double sum = 2.0 * config.vocab_size * hidden;
  for (const LayerKind kind : config.layers) {
    sum += hidden * (2.0 * config.q_size() + 2.0 * config.kv_size());
    if (kind == LayerKind::kDense) {
      sum += 3.0 * hidden * config.dense_intermediate_size;
    } else {
      const MoeConfig& moe = config.moe;
      sum += hidden * (moe.num_experts * (1.0 + 3.0 * moe.intermediate_size) + 3.0 * moe.shared_intermediate_size);
    }
  }
  return sum;
}

void check_attention(Fields& fields, const ModelConfig& config) {
  const AttentionConfig& attention = config.attention;
  if (attention.num_heads % attention.num_kv_heads != 0) {
    fields.refuse(fmt::format("num_attention_heads ({}) is no multiple of num_key_value_heads ({})",
                              attention.num_heads, attention.num_kv_heads));
  }
  if (attention.head_dim % 2 != 0)
    fields.refuse(fmt::format("head_dim is {}, want an even number", attention.head_dim));
  if (int64_t{attention.num_heads + 2 * attention.num_kv_heads} * attention.head_dim > kQkvRowsMax) {
    fields.refuse(fmt::format(
        "num_attention_heads ({}), num_key_value_heads ({}) and head_dim ({}) make more than {} rows of q, k and v",
        attention.num_heads, attention.num_kv_heads, attention.head_dim, kQkvRowsMax));
  }
  if (attention.qk_norm == AttentionConfig::QkNorm::kWhole && config.q_size() != config.hidden_size) {
    fields.refuse(fmt::format("num_attention_heads * head_dim is {}, want hidden_size ({})", config.q_size(),
                              config.hidden_size));
  }
}

}  // namespace

int32_t parse_intermediate(Fields& fields, const char* key, int64_t fallback) {
  return fields.int32(key, fallback, 1, kIntermediateMax);
}

ModelConfig parse_common(Fields& fields, const CommonDefaults& defaults) {
  ModelConfig config;
  config.hidden_size = fields.int32("hidden_size", defaults.hidden_size, 1, kHiddenMax);
  config.num_layers = fields.int32("num_hidden_layers", defaults.num_layers, 1, kLayersMax);
  config.vocab_size = fields.int32("vocab_size", defaults.vocab_size, 1, kVocabMax);
  config.max_positions = fields.int32("max_position_embeddings", defaults.max_positions, 1, kPositionsMax);
  config.rms_norm_eps = static_cast<float>(fields.number("rms_norm_eps", defaults.rms_norm_eps, 0.0, 1.0));
  config.tied_embeddings = fields.boolean("tie_word_embeddings", false);
  config.layers.assign(config.num_layers, LayerKind::kDense);

  AttentionConfig& attention = config.attention;
  attention.num_heads = fields.int32("num_attention_heads", defaults.num_heads, 1, kHeadsMax);
  // A null means one KV head a head even where absence means another number.
  const bool null_heads = fields.contains("num_key_value_heads") && fields.find("num_key_value_heads") == nullptr;
  const int64_t kv_default = null_heads || defaults.num_kv_heads == 0 ? attention.num_heads : defaults.num_kv_heads;
  attention.num_kv_heads = fields.int32("num_key_value_heads", kv_default, 1, kHeadsMax);
  if (fields.find("head_dim") == nullptr && defaults.head_dim == 0 && config.hidden_size % attention.num_heads != 0) {
    fields.refuse(fmt::format("hidden_size ({}) is no multiple of num_attention_heads ({}), and there is no head_dim",
                              config.hidden_size, attention.num_heads));
  }
  const int64_t derived = std::max(1, config.hidden_size / attention.num_heads);
  attention.head_dim = fields.int32("head_dim", defaults.head_dim == 0 ? derived : defaults.head_dim, 1, kHeadDimMax);
  attention.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(attention.head_dim)));

  config.rope = parse_rope(fields, config, defaults.rope_theta);
  if (config.rope.scaling == RopeConfig::Scaling::kYarn) {
    // Qwen's model cards have rope_scaling added and max_position_embeddings left as it was; vLLM's max_model_len is
    // this product too. Never less than what the checkpoint names itself.
    const double stretched = config.rope.original_max_positions * config.rope.factor;
    const double capped = std::min(stretched, static_cast<double>(kPositionsMax));
    config.max_positions = std::max(config.max_positions, static_cast<int32_t>(capped));
  }
  config.eos_token_ids = parse_eos(
      fields, defaults.eos_token_id < 0 ? std::vector<int32_t>{} : std::vector<int32_t>{defaults.eos_token_id});
  refuse_unsupported(fields, config, defaults.window_flag);
  return config;
}

void parse_moe(Fields& fields, const MoeDefaults& defaults, ModelConfig* config) {
  MoeConfig& moe = config->moe;
  // transformers knows the number of experts by two names and writes either.
  const int64_t num_experts = fields.integer("num_local_experts", defaults.num_experts, 0, kExpertsMax);
  moe.num_experts = fields.int32("num_experts", num_experts, 0, kExpertsMax);
  if (fields.find("num_local_experts") != nullptr && moe.num_experts != num_experts) {
    fields.refuse(fmt::format("num_experts is {} but num_local_experts is {}", moe.num_experts, num_experts));
  }
  if (moe.num_experts == 0) return;
  moe.intermediate_size = parse_intermediate(fields, defaults.intermediate_key, defaults.intermediate_size);
  moe.router.top_k = fields.int32("num_experts_per_tok", defaults.top_k, 1, kExpertsMax);
  if (moe.router.top_k > moe.num_experts) {
    fields.refuse(fmt::format("num_experts_per_tok is {}, want at most the number of experts ({})", moe.router.top_k,
                              moe.num_experts));
  }
  moe.router.renormalize = fields.boolean("norm_topk_prob", false);
  config->layers.assign(config->num_layers, LayerKind::kMoe);
}

void parse_dense_layers(Fields& fields, ModelConfig* config) {
  if (config->moe.num_experts == 0) return;
  const int64_t step = fields.integer("decoder_sparse_step", 1, 1, int64_t{1} << 31);
  for (int64_t layer = 0; layer < config->num_layers; ++layer) {
    if ((layer + 1) % step != 0) config->layers[layer] = LayerKind::kDense;
  }
  const Json* only = fields.find("mlp_only_layers");
  if (only == nullptr) return;
  const std::string wanted = fmt::format("a list of layers below {}", config->num_layers);
  if (!only->is_array()) return fields.refuse("mlp_only_layers", wanted);
  for (const Json& layer : *only) {
    if (!layer.is_number_unsigned() || layer.get<uint64_t>() >= static_cast<uint64_t>(config->num_layers)) {
      return fields.refuse("mlp_only_layers", wanted);
    }
    config->layers[layer.get<size_t>()] = LayerKind::kDense;
  }
}

void finish_config(Fields& fields, ModelConfig* config) {
  if (std::find(config->layers.begin(), config->layers.end(), LayerKind::kMoe) == config->layers.end())
    config->moe = {};
  if (!fields.status().ok()) return;
  check_attention(fields, *config);
  if (const double count = parameters(*config); count > kParametersMax) {
    fields.refuse(fmt::format("its sizes make {:.3g} weights, want at most {:.3g}", count, kParametersMax));
  }
  std::erase_if(config->eos_token_ids, [&](int32_t id) { return id >= config->vocab_size; });
}

std::vector<int32_t> parse_eos(Fields& fields, std::vector<int32_t> fallback) {
  const Json* value = fields.find("eos_token_id");
  if (value == nullptr) return fallback;
  const Json list = value->is_array() ? *value : Json::array({*value});
  std::vector<int32_t> ids;
  for (const Json& id : list) {
    if (!id.is_number_integer()) {
      fields.refuse("eos_token_id", "an integer or a list of integers");
      return fallback;
    }
    // Negative ids are how some say "none".
    const bool possible = id.is_number_unsigned() && id.get<uint64_t>() < static_cast<uint64_t>(kVocabMax);
    if (possible) ids.push_back(id.get<int32_t>());
  }
  return ids;
}

GenerationDefaults parse_generation(Fields& fields, const ModelConfig& config) {
  constexpr double kNumberMax = 1e6;
  GenerationDefaults out;
  // What a request could not ask for is for the server to bring into range: checkpoints come with all sorts of numbers.
  // do_sample is not read: like vLLM, a server takes the numbers that are given and lets each request decide.
  out.temperature = fields.number("temperature", 1.0, 0.0, kNumberMax);
  out.top_p = fields.number("top_p", 1.0, 0.0, kNumberMax);
  out.top_k = std::max(0, fields.int32("top_k", 0, -1, INT32_MAX));
  out.min_p = fields.number("min_p", 0.0, 0.0, kNumberMax);
  out.repetition_penalty = fields.number("repetition_penalty", 1.0, 0.0, kNumberMax);
  out.eos_token_ids = parse_eos(fields, config.eos_token_ids);
  std::erase_if(out.eos_token_ids, [&](int32_t id) { return id >= config.vocab_size; });
  return out;
}

}  // namespace moed
