#include "engine/hybrid_engine.h"

#include <algorithm>
#include <string>
#include <utility>

#include "engine/device_weights.h"
#include "engine/expert_tables.h"
#include "engine/head.h"
#include "engine/host_lane.h"
#include "engine/kv_pool.h"
#include "engine/pipeline.h"
#include "engine/running_pass.h"
#include "model/rope.h"

namespace moed {
namespace {

// An interactive pass and a bulk pass.
constexpr int32_t kPassesMax = RowsId::kPasses;
// The lanes of one pass in so many are measured where that costs; odd, so that of passes in turn each kind is.
constexpr int64_t kLanesEvery = 7;

class HybridEngine : public Engine {
 public:
  HybridEngine(const ModelConfig& model, const EngineConfig& config, Device& device)
      : model_(model),
        config_(config),
        residency_{!device.is_host(), config.ring.num_slots, config.ring.resident},
        device_(device),
        stream_(device.make_stream()) {
    std::sort(residency_.resident.begin(), residency_.resident.end());
  }
  ~HybridEngine() override {
    // What is still enqueued (a copied block, say) may touch what dies here. Whether it failed interests nobody: make()
    // or the pass that needed it has said so.
    const std::unique_ptr<Event> last = device_.make_event();
    stream_->record(*last);
    static_cast<void>(last->join());
  }

  Status prepare(const DenseWeights& weights, const ExpertStore& experts) {
    MOED_RETURN_IF_ERROR(device_.ops().reserve(op_limits()));
    if (!device_.is_host()) MOED_RETURN_IF_ERROR(device_.host_ops().reserve(op_limits()));
    MOED_ASSIGN_OR_RETURN(weights_, held(DeviceWeights::make(weights, device_, *stream_)));
    for (int32_t i = 0; i < kPassesMax; ++i) {
      MOED_ASSIGN_OR_RETURN(PassBuffers buffers, PassBuffers::allocate(model_, config_, device_));
      slots_.push_back(std::make_unique<PassSlot>(i, std::move(buffers), device_, *stream_, turn_));
    }
    MOED_RETURN_IF_ERROR(make_pools());
    MOED_ASSIGN_OR_RETURN(head_, held(Head::make(model_, weights_->views(), config_.rows_max, device_, *stream_)));
    MOED_RETURN_IF_ERROR(fill_rope());
    if (config_.ring.num_slots > 0) {
      MOED_ASSIGN_OR_RETURN(ring_, ExpertRing::make(experts, model_, device_, config_.ring));
    }
    MOED_ASSIGN_OR_RETURN(ExpertTables tables, ExpertTables::make(model_, weights_->views(), experts, device_));
    lane_ = std::make_unique<HostLane>(device_, ring_.get());
    const MoeInputs ffn{model_, weights_->views(), experts, ring_.get(), config_.ring.num_slots};
    moe_ = std::make_unique<MoeExecutor>(ffn, std::move(tables), device_, *stream_, *lane_);
    const PipelineInputs inputs{
        model_, weights_->views(), {kv_.get(), device_kv_.get(), staging_.get()}, rope_.as<float>()};
    pipeline_ = std::make_unique<Pipeline>(inputs, device_, *stream_, *lane_, *moe_);
    return {};
  }

  Pass begin(std::span<const StepSequence> sequences, const StepPlan& plan) override {
    StepShape shape;
    for (const StepSequence& sequence : sequences) {
      shape.add(sequence.num_cached, sequence.num_new, sequence.sampling != nullptr);
    }
    const Status valid = validate(plan, shape, model_, residency_);
    MOED_CHECK(valid.ok()) << valid.message();
    const auto free =
        std::find_if(slots_.begin(), slots_.end(), [](const std::unique_ptr<PassSlot>& slot) { return !slot->taken; });
    MOED_CHECK(free != slots_.end()) << "more than " << kPassesMax << " passes are alive";
    (*free)->clock.reset(device_.events_are_free() || num_begun_ % kLanesEvery == 0);
    ++num_begun_;
    auto state = std::make_unique<RunningPass>(**free, sequences, plan, model_, config_);
    pipeline_->begin(*state);
    return Pass(std::move(state));
  }

  bool advance(Pass& pass) override { return pipeline_->advance(running(pass)); }

  void drop(Pass& pass, SequenceId id) override { pipeline_->drop(running(pass), id); }

  StepOutput finish(Pass&& pass) override {
    Pass ended = std::move(pass);
    RunningPass& state = running(ended);
    MOED_CHECK(state.empty() || state.layer == model_.num_layers) << "a pass ends in layer " << state.layer;
    state.clock().resume();
    StepOutput output;
    output.sequences = head_->run(state, *lane_);
    output.times = state.clock().times();
    return output;
  }

  void copy_block(Pool pool, int32_t from, int32_t to) override {
    const KvPool* kv = pool == Pool::kHost ? kv_.get() : device_kv_.get();
    MOED_CHECK(kv != nullptr) << "this engine has no KV pool on the device";
    kv->copy_block(from, to, device_.ops(), *stream_);
  }

