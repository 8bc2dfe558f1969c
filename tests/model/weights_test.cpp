#include "model/weights.h"

#include <cmath>
#include <cstring>
#include <thread>

#include <gtest/gtest.h>

#include "model/load_tensors.h"
#include "tests/model/checkpoint_writer.h"

namespace moed {
namespace {

Model small_model(const std::string& architecture, const std::string& more = "") {
  const std::string config = R"({"architectures": [")" + architecture +
                             R"("], "hidden_size": 48, "intermediate_size": 40,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 5, "num_experts_per_tok": 2, "vocab_size": 77)" +
                             more + "}";
  StatusOr<Model> model = parse_model_config(config, "");
  MOED_CHECK(model.ok()) << model.status().message();
  return std::move(model).value();
}

std::vector<float> tensor(const TensorSource& source, const std::string& name) {
  const std::vector<int64_t>* shape = source.shape(name);
  EXPECT_NE(shape, nullptr) << name;
  if (shape == nullptr) return {};
  size_t elements = 1;
  for (const int64_t size : *shape) elements *= static_cast<size_t>(size);
  std::vector<float> out(elements);
  EXPECT_TRUE(source.read(name, std::span(out)).ok());
  return out;
}

// The tensors named, one after another, are what lies at `found`.
template <class T>
void expect_at(const T* found, const TensorSource& source, const std::vector<std::string>& names) {
  ASSERT_NE(found, nullptr) << names[0];
  size_t at = 0;
  for (const std::string& name : names) {
    for (const float want : tensor(source, name)) ASSERT_EQ(static_cast<float>(found[at++]), want) << name;
  }
}

TEST(DummyWeights, AreDeterministicAndDifferBySeedAndName) {
  const Model model = small_model("MixtralForCausalLM");
  const auto a = dummy_weights(model, 7);
  const auto b = dummy_weights(model, 7);
  const auto c = dummy_weights(model, 8);
  EXPECT_EQ(a->names(), b->names());
  for (const std::string& name : a->names()) EXPECT_EQ(tensor(*a, name), tensor(*b, name)) << name;
  const std::string w1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight";
  EXPECT_NE(tensor(*a, w1), tensor(*c, w1));
  EXPECT_NE(tensor(*a, w1), tensor(*a, "model.layers.0.block_sparse_moe.experts.1.w1.weight"));
  EXPECT_NE(tensor(*a, w1), tensor(*a, "model.layers.1.block_sparse_moe.experts.0.w1.weight"));
  std::vector<float> out(1);
  EXPECT_EQ(a->read("nothing", std::span(out)).message(), "tensor nothing is missing");
  // The same numbers for ever: benchmarks and recorded results rest on them. The sum comes from a second
  // implementation, in Python.
  const std::vector<float> first = tensor(*a, w1);
  double sum = 0;
  for (size_t i = 0; i < first.size(); ++i) sum += first[i] * static_cast<double>(i % 7 + 1);
  EXPECT_NEAR(sum, -4.8634796142578125, 1e-9);
}

TEST(DummyWeights, HaveTheDeviationThatKeepsActivationsNearOne) {
  const Model model = small_model("Qwen2MoeForCausalLM");
  const auto source = dummy_weights(model, 1);
  const auto deviation = [&](const std::string& name) {
    double sum = 0, squares = 0;
    const std::vector<float> values = tensor(*source, name);
    for (const float value : values) sum += value, squares += static_cast<double>(value) * value;
    const double mean = sum / static_cast<double>(values.size());
    return std::pair(mean, std::sqrt(squares / static_cast<double>(values.size()) - mean * mean));
  };
  EXPECT_NEAR(deviation("model.embed_tokens.weight").second, 1.0, 0.05);
  EXPECT_NEAR(deviation("model.layers.1.self_attn.q_proj.weight").second, 1.0 / std::sqrt(48.0), 0.01);
  EXPECT_NEAR(deviation("model.layers.1.self_attn.o_proj.weight").second, 1.0 / std::sqrt(48.0 * 6), 0.01);
  EXPECT_NEAR(deviation("model.norm.weight").first, 1.0, 0.06);
  EXPECT_NEAR(deviation("model.layers.0.self_attn.q_proj.bias").first, 0.0, 0.06);
}

TEST(DummyWeights, AreWhatTheModelNeeds) {
  for (const std::string& name : known_architectures()) {
    for (const char* tied : {"true", "false"}) {
      const Model model = small_model(name, std::string(R"(, "attention_bias": true, "tie_word_embeddings": )") + tied);
      const auto source = dummy_weights(model, 1);
      const StatusOr<int64_t> extra = check_tensors(model, *source);
      ASSERT_TRUE(extra.ok()) << extra.status().message();
      EXPECT_EQ(*extra, 0);
      EXPECT_EQ(source->shape("lm_head.weight") == nullptr, std::string(tied) == "true");
    }
  }
}

