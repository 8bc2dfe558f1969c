#include "server/backend.h"

#include <memory>
#include <sstream>

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

TEST(MachineMemory, IsWhatThisMachineHas) {
  const MachineMemory memory = machine_memory();
  EXPECT_GT(memory.host_free_bytes, 0);
  EXPECT_LT(memory.host_free_bytes, int64_t{1} << 50);
  EXPECT_TRUE(memory.source == "MemAvailable" || memory.source == "cgroup memory.max") << memory.source;
}

}  // namespace
}  // namespace moed
