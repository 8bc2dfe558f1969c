#include "server/backend.h"

#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <spdlog/sinks/ostream_sink.h>

#include "base/log.h"
#include "tests/model/checkpoint_writer.h"

namespace moed {
namespace {

// While it lives, the log goes here.
class CapturedLog {
 public:
  CapturedLog() : kept_(spdlog::default_logger()) {
    spdlog::set_default_logger(
        std::make_shared<spdlog::logger>("test", std::make_shared<spdlog::sinks::ostream_sink_mt>(text_)));
  }
  ~CapturedLog() { spdlog::set_default_logger(kept_); }
  int count(const std::string& wanted) const {
    int found = 0;
    const std::string text = text_.str();
    for (size_t at = text.find(wanted); at != std::string::npos; at = text.find(wanted, at + 1)) ++found;
    return found;
  }

 private:
  std::ostringstream text_;
  std::shared_ptr<spdlog::logger> kept_;
};

Model tiny_model() {
  return parse_model_config(R"({"architectures": ["MixtralForCausalLM"], "hidden_size": 32, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
    "num_experts_per_tok": 2, "vocab_size": 64, "max_position_embeddings": 128})",
                            "")
      .value();
}

// The same numbers, spelled in fp32.
void widen(WrittenTensor& tensor) {
  std::string wide;
  for (size_t at = 0; at < tensor.data.size(); at += 2) wide += std::string(2, '\0') + tensor.data.substr(at, 2);
  tensor.data = wide;
  tensor.dtype = "F32";
}

class BackendTest : public testing::Test {
 protected:
  void load(const std::vector<WrittenTensor>& tensors) {
    write_file(folder_.file("model.safetensors"), safetensors_bytes(tensors));
    Settings settings;
    settings.model.path = folder_.path();
    settings.device.threads = 1;
    settings.memory.kv_gib = 0.01;
    settings.scheduler.pass_rows_max = 16;
    int64_t loaded = 0;
    int64_t total = 0;
    const auto backend = load_backend(settings, model_, [&](int64_t now, int64_t all) {
      EXPECT_GE(now, loaded);
      loaded = now;
      total = all;
    });
    ASSERT_TRUE(backend.ok()) << backend.status().message();
    EXPECT_GT(total, 0);
    EXPECT_EQ((*backend)->budget().max_model_len, 128);
  }

  Settings settings_for(const std::string& device) {
    write_file(folder_.file("model.safetensors"), safetensors_bytes(tensors_));
    Settings settings;
    settings.model.path = folder_.path();
    settings.device.device = device;
    settings.device.threads = 1;
    settings.device.deterministic = true;
    settings.memory.kv_gib = 0.01;
    settings.scheduler.pass_rows_max = 16;
    settings.scheduler.sequences_max = 4;
    return settings;
  }
  StatusOr<std::unique_ptr<Backend>> load_with(const Settings& settings) const {
    return load_backend(settings, model_, [](int64_t, int64_t) {});
  }

  const Model model_ = tiny_model();
  std::vector<WrittenTensor> tensors_ = written_tensors(*dummy_weights(model_, 1));
  TemporaryFolder folder_;
};

TEST_F(BackendTest, NothingOddNothingSaid) {
  CapturedLog log;
  load(tensors_);
  EXPECT_EQ(log.count("not used"), 0);
  EXPECT_EQ(log.count("rounded"), 0);
}

TEST_F(BackendTest, UnusedTensorsAreCountedInOneWarning) {
  tensors_.push_back({"model.extra.0", "BF16", {2}, std::string(4, '\0')});
  tensors_.push_back({"model.extra.1", "BF16", {2}, std::string(4, '\0')});
  CapturedLog log;
  load(tensors_);
  EXPECT_EQ(log.count("[warning]"), 1);
  EXPECT_EQ(log.count("2 tensors are not used"), 1);
}

TEST_F(BackendTest, RoundingIsSaidOnce) {
  for (WrittenTensor& tensor : tensors_) widen(tensor);
  CapturedLog log;
  load(tensors_);
  EXPECT_EQ(log.count("[warning]"), 1);
  EXPECT_EQ(log.count("rounded to bf16"), 1);
}