TEST(DenseWeights, LieWhereTheViewsSay) {
  const Model model = small_model("Qwen2MoeForCausalLM", R"(, "mlp_only_layers": [1])");
  const auto source = dummy_weights(model, 3);
  int64_t progressed = 0;
  const StatusOr<DenseWeights> weights =
      DenseWeights::load(model, *source, [&](int64_t bytes) { progressed += bytes; });
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  EXPECT_GT(progressed, 0);
  EXPECT_LE(progressed, weights->bytes());
  expect_at(weights->embedding(), *source, {"model.embed_tokens.weight"});
  expect_at(weights->head(), *source, {"lm_head.weight"});
  expect_at(weights->final_norm(), *source, {"model.norm.weight"});
  for (int32_t layer = 0; layer < 3; ++layer) {
    const std::string at = "model.layers." + std::to_string(layer) + ".";
    const LayerWeights& found = weights->layer(layer);
    expect_at(found.attention_norm, *source, {at + "input_layernorm.weight"});
    expect_at(found.qkv, *source,
              {at + "self_attn.q_proj.weight", at + "self_attn.k_proj.weight", at + "self_attn.v_proj.weight"});
    expect_at(found.qkv_bias, *source,
              {at + "self_attn.q_proj.bias", at + "self_attn.k_proj.bias", at + "self_attn.v_proj.bias"});
    expect_at(found.output, *source, {at + "self_attn.o_proj.weight"});
    expect_at(found.ffn_norm, *source, {at + "post_attention_layernorm.weight"});
    EXPECT_EQ(found.output_bias, nullptr);
    EXPECT_EQ(found.q_norm, nullptr);
    EXPECT_EQ(found.router_correction, nullptr);
    if (layer == 1) {
      expect_at(found.ffn, *source,
                {at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight", at + "mlp.down_proj.weight"});
      EXPECT_EQ(found.router, nullptr);
      EXPECT_EQ(found.shared_router, nullptr);
    } else {
      const std::string shared = at + "mlp.shared_expert.";
      expect_at(found.ffn, *source,
                {shared + "gate_proj.weight", shared + "up_proj.weight", shared + "down_proj.weight"});
      expect_at(found.router, *source, {at + "mlp.gate.weight"});
      expect_at(found.shared_router, *source, {at + "mlp.shared_expert_gate.weight"});
    }
    for (const void* start : {static_cast<const void*>(found.qkv), static_cast<const void*>(found.ffn_norm)}) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(start) % 64, 0U);
    }
  }
}

TEST(DenseWeights, QkNormsOutputBiasAndTiedHead) {
  const Model model = small_model("OlmoeForCausalLM", R"(, "attention_bias": true, "tie_word_embeddings": true)");
  const auto source = dummy_weights(model, 3);
  const StatusOr<DenseWeights> weights = DenseWeights::load(model, *source, {});
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  EXPECT_EQ(weights->head(), weights->embedding());
  EXPECT_EQ(source->shape("model.layers.2.self_attn.q_norm.weight")->at(0), 48);
  EXPECT_EQ(source->shape("model.layers.2.self_attn.k_norm.weight")->at(0), 16);
  expect_at(weights->layer(2).q_norm, *source, {"model.layers.2.self_attn.q_norm.weight"});
  expect_at(weights->layer(2).k_norm, *source, {"model.layers.2.self_attn.k_norm.weight"});
  expect_at(weights->layer(2).output_bias, *source, {"model.layers.2.self_attn.o_proj.bias"});
  EXPECT_EQ(weights->layer(2).ffn, nullptr);
}

TEST(DenseWeights, SurviveAMove) {
  const Model model = small_model("Qwen3ForCausalLM");
  const auto source = dummy_weights(model, 3);
  StatusOr<DenseWeights> loaded = DenseWeights::load(model, *source, {});
  ASSERT_TRUE(loaded.ok());
  const DenseWeights weights = std::move(loaded).value();
  expect_at(weights.layer(0).q_norm, *source, {"model.layers.0.self_attn.q_norm.weight"});
  expect_at(weights.layer(2).ffn, *source,
            {"model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight"});
}

