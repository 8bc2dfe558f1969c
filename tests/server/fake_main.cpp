// The daemon over FakeEngine: both doors, the scheduler and the text layer as they are, no weights. End-to-end tests of
// the wire run against it.
//   moed_fake serve --model DIR [flags as moed serve]
// FAKE_KV_BLOCKS (default 4096), FAKE_LAYERS (default 2) and FAKE_LAYER_US (default 0) shape the engine; loading stands
// at 400 of 1000 bytes for FAKE_LOAD_MS (default 0).
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "server/scheduling.h"
#include "server/serve.h"
#include "tests/support/fake_engine.h"

namespace {

int64_t from_environment(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoll(value, nullptr, 10);
}

class FakeBackend final : public moed::Backend {
 public:
  FakeBackend(const moed::FakeEngineConfig& config, moed::MemoryBudget budget)
      : engine_(config), budget_(std::move(budget)) {}
  moed::Engine& engine() override { return engine_; }
  const moed::MemoryBudget& budget() const override { return budget_; }
  moed::StepModel prior() const override { return moed::StepModel(100.0, 1.0, 0.0); }
  std::string device_description() const override { return "fake"; }

 private:
  moed::FakeEngine engine_;
  moed::MemoryBudget budget_;
};

moed::StatusOr<std::unique_ptr<moed::Backend>> make_fake(const moed::Settings& settings, const moed::Model& model,
                                                         const moed::LoadProgress& progress) {
  progress(400, 1000);
  std::this_thread::sleep_for(std::chrono::milliseconds(from_environment("FAKE_LOAD_MS", 0)));
  progress(1000, 1000);
  moed::FakeEngineConfig config;
  config.rows_max = static_cast<int32_t>(settings.scheduler.pass_rows_max);
  config.num_blocks = from_environment("FAKE_KV_BLOCKS", 4096);
  config.block_tokens = moed::kKvBlockTokens;
  config.vocab_size = model.config.vocab_size;
  config.num_layers = static_cast<int32_t>(from_environment("FAKE_LAYERS", config.num_layers));
  config.layer_us = from_environment("FAKE_LAYER_US", 0);
  moed::MemoryBudget budget;
  budget.kv_blocks = config.num_blocks;
  budget.max_model_len = settings.model.max_model_len > 0 ? static_cast<int32_t>(settings.model.max_model_len)
                                                          : model.config.max_positions;
  return std::unique_ptr<moed::Backend>(std::make_unique<FakeBackend>(config, budget));
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  if (args.empty() || args.front() != "serve") {
    std::fprintf(stderr, "usage: moed_fake serve --model DIR [...]\n");
    return 2;
  }
  auto loaded = moed::load_settings(std::span(args).subspan(1), environ);
  if (!loaded.ok()) {
    std::fprintf(stderr, "moed_fake: %s\n", loaded.status().message().c_str());
    return 1;
  }
  return moed::serve(*loaded, make_fake);
}