// Two prompts through one pass, planned as the backend says; the tokens that follow.
std::vector<int32_t> next_tokens(Backend& backend, const ModelConfig& config, Pool pool) {
  const std::vector<int32_t> prompts[] = {{1, 7, 22, 9, 40}, {5, 60, 3}};
  const std::vector<int32_t> blocks[] = {{1}, {0}};
  SamplingParams greedy;
  greedy.temperature = 0.0F;
  std::vector<StepSequence> sequences(2);
  StepShape shape;
  std::vector<int64_t> attended_tokens;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const auto num_tokens = static_cast<int32_t>(prompts[i].size());
    sequences[i].id = static_cast<SequenceId>(i + 1);
    sequences[i].tokens = prompts[i];
    sequences[i].num_prompt = sequences[i].num_new = num_tokens;
    sequences[i].pool = pool;
    sequences[i].blocks = blocks[i];
    sequences[i].sampling = &greedy;
    shape.add(0, num_tokens, true);
    attended_tokens.push_back(num_tokens * (num_tokens + 1) / 2);
  }
  const Planning planning = backend.planning();
  const StepPlan plan = planning.policy->plan({.shape = shape,
                                               .attended_tokens = attended_tokens,
                                               .config = config,
                                               .residency = planning.residency,
                                               .rates = planning.rates,
                                               .halves = planning.halves});
  Pass pass = backend.engine().begin(sequences, plan);
  while (backend.engine().advance(pass)) {
  }
  std::vector<int32_t> tokens;
  for (const SequenceOutput& output : backend.engine().finish(std::move(pass)).sequences) {
    tokens.push_back(output.sampled->token);
  }
  return tokens;
}

TEST_F(BackendTest, EveryPlacementGivesTheTokensOfTheCpu) {
  const auto cpu = load_with(settings_for("cpu"));
  ASSERT_TRUE(cpu.ok()) << cpu.status().message();
  const std::vector<int32_t> expected = next_tokens(**cpu, model_.config, Pool::kHost);
  for (const char* policy : {"host", "device", "stream", "hot"}) {
    for (const char* kv : {"host", "device", "split"}) {
      for (const int64_t halves : {1, 2}) {
        SCOPED_TRACE(std::string(policy) + ", KV " + kv + ", halves " + std::to_string(halves));
        Settings settings = settings_for("emulated");
        settings.device.device_memory_gib = 0.03;
        settings.placement.policy = policy;
        settings.placement.kv = kv;
        settings.placement.halves = halves;
        if (policy == std::string("hot")) settings.placement.resident_experts = {"1"};
        const auto backend = load_with(settings);
        ASSERT_TRUE(backend.ok()) << backend.status().message();
        const bool on_device = (*backend)->budget().device.kv_blocks > 0;
        EXPECT_EQ(on_device, kv != std::string("host"));
        EXPECT_EQ(next_tokens(**backend, model_.config, on_device ? Pool::kDevice : Pool::kHost), expected);
        const EngineStats stats = (*backend)->engine().stats();
        EXPECT_EQ(stats.host_expert_rows + stats.device_expert_rows, 2 * 8 * 2);  // layers, rows, experts a row
        EXPECT_EQ(stats.device_expert_rows > 0, policy != std::string("host"));
      }
    }
  }
}

TEST_F(BackendTest, TheSmallestRingServes) {
  Settings settings = settings_for("emulated");
  settings.device.device_memory_gib = 0.03;
  settings.placement.policy = "stream";
  settings.placement.ring_slots = 2;
  const auto backend = load_with(settings);
  ASSERT_TRUE(backend.ok()) << backend.status().message();
  const auto cpu = load_with(settings_for("cpu"));
  EXPECT_EQ(next_tokens(**backend, model_.config, Pool::kHost), next_tokens(**cpu, model_.config, Pool::kHost));
  EXPECT_EQ((*backend)->budget().device.num_slots, 2);
  EXPECT_GE((*backend)->engine().stats().expert_bytes_copied, 8 * 3 * 32 * 24 * 2);  // every expert of both layers
}

TEST_F(BackendTest, HostExpertsArePinnedWhereTheyAreCopied) {
  EXPECT_FALSE((*load_with(settings_for("cpu")))->pins().has_value());
  Settings settings = settings_for("emulated");
  settings.device.device_memory_gib = 0.03;
  settings.placement.ring_slots = 2;
  const CapturedLog log;
  const auto backend = load_with(settings);
  ASSERT_TRUE(backend.ok()) << backend.status().message();
  const std::optional<ExpertPins> pins = (*backend)->pins();
  ASSERT_TRUE(pins.has_value());
  EXPECT_TRUE(pins->all_pinned());
  EXPECT_GE(pins->expert_bytes, 8 * 3 * 32 * 24 * 2);
  EXPECT_EQ(log.count("pinned"), 0);
}

