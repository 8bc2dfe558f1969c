#include "engine/hybrid_engine.h"

#include <algorithm>
#include <string>
#include <utility>

#include "engine/head.h"
#include "engine/kv_pool.h"
#include "engine/pipeline.h"
#include "engine/running_pass.h"
#include "model/rope.h"

namespace moed {
namespace {

// An interactive pass and a bulk pass.
constexpr int kPassesMax = 2;

class HybridEngine : public Engine {
 public:
  HybridEngine(const ModelConfig& model, const EngineConfig& config, Device& device)
      : model_(model), config_(config), device_(device), stream_(device.make_stream()) {}
  ~HybridEngine() override {
    // What is still enqueued (a copied block, say) may touch what dies here.
    const std::unique_ptr<Event> last = device_.make_event();
    stream_->record(*last);
    const Status joined = last->join();
    MOED_CHECK(joined.ok()) << joined.message();
  }

  Status prepare(const DenseWeights& weights, const ExpertStore& experts, Device& device) {
    MOED_RETURN_IF_ERROR(device.ops().reserve(op_limits()));
    for (int i = 0; i < kPassesMax; ++i) {
      MOED_ASSIGN_OR_RETURN(PassBuffers buffers, PassBuffers::allocate(model_, config_, device));
      slots_.push_back(std::make_unique<PassSlot>(PassSlot{std::move(buffers), StepClock(device, *stream_)}));
    }
    MOED_ASSIGN_OR_RETURN(KvPool kv, KvPool::make(model_, config_.kv_blocks, config_.block_tokens));
    kv_ = std::make_unique<KvPool>(std::move(kv));
    MOED_ASSIGN_OR_RETURN(Head head, Head::make(model_, weights, config_.rows_max, device, *stream_));
    head_ = std::make_unique<Head>(std::move(head));
    MOED_RETURN_IF_ERROR(fill_rope(device));
    const PipelineInputs inputs{model_, weights, experts, *kv_, rope_.as<float>()};
    pipeline_ = std::make_unique<Pipeline>(inputs, device, *stream_);
    return {};
  }

  Pass begin(std::span<const StepSequence> sequences, const StepPlan& plan) override {
    StepShape shape;
    for (const StepSequence& sequence : sequences) {
      shape.add(sequence.num_cached, sequence.num_new, sequence.sampling != nullptr);
    }
    const Status valid = validate(plan, shape, model_);
    MOED_CHECK(valid.ok()) << valid.message();
    const auto free =
        std::find_if(slots_.begin(), slots_.end(), [](const std::unique_ptr<PassSlot>& slot) { return !slot->taken; });
    MOED_CHECK(free != slots_.end()) << "more than " << kPassesMax << " passes are alive";
    auto state = std::make_unique<RunningPass>(**free, sequences, plan, model_, config_);
    pipeline_->begin(*state);
    return Pass(std::move(state));
  }

  bool advance(Pass& pass) override { return pipeline_->advance(running(pass)); }

  void drop(Pass& pass, SequenceId id) override { running(pass).drop(id, *stream_); }

  StepOutput finish(Pass&& pass) override {
    Pass ended = std::move(pass);
    RunningPass& state = running(ended);
    MOED_CHECK(state.empty() || state.layer == model_.num_layers) << "a pass ends in layer " << state.layer;
    state.clock().mark(Lane::kIdle);
    StepOutput output;
    output.sequences = head_->run(state);
    output.times = state.clock().times();
    return output;
  }

  void copy_block(Pool pool, int32_t from, int32_t to) override {
    MOED_CHECK(pool == Pool::kHost) << "this engine has no KV pool on the device";
    kv_->copy_block(from, to, *stream_);
  }

  int32_t rows_max() const override { return config_.rows_max; }

 private:
  static RunningPass& running(Pass& pass) {
    MOED_CHECK(pass.alive()) << "a pass that was finished is used again";
    return static_cast<RunningPass&>(pass.state());
  }

  OpLimits op_limits() const {
    OpLimits limits;
    limits.rows = config_.rows_max;
    limits.hidden = model_.hidden_size;
    limits.intermediate = std::max(model_.moe.intermediate_size, model_.moe.shared_intermediate_size);
    if (std::find(model_.layers.begin(), model_.layers.end(), LayerKind::kDense) != model_.layers.end()) {
      limits.intermediate = std::max(limits.intermediate, model_.dense_intermediate_size);
    }
    limits.num_heads = model_.attention.num_heads;
    limits.head_dim = model_.attention.head_dim;
    limits.context_tokens = config_.max_model_len;
    limits.num_experts = model_.moe.num_experts;
    limits.choices = PassBuffers::choices_max(model_);
    return limits;
  }

  Status fill_rope(Device& device) {
    const std::vector<float> table = rope_cos_sin(model_.rope, config_.max_model_len);
    const auto bytes = static_cast<int64_t>(table.size() * sizeof(float));
    MOED_ASSIGN_OR_RETURN(rope_, device.allocate(bytes, Memory::kDevice));
    stream_->copy(rope_.data(), table.data(), bytes);
    const std::unique_ptr<Event> copied = device.make_event();
    stream_->record(*copied);
    return copied->join();
  }

  const ModelConfig& model_;
  const EngineConfig config_;
  Device& device_;
  std::unique_ptr<Stream> stream_;
  std::vector<std::unique_ptr<PassSlot>> slots_;
  std::unique_ptr<KvPool> kv_;
  std::unique_ptr<Head> head_;
  Buffer rope_;  // [max_model_len, rotary_dim]
  std::unique_ptr<Pipeline> pipeline_;
};

Status check(const ModelConfig& model, const EngineConfig& config) {
  const auto positive = [](int64_t value, const char* name) {
    return value >= 1
               ? Status()
               : invalid_argument(std::string(name) + " is " + std::to_string(value) + "; it must be at least 1");
  };
  MOED_RETURN_IF_ERROR(positive(config.rows_max, "rows_max"));
  MOED_RETURN_IF_ERROR(positive(config.sequences_max, "sequences_max"));
  MOED_RETURN_IF_ERROR(positive(config.max_model_len, "max_model_len"));
  MOED_RETURN_IF_ERROR(positive(config.kv_blocks, "kv_blocks"));
  MOED_RETURN_IF_ERROR(positive(config.block_tokens, "block_tokens"));
  if (config.max_model_len > model.max_positions) {
    return invalid_argument("max_model_len is " + std::to_string(config.max_model_len) + "; the model's limit is " +
                            std::to_string(model.max_positions));
  }
  return {};
}

}  // namespace

StatusOr<std::unique_ptr<Engine>> make_engine(const Model& model, const DenseWeights& weights,
                                              const ExpertStore& experts, Device& device, const EngineConfig& config) {
  MOED_RETURN_IF_ERROR(check(model.config, config));
  auto engine = std::make_unique<HybridEngine>(model.config, config, device);
  MOED_RETURN_IF_ERROR(engine->prepare(weights, experts, device));
  return std::unique_ptr<Engine>(std::move(engine));
}

int64_t engine_activation_bytes(const ModelConfig& model, const EngineConfig& config) {
  const int64_t rope = int64_t{config.max_model_len} * model.rope.rotary_dim * int64_t{sizeof(float)};
  return kPassesMax * PassBuffers::bytes(model, config) + Head::bytes(model, config.rows_max) + rope;
}

}  // namespace moed
