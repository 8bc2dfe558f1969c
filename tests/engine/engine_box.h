#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/hybrid_engine.h"
#include "kernels/device.h"

namespace moed {

// A device that must open.
std::unique_ptr<Device> opened(std::string_view spec, const DeviceOptions& options);

// A model with all that an engine needs around it.
class EngineBox {
 public:
  // Weights of the source; the model's config says how they are used. On the host device.
  EngineBox(Model model, const TensorSource& source, const DeviceOptions& options, const EngineConfig& config);
  // On a device of the caller's.
  EngineBox(Model model, const TensorSource& source, std::unique_ptr<Device> device, const EngineConfig& config);
  Engine& engine() { return *engine_; }
  const Model& model() const { return model_; }
  const EngineConfig& config() const { return config_; }
  // Bytes of device memory, when the host has waited for what wrote them.
  void read(void* target, const void* source, int64_t bytes);
  // A plan with the second half beginning at `split`: routed layers, all on the host, or what the planner says.
  StepPlan plan(int32_t split);
  using Planner = std::function<StepPlan(const ModelConfig& model, int32_t split)>;
  void set_planner(Planner planner) { planner_ = std::move(planner); }

 private:
  Model model_;
  EngineConfig config_;
  std::unique_ptr<Device> device_;
  DenseWeights weights_;
  ExpertStore experts_;
  std::unique_ptr<Engine> engine_;
  Planner planner_;
};

struct TinyModel {
  const char* name;
  const char* config_json;
};
// Small models, one of each architecture, with odd sizes.
std::span<const TinyModel> tiny_models();
Model parse_tiny(const TinyModel& tiny);

// What a client wants of the engine, and what it got.
struct Job {
  std::vector<int32_t> prompt;
  int32_t num_generate = 0;
  SamplingParams sampling;
  bool prompt_logprobs = false;
};
struct Answer {
  std::vector<ScoredToken> generated;
  std::vector<ScoredToken> prompt_scores;  // of prompt[1..]
};
// Alone, the whole prompt in chunks of `chunk_rows`, then token by token.
Answer run_alone(EngineBox& box, const Job& job, int32_t chunk_rows);
// All at once: random chunks, batches, splits, blocks and, where the engine has two, KV pools; a bulk pass that rests
// between layers while interactive passes run; sequences that are dropped between layers, lose their blocks to others
// at once, and begin anew.
struct CrowdCounts {
  int num_drops = 0;
  int num_interrupts = 0;  // interactive passes that ran between layers of a bulk one
  int num_splits = 0;
  int num_mixed = 0;  // passes with KV in both pools
};
std::vector<Answer> run_crowd(EngineBox& box, std::span<const Job> jobs, uint64_t seed, CrowdCounts& counts);

}  // namespace moed