TEST(ExpertPins, ARefusalIsOneLineWithItsArithmetic) {
  ExpertPins pins{.expert_bytes = int64_t{3} << 30, .pinned_bytes = int64_t{3} << 30};
  EXPECT_TRUE(pins.all_pinned());
  EXPECT_EQ(pins.warning(), "");
  pins.pinned_bytes = int64_t{1} << 30;
  pins.refusal = "cannot pin 17179869184 bytes: out of memory";
  EXPECT_FALSE(pins.all_pinned());
  EXPECT_EQ(pins.warning().find("2.00 of 3.00 GiB of experts are not pinned"), 0U) << pins.warning();
  EXPECT_NE(pins.warning().find(pins.refusal), std::string::npos) << pins.warning();
}

TEST_F(BackendTest, PlacementThatCannotBeIsRefusedBeforeWeightsAreLoaded) {
  struct Case {
    std::function<void(Settings&)> spoil;
    const char* param;
    const char* text;
  };
  const Case cases[] = {
      {[](Settings& s) { s.device.device_memory_gib = 0.00001; }, "device.device_memory_gib",
       "too small for the dense weights and one expert"},
      {[](Settings& s) { s.placement.ring_slots = 1; }, "placement.ring_slots", "that pass through need 2"},
      {[](Settings& s) { s.placement.ring_slots = 9; }, "placement.ring_slots", "the model has 8 experts"},
      {[](Settings& s) { s.placement.resident_experts = {"1:4"}; }, "placement.resident_experts", "are 0 to 3"},
      {[](Settings& s) { s.placement.resident_experts = {"2:0"}; }, "placement.resident_experts", "layers are 0 to 1"},
  };
  for (const Case& c : cases) {
    Settings settings = settings_for("emulated");
    settings.device.device_memory_gib = 0.03;
    c.spoil(settings);
    bool loaded = false;
    const auto backend = load_backend(settings, model_, [&](int64_t, int64_t) { loaded = true; });
    ASSERT_FALSE(backend.ok()) << c.text;
    EXPECT_EQ(backend.status().param(), c.param);
    EXPECT_NE(backend.status().message().find(c.text), std::string::npos) << backend.status().message();
    EXPECT_FALSE(loaded);
  }
}

// Its memory is the host's: what both take must be there.
TEST_F(BackendTest, AnEmulatedDeviceLargerThanTheHostIsRefused) {
  const double free_gib = static_cast<double>(machine_memory(0.0).host_free_bytes) / (1 << 30);
  Settings settings = settings_for("emulated");
  settings.device.device_memory_gib = free_gib + 8;
  settings.placement.kv = "device";
  settings.memory.device_kv_gib = free_gib + 2;
  const auto backend = load_with(settings);
  ASSERT_FALSE(backend.ok());
  EXPECT_EQ(backend.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(backend.status().message().find(", emulated device "), std::string::npos) << backend.status().message();
}

TEST_F(BackendTest, ACapAboveTheDevicesMemoryIsSaidAndCapsNothing) {
  for (const double gib : {1000.0, 1.0, 0.0}) {
    Settings settings = settings_for("simulated:" + std::string(MOED_SOURCE_DIR) + "/deploy/machines/rtx4090.toml");
    settings.device.device_memory_gib = gib;
    CapturedLog log;
    const auto backend = load_with(settings);
    ASSERT_TRUE(backend.ok()) << backend.status().message();
    EXPECT_EQ(log.count("device.device_memory_gib is 1000"), gib == 1000.0 ? 1 : 0);
    EXPECT_EQ(log.count("[warning]"), gib == 1000.0 ? 1 : 0);
    EXPECT_EQ((*backend)->budget().device.memory_bytes == int64_t{1} << 30, gib == 1.0);
  }
}

TEST(MachineMemory, IsWhatThisMachineHas) {
  const MachineMemory memory = machine_memory(0.0);
  EXPECT_GT(memory.host_free_bytes, 0);
  EXPECT_LT(memory.host_free_bytes, int64_t{1} << 50);
  EXPECT_TRUE(memory.source == "MemAvailable" || memory.source == "cgroup memory.max") << memory.source;
}

TEST_F(BackendTest, HostMemoryIsWhatTheSettingSays) {
  Settings settings = settings_for("cpu");
  settings.memory.host_memory_gib = 0.25;
  const auto backend = load_with(settings);
  ASSERT_FALSE(backend.ok());
  EXPECT_EQ(backend.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(backend.status().message().find("free 0.2 (memory.host_memory_gib)"), std::string::npos)
      << backend.status().message();
  EXPECT_EQ(machine_memory(1e4).host_free_bytes, int64_t{10000} << 30) << "more than the machine says it has";
}

}  // namespace
}  // namespace moed
