// config.json, and after a zero byte generation_config.json: what is taken is of sizes that the engine can count with.
#include <cmath>

#include "model/architectures.h"
#include "model/required_tensors.h"
#include "model/rope.h"
#include "tests/fuzz/fuzz.h"

namespace moed {
namespace {

constexpr int64_t kTensorsMax = 5000;

void check_sizes(const ModelConfig& config) {
  const AttentionConfig& attention = config.attention;
  MOED_CHECK(config.hidden_size > 0 && config.vocab_size > 0 && config.num_layers > 0) << "an empty model";
  MOED_CHECK(config.max_positions > 0 && config.layers.size() == static_cast<size_t>(config.num_layers)) << "layers";
  MOED_CHECK(attention.num_kv_heads > 0 && attention.num_heads % attention.num_kv_heads == 0) << "heads";
  MOED_CHECK(config.q_size() > 0 && config.kv_size() > 0 && config.kv_bytes_per_token() > 0) << "KV";
  MOED_CHECK(std::isfinite(attention.scale) && std::isfinite(config.rms_norm_eps)) << "scale";
  MOED_CHECK(config.rope.rotary_dim >= 0 && config.rope.rotary_dim <= attention.head_dim) << "rotary_dim";
  for (const double frequency : rope_frequencies(config.rope)) MOED_CHECK(std::isfinite(frequency)) << "rope";
  for (const int32_t id : config.eos_token_ids) MOED_CHECK(id >= 0 && id < config.vocab_size) << "eos " << id;
  const MoeConfig& moe = config.moe;
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    if (config.layers[layer] == LayerKind::kDense) {
      MOED_CHECK(config.dense_intermediate_size > 0) << "a dense layer of nothing";
    } else {
      MOED_CHECK(moe.num_experts > 0 && moe.intermediate_size > 0) << "experts of nothing";
      MOED_CHECK(moe.router.top_k > 0 && moe.router.top_k <= moe.num_experts) << "top_k " << moe.router.top_k;
    }
  }
}

void check_defaults(const GenerationDefaults& defaults) {
  MOED_CHECK(defaults.temperature >= 0 && std::isfinite(defaults.temperature)) << "temperature";
  MOED_CHECK(defaults.top_p >= 0 && std::isfinite(defaults.top_p)) << "top_p";
  MOED_CHECK(defaults.min_p >= 0 && std::isfinite(defaults.min_p) && defaults.top_k >= 0) << "min_p, top_k";
  MOED_CHECK(defaults.repetition_penalty >= 0 && std::isfinite(defaults.repetition_penalty)) << "repetition_penalty";
}

void check_tensors_of(const Model& model) {
  if (int64_t{model.config.num_layers} * (12 + 3 * int64_t{model.config.moe.num_experts}) > kTensorsMax) return;
  for (const RequiredTensor& tensor : required_tensors(model)) {
    int64_t elements = 1;
    for (const int64_t size : tensor.shape) {
      MOED_CHECK(size > 0 && !__builtin_mul_overflow(elements, size, &elements)) << tensor.name;
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text = input_text(data, size);
  const size_t cut = text.find('\0');
  const std::string_view generation = cut == std::string_view::npos ? "{}" : text.substr(cut + 1);
  const auto model = parse_model_config(text.substr(0, cut), generation);
  if (!model.ok()) {
    check_refusal(model.status());
    return 0;
  }
  check_sizes(model->config);
  check_defaults(model->generation);
  check_tensors_of(*model);
  return 0;
}

}  // namespace moed
