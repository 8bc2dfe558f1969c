#include "offload/expert_store.h"

#include <cstring>

#include <gtest/gtest.h>

#include "tests/model/checkpoint_writer.h"
#include "tests/offload/fake_device.h"

namespace moed {
namespace {

Model small_model(const std::string& architecture, const std::string& more) {
  StatusOr<Model> model =
      parse_model_config(R"({"architectures": [")" + architecture + R"("], "hidden_size": 20, "intermediate_size": 40,
    "moe_intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "num_experts": 5, "num_experts_per_tok": 2, "vocab_size": 30)" +
                             more + "}",
                         "");
  MOED_CHECK(model.ok()) << model.status().message();
  return std::move(model).value();
}

void expect_tensor(const Bf16* found, const TensorSource& source, const std::string& name, size_t elements) {
  std::vector<Bf16> want(elements);
  ASSERT_TRUE(source.read(name, std::span(want)).ok()) << name;
  for (size_t i = 0; i < elements; ++i) ASSERT_EQ(found[i], want[i]) << name << " " << i;
}

TEST(ExpertStore, HoldsEachExpertAsOneBlob) {
  // A blob of 3 * 20 * 12 * 2 = 1440 bytes is no multiple of a cache line; layer 2 has no experts.
  const Model model = small_model("Qwen3MoeForCausalLM", R"(, "mlp_only_layers": [2])");
  const auto source = dummy_weights(model, 5);
  int64_t progressed = 0;
  const StatusOr<ExpertStore> store = ExpertStore::load(model, *source, [&](int64_t bytes) { progressed += bytes; });
  ASSERT_TRUE(store.ok()) << store.status().message();
  EXPECT_EQ(store->shape(), (BlobShape{.hidden = 20, .intermediate = 12}));
  EXPECT_EQ(progressed, 3 * 5 * store->shape().bytes());
  EXPECT_GE(store->bytes(), progressed);
  for (const int32_t layer : {0, 1, 3}) {
    for (int32_t expert = 0; expert < 5; ++expert) {
      const BlobView blob = store->blob({layer, expert});
      EXPECT_EQ(reinterpret_cast<uintptr_t>(blob.data) % 64, 0U);
      const std::string at = "model.layers." + std::to_string(layer) + ".mlp.experts." + std::to_string(expert) + ".";
      expect_tensor(blob.gate(), *source, at + "gate_proj.weight", 240);
      expect_tensor(blob.up(), *source, at + "up_proj.weight", 240);
      expect_tensor(blob.down(), *source, at + "down_proj.weight", 240);
    }
  }
}

TEST(ExpertStore, MixtralsW3IsUpAndW2IsDown) {
  const Model model = small_model("MixtralForCausalLM", "");
  const auto dummy = dummy_weights(model, 5);
  TemporaryFolder folder;
  write_file(folder.file("model.safetensors"), safetensors_bytes(written_tensors(*dummy)));
  const auto source = open_checkpoint(folder.path());
  ASSERT_TRUE(source.ok()) << source.status().message();
  const StatusOr<ExpertStore> store = ExpertStore::load(model, **source, {});
  ASSERT_TRUE(store.ok()) << store.status().message();
  const std::string at = "model.layers.3.block_sparse_moe.experts.4.";
  expect_tensor(store->blob({3, 4}).gate(), *dummy, at + "w1.weight", 800);
  expect_tensor(store->blob({3, 4}).up(), *dummy, at + "w3.weight", 800);
  expect_tensor(store->blob({3, 4}).down(), *dummy, at + "w2.weight", 800);
}

TEST(ExpertStore, IsPinnedPieceByPieceAsItIsRead) {
  const Model model = small_model("Qwen3MoeForCausalLM", R"(, "mlp_only_layers": [2])");
  const auto source = dummy_weights(model, 5);
  FakeDevice device({}, open_device("cpu", {.num_threads = 1}).value());
  HostPins pins(device, 4000);
  {
    int64_t progressed = 0;
    const auto store = ExpertStore::load(
        model, *source, [&](int64_t bytes) { progressed += bytes; }, &pins);
    ASSERT_TRUE(store.ok()) << store.status().message();
    EXPECT_EQ(progressed, 15 * store->shape().bytes());
    // 15 experts, two in a piece, each on its own cache lines.
    ASSERT_EQ(device.pins().size(), 8U);
    EXPECT_EQ(pins.bytes(), store->blobs_bytes());
    for (const int32_t layer : {0, 1, 3}) {
      for (int32_t expert = 0; expert < 5; ++expert) {
        EXPECT_TRUE(pins.covers(store->blob({layer, expert}).data, store->shape().bytes()));
      }
    }
    const auto unpinned = ExpertStore::load(model, *source, {});
    const BlobView blob = unpinned->blob({3, 4});
    EXPECT_EQ(std::memcmp(store->blob({3, 4}).data, blob.data, static_cast<size_t>(blob.shape.bytes())), 0);
  }
}

// The last layer's experts have other names than the rest: the pieces before them are read and pinned by then.
TEST(ExpertStore, NothingStaysPinnedOfWeightsThatCannotBeRead) {
  const Model model = small_model("Qwen3MoeForCausalLM", "");
  std::vector<WrittenTensor> tensors = written_tensors(*dummy_weights(model, 5));
  for (WrittenTensor& tensor : tensors) {
    if (tensor.name.find("layers.3.mlp.experts.4.") != std::string::npos) tensor.name += ".elsewhere";
  }
  TemporaryFolder folder;
  write_file(folder.file("model.safetensors"), safetensors_bytes(tensors));
  const auto source = open_checkpoint(folder.path()).value();
  FakeDevice device({}, open_device("cpu", {.num_threads = 1}).value());
  HostPins pins(device, 4000);
  int64_t progressed = 0;
  const auto store = ExpertStore::load(
      model, *source, [&](int64_t bytes) { progressed += bytes; }, &pins);
  ASSERT_FALSE(store.ok());
  EXPECT_GT(progressed, 4000);
  EXPECT_EQ(pins.bytes(), 0);
  EXPECT_TRUE(device.pins().empty());
}

TEST(ExpertStore, OfADenseModelIsEmpty) {
  const Model model = small_model("LlamaForCausalLM", "");
  const StatusOr<ExpertStore> store = ExpertStore::load(model, *dummy_weights(model, 5), {});
  ASSERT_TRUE(store.ok()) << store.status().message();
  EXPECT_EQ(store->bytes(), 0);
}

TEST(ExpertStore, NamesATensorThatIsMissing) {
  const Model model = small_model("MixtralForCausalLM", "");
  Model wrong = model;
  wrong.names.expert_up = "model.layers.{l}.elsewhere.{e}";
  const StatusOr<ExpertStore> store = ExpertStore::load(wrong, *dummy_weights(model, 5), {});
  ASSERT_FALSE(store.ok());
  EXPECT_NE(store.status().message().find("tensor model.layers.0.elsewhere."), std::string::npos)
      << store.status().message();
}

TEST(ExpertStoreDeathTest, AnExpertThatIsNot) {
  const Model model = small_model("Qwen3MoeForCausalLM", R"(, "mlp_only_layers": [2])");
  const StatusOr<ExpertStore> store = ExpertStore::load(model, *dummy_weights(model, 5), {});
  ASSERT_TRUE(store.ok());
  EXPECT_DEATH(store->blob({2, 0}), "layer 2, expert 0");
  EXPECT_DEATH(store->blob({0, 5}), "layer 0, expert 5");
  EXPECT_DEATH(store->blob({4, 0}), "layer 4, expert 0");
}

}  // namespace
}  // namespace moed