  EngineStats stats() const override {
    EngineStats stats;
    if (ring_ != nullptr) {
      const RingStats ring = ring_->stats();
      stats.expert_hits = ring.hits;
      stats.expert_misses = ring.misses;
      stats.experts_prefetched = ring.prefetched;
      stats.experts_prefetched_unused = ring.prefetched_unused;
      stats.expert_evictions = ring.evictions;
      stats.expert_bytes_copied = ring.bytes_copied;
      stats.ring_wait_us = ring.wait_us;
    }
    stats.host_expert_rows = moe_->host_expert_rows();
    stats.device_expert_rows = moe_->device_expert_rows();
    return stats;
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
    limits.vocab = model_.vocab_size;
    return limits;
  }

  template <class T>
  static StatusOr<std::unique_ptr<T>> held(StatusOr<T> made) {
    if (!made.ok()) return made.status();
    return std::make_unique<T>(std::move(made).value());
  }

  Status make_pools() {
    const auto make = [&](int64_t num_blocks, int32_t num_layers, Memory memory) {
      const KvPoolConfig pool{num_blocks, config_.block_tokens, num_layers, memory};
      return held(KvPool::make(model_, pool, device_));
    };
    MOED_ASSIGN_OR_RETURN(kv_, make(config_.kv_blocks, model_.num_layers, Memory::kMapped));
    if (config_.device_kv_blocks > 0) {
      MOED_ASSIGN_OR_RETURN(device_kv_, make(config_.device_kv_blocks, model_.num_layers, Memory::kDevice));
    }
    if (config_.staging_blocks > 0) {
      MOED_ASSIGN_OR_RETURN(staging_, make(config_.staging_blocks, 1, Memory::kDevice));
    }
    return {};
  }

  Status fill_rope() {
    const std::vector<float> table = rope_cos_sin(model_.rope, config_.max_model_len);
    const auto bytes = static_cast<int64_t>(table.size() * sizeof(float));
    MOED_ASSIGN_OR_RETURN(rope_, device_.allocate(bytes, Memory::kDevice));
    stream_->copy(rope_.data(), table.data(), bytes);
    const std::unique_ptr<Event> copied = device_.make_event();
    stream_->record(*copied);
    return copied->join();
  }

  const ModelConfig& model_;
  const EngineConfig config_;
  Residency residency_;
  Device& device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<DeviceWeights> weights_;
  StepClock::Turn turn_;
  int64_t num_begun_ = 0;  // passes
  std::vector<std::unique_ptr<PassSlot>> slots_;
  std::unique_ptr<KvPool> kv_;
  std::unique_ptr<KvPool> device_kv_;  // null: none
  std::unique_ptr<KvPool> staging_;    // null: none
  std::unique_ptr<Head> head_;
  Buffer rope_;                       // [max_model_len, rotary_dim]
  std::unique_ptr<ExpertRing> ring_;  // null: no expert ever runs on a device that is not the host
  std::unique_ptr<HostLane> lane_;
  std::unique_ptr<MoeExecutor> moe_;
  std::unique_ptr<Pipeline> pipeline_;
};

Status check_beside_host(const EngineConfig& config, bool device_is_host) {
  const std::pair<const char*, int64_t> fields[] = {{"device_kv_blocks", config.device_kv_blocks},
                                                    {"staging_blocks", config.staging_blocks},
                                                    {"ring.num_slots", config.ring.num_slots}};
  for (const auto& [name, value] : fields) {
    if (value < 0)
      return invalid_argument(std::string(name) + " is " + std::to_string(value) + "; it must not be negative");
    if (value > 0 && device_is_host) {
      return invalid_argument(std::string(name) + " is " + std::to_string(value) +
                              "; the host device has no memory of its own");
    }
  }
  return {};
}

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
  MOED_RETURN_IF_ERROR(check_beside_host(config, device.is_host()));
  auto engine = std::make_unique<HybridEngine>(model.config, config, device);
  MOED_RETURN_IF_ERROR(engine->prepare(weights, experts));
  return std::unique_ptr<Engine>(std::move(engine));
}

EngineBytes engine_activations(const ModelConfig& model, const EngineConfig& config, bool device_is_host) {
  const EngineBytes pass = PassBuffers::bytes(model, config, device_is_host);
  const EngineBytes head = Head::bytes(model, config.rows_max, device_is_host);
  const int64_t rope = int64_t{config.max_model_len} * model.rope.rotary_dim * int64_t{sizeof(float)};
  return {.device_bytes = kPassesMax * pass.device_bytes + head.device_bytes + rope,
          .host_bytes = kPassesMax * pass.host_bytes + head.host_bytes + ExpertTables::bytes(model)};
}

int64_t engine_activation_bytes(const ModelConfig& model, const EngineConfig& config) {
  return engine_activations(model, config, true).total();
}

}  // namespace moed
