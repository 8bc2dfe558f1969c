#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "model/config.h"
#include "model/tensor_source.h"

namespace moed {

// Names of a checkpoint's tensors; "{l}" stands for the layer, "{e}" for the expert. Empty: the architecture has none.
struct TensorNames {
  std::string embedding, final_norm, head;
  std::string attention_norm, q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm;
  std::string ffn_norm;
  std::string dense_gate, dense_up, dense_down;
  std::string router, router_correction;
  std::string expert_gate, expert_up, expert_down;
  std::string shared_gate, shared_up, shared_down, shared_router;
};

// The fields of generation_config.json that are defaults of requests; absent fields keep OpenAI's.
// Each finite and not negative; what a request may ask for is narrower.
struct GenerationDefaults {
  double temperature = 1.0;
  double top_p = 1.0;
  int32_t top_k = 0;
  double min_p = 0.0;
  double repetition_penalty = 1.0;
  std::vector<int32_t> eos_token_ids;  // of generation_config.json, or else of config.json
};

struct Model {
  ModelConfig config;
  TensorNames names;
  GenerationDefaults generation;
};

// Reads config.json and generation_config.json of a folder. Refuses by name: unknown architectures (listing the known),
// quantization_config, sliding windows in use, unknown rope kinds, absurd sizes. Errors: kInvalidArgument naming file
// and field.
StatusOr<Model> load_model_config(const std::string& model_dir);
// The same from text, for tests and fuzzing.
StatusOr<Model> parse_model_config(std::string_view config_json, std::string_view generation_config_json);

std::vector<std::string> known_architectures();

// Checks that the source has each tensor that the model needs, in the right shape, before memory is taken. Errors name
// tensor, found, wanted. Returns how many tensors the model has no use for (one warning).
StatusOr<int64_t> check_tensors(const Model& model, const TensorSource& source);

// Seeded random weights in the shapes that the model wants, scaled so that activations stay near 1: for benchmarks and
// tests without a checkpoint.
std::unique_ptr<TensorSource> dummy_weights(const Model& model, uint64_t seed);
// The shapes without contents, for devices that compute nothing.
std::unique_ptr<TensorSource> hollow_weights(const Model& model);

}  // namespace moed