// A checkpoint written to disk and read back gives the weights that were written.
TEST(DenseWeights, RoundTripThroughACheckpoint) {
  for (const std::string& name : known_architectures()) {
    SCOPED_TRACE(name);
    const Model model = small_model(name);
    const auto dummy = dummy_weights(model, 11);
    TemporaryFolder folder;
    write_file(folder.file("model.safetensors"), safetensors_bytes(written_tensors(*dummy)));
    const auto source = open_checkpoint(folder.path());
    ASSERT_TRUE(source.ok()) << source.status().message();
    ASSERT_EQ(*check_tensors(model, **source), 0);
    const StatusOr<DenseWeights> a = DenseWeights::load(model, *dummy, {});
    const StatusOr<DenseWeights> b = DenseWeights::load(model, **source, {});
    ASSERT_TRUE(a.ok() && b.ok());
    ASSERT_EQ(a->bytes(), b->bytes());
    // The embedding lies at the arena's begin.
    EXPECT_EQ(std::memcmp(a->embedding(), b->embedding(), static_cast<size_t>(a->bytes())), 0);
  }
}

TEST(CheckTensors, NamesWhatIsMissingOrMisshapen) {
  const Model model = small_model("MixtralForCausalLM");
  const std::vector<WrittenTensor> good = written_tensors(*dummy_weights(model, 1));
  const auto result = [&](const std::vector<WrittenTensor>& tensors) {
    TemporaryFolder folder;
    write_file(folder.file("model.safetensors"), safetensors_bytes(tensors));
    const auto source = open_checkpoint(folder.path());
    EXPECT_TRUE(source.ok()) << source.status().message();
    return check_tensors(model, **source);
  };
  EXPECT_EQ(*result(good), 0);
  for (size_t i = 0; i < good.size(); ++i) {
    std::vector<WrittenTensor> without = good;
    without.erase(without.begin() + static_cast<std::ptrdiff_t>(i));
    const StatusOr<int64_t> missing = result(without);
    ASSERT_FALSE(missing.ok());
    EXPECT_EQ(missing.status().message().find("tensor " + good[i].name + " is missing, want one of shape ["), 0U);
  }
  std::vector<WrittenTensor> changed = good;
  WrittenTensor& norm = changed.back();
  ASSERT_EQ(norm.name, "model.norm.weight");
  norm.shape = {6, 8};
  EXPECT_EQ(result(changed).status().message(),
            "model.safetensors: tensor model.norm.weight has shape [6, 8], want [48]");
  norm = {norm.name, "U16", {48}, norm.data};
  EXPECT_EQ(result(changed).status().message(),
            "model.safetensors: tensor model.norm.weight has dtype U16, want BF16, F16 or F32");
  changed = good;
  changed.push_back({"extra.one", "I64", {1}, "12345678"});
  changed.push_back({"extra.two", "F8_E4M3", {1}, "1"});
  EXPECT_EQ(*result(changed), 2);
}

TEST(LoadTensors, FirstErrorWinsAndAllThreadsEnd) {
  const Model model = small_model("LlamaForCausalLM");
  const auto source = dummy_weights(model, 1);
  std::vector<float> out(48);
  std::vector<TensorLoad> loads(100, {.name = "model.norm.weight", .elements = 48, .fp32 = out.data()});
  for (TensorLoad& load : loads) load.name = "no.such.tensor";
  EXPECT_EQ(load_tensors(*source, loads, {}).message(), "tensor no.such.tensor is missing");
}

TEST(LoadTensors, ProgressAddsUpOnTheCallingThread) {
  const Model model = small_model("LlamaForCausalLM");
  const auto source = dummy_weights(model, 1);
  std::vector<std::vector<float>> out(50, std::vector<float>(48));
  std::vector<TensorLoad> loads;
  for (auto& place : out) loads.push_back({.name = "model.norm.weight", .elements = 48, .fp32 = place.data()});
  int64_t bytes = 0;
  const auto caller = std::this_thread::get_id();
  const Status status = load_tensors(*source, loads, [&](int64_t news) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    EXPECT_GT(news, 0);
    bytes += news;
  });
  EXPECT_TRUE(status.ok());
  EXPECT_EQ(bytes, 50 * 48 * 4);
  EXPECT_EQ(out.front(), out.back());
}

// Shapes of a model that no box here could load; the views lie in one arena, as loaded ones do.
TEST(HollowWeights, TakeAddressesAlone) {
  Model model = parse_model_config(R"({"architectures": ["MixtralForCausalLM"], "hidden_size": 65536,
      "intermediate_size": 14336, "num_hidden_layers": 64, "num_attention_heads": 512, "num_key_value_heads": 512,
      "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000})",
                                   "{}")
                    .value();
  const auto source = hollow_weights(model);
  EXPECT_TRUE(source->hollow());
  const DenseWeights weights = DenseWeights::load(model, *source, {}).value();
  EXPECT_GT(weights.bytes(), int64_t{64} * 4 * 65536 * 65536 * 2);
  const auto* end = reinterpret_cast<const Bf16*>(weights.data() + weights.bytes());
  EXPECT_GT(weights.layer(63).output, weights.layer(0).qkv);
  EXPECT_LT(weights.layer(63).output, end);
}

}  // namespace
}  // namespace moed
