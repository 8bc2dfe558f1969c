#include "tests/engine/engine_box.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "base/check.h"
#include "tests/support/test_device.h"

namespace moed {
namespace {

constexpr TinyModel kTinyModels[] = {
    {"mixtral",
     R"({"architectures": ["MixtralForCausalLM"], "hidden_size": 72, "num_hidden_layers": 3, "vocab_size": 211,
      "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "intermediate_size": 41,
      "num_local_experts": 5, "num_experts_per_tok": 2, "max_position_embeddings": 256, "hidden_act": "silu"})"},
    {"qwen2_moe",
     R"({"architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 150,
      "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 90, "moe_intermediate_size": 24,
      "shared_expert_intermediate_size": 52, "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": false,
      "mlp_only_layers": [1], "max_position_embeddings": 256, "hidden_act": "silu"})"},
    {"qwen3_moe",
     R"({"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 80, "num_hidden_layers": 3, "vocab_size": 130,
      "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 32, "intermediate_size": 100,
      "moe_intermediate_size": 17, "num_experts": 12, "num_experts_per_tok": 4, "norm_topk_prob": true,
      "max_position_embeddings": 256, "hidden_act": "silu"})"},
    {"olmoe", R"({"architectures": ["OlmoeForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 190,
      "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 33, "num_experts": 8,
      "num_experts_per_tok": 3, "clip_qkv": 1.5, "max_position_embeddings": 256, "hidden_act": "silu"})"},
    {"llama", R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 66, "num_hidden_layers": 3, "vocab_size": 97,
      "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 75, "tie_word_embeddings": true,
      "attention_bias": true, "max_position_embeddings": 256, "hidden_act": "silu"})"},
    {"qwen3", R"({"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 120,
      "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 70,
      "max_position_embeddings": 256, "hidden_act": "silu"})"},
};

template <class T>
T loaded(StatusOr<T> value) {
  MOED_CHECK(value.ok()) << value.status().message();
  return std::move(value).value();
}

// A job on its way.
struct Progress {
  const Job* job = nullptr;
  SequenceId id = 0;
  std::vector<int32_t> tokens;
  int32_t num_cached = 0;
  Pool pool = Pool::kHost;  // chosen with the first block
  std::vector<int32_t> blocks;
  bool in_pass = false;
  int32_t num_new = 0;  // while in a pass
  Answer answer;

  explicit Progress(const Job& wanted, SequenceId sequence_id) : job(&wanted), id(sequence_id), tokens(wanted.prompt) {}
  bool done() const {
    return static_cast<int32_t>(answer.generated.size()) == job->num_generate &&
           num_cached >= static_cast<int32_t>(job->prompt.size());
  }
  int32_t rows_left() const { return static_cast<int32_t>(tokens.size()) - num_cached; }

  StepSequence step(int32_t rows) {
    num_new = rows;
    in_pass = true;
    StepSequence sequence;
    sequence.tokens = tokens;
    sequence.id = id;
    sequence.num_prompt = static_cast<int32_t>(job->prompt.size());
    sequence.num_cached = num_cached;
    sequence.num_new = rows;
    sequence.prompt_logprobs = job->prompt_logprobs;
    sequence.num_prompt_top = std::max(0, job->sampling.num_logprobs);
    sequence.pool = pool;
    sequence.blocks = blocks;
    if (rows == rows_left() && job->num_generate > 0) sequence.sampling = &job->sampling;
    return sequence;
  }

  void commit(const SequenceOutput& output) {
    MOED_CHECK(in_pass && output.id == id) << output.id;
    for (size_t i = 0; i < output.prompt_scores.size(); ++i) {
      const size_t at = static_cast<size_t>(num_cached) + i;
      if (answer.prompt_scores.size() <= at) answer.prompt_scores.resize(at + 1);
      answer.prompt_scores[at] = output.prompt_scores[i];
    }
    num_cached += num_new;
    in_pass = false;
    if (output.sampled.has_value()) {
      answer.generated.push_back(*output.sampled);
      if (static_cast<int32_t>(answer.generated.size()) < job->num_generate) tokens.push_back(output.sampled->token);
    }
  }
};

// A crowd of jobs and the blocks they hold.
class Crowd {
 public:
  Crowd(EngineBox& box, std::span<const Job> jobs, uint64_t seed, CrowdCounts& counts)
      : box_(box), random_(seed), counts_(counts) {
    free_of(Pool::kHost).resize(box.config().kv_blocks);
    free_of(Pool::kDevice).resize(box.config().device_kv_blocks);
    for (std::vector<int32_t>& free : free_) {
      std::iota(free.begin(), free.end(), 0);
      std::shuffle(free.begin(), free.end(), random_);
    }
    for (const Job& job : jobs) progress_.emplace_back(job, 1000 + static_cast<SequenceId>(progress_.size()));
  }

  std::vector<Answer> run() {
    while (bulk_.alive() || std::any_of(progress_.begin(), progress_.end(), [](auto& p) { return !p.done(); })) {
      if (!bulk_.alive()) {
        bulk_members_ = pick(3, box_.config().rows_max);
        if (!bulk_members_.empty()) bulk_ = begin(bulk_members_);
        bulk_layers_ = 0;
      }
      while (coin(2)) interactive();
      if (bulk_.alive()) advance_bulk();
    }
    std::vector<Answer> answers;
    for (Progress& progress : progress_) answers.push_back(std::move(progress.answer));
    return answers;
  }

 private:
  std::vector<int32_t>& free_of(Pool pool) { return free_[pool == Pool::kHost ? 0 : 1]; }
  bool coin(int sides) { return random_() % sides == 0; }
  int32_t below(int32_t count) { return static_cast<int32_t>(random_() % count); }

  // Idle jobs and a number of rows for each, blocks taken.
  std::vector<Progress*> pick(int32_t count_max, int32_t rows_max) {
    std::vector<Progress*> picked;
    std::vector<Progress*> idle;
    for (Progress& progress : progress_) {
      if (!progress.in_pass && !progress.done()) idle.push_back(&progress);
    }
    std::shuffle(idle.begin(), idle.end(), random_);
    int32_t rows_left = rows_max;
    for (Progress* progress : idle) {
      if (static_cast<int32_t>(picked.size()) == count_max || rows_left == 0) break;
      const int32_t most = std::min(progress->rows_left(), rows_left);
      const int32_t rows = coin(2) ? most : 1 + below(most);
      const int32_t block_tokens = box_.config().block_tokens;
      const int32_t blocks = (progress->num_cached + rows + block_tokens - 1) / block_tokens;
      if (progress->blocks.empty()) {
        progress->pool = box_.config().device_kv_blocks > 0 && coin(2) ? Pool::kDevice : Pool::kHost;
      }
      std::vector<int32_t>& free = free_of(progress->pool);
      MOED_CHECK(blocks - static_cast<int32_t>(progress->blocks.size()) <= static_cast<int32_t>(free.size()));
      while (static_cast<int32_t>(progress->blocks.size()) < blocks) {
        progress->blocks.push_back(free.back());
        free.pop_back();
      }
      progress->num_new = rows;
      rows_left -= rows;
      picked.push_back(progress);
    }
    return picked;
  }

  Pass begin(std::span<Progress* const> members) {
    std::vector<StepSequence> sequences;
    for (Progress* progress : members) sequences.push_back(progress->step(progress->num_new));
    const auto size = static_cast<int32_t>(sequences.size());
    const int32_t split = coin(3) ? 1 + below(size) : size;
    const auto on_device = [](const Progress* progress) { return progress->pool == Pool::kDevice; };
    const auto num_on_device = std::count_if(members.begin(), members.end(), on_device);
    counts_.num_mixed += num_on_device > 0 && num_on_device < size ? 1 : 0;
    counts_.num_splits += split > 0 && split < size ? 1 : 0;
    return box_.engine().begin(sequences, box_.plan(split));
  }

  void commit(const StepOutput& output, std::vector<Progress*>& members) {
    MOED_CHECK(output.sequences.size() == members.size()) << output.sequences.size();
    for (size_t i = 0; i < members.size(); ++i) members[i]->commit(output.sequences[i]);
    members.clear();
  }

  // Others may take its blocks at once; it begins anew.
  void drop_one(Pass& pass, std::vector<Progress*>& members) {
    if (members.empty()) return;
    const auto victim = members.begin() + below(static_cast<int32_t>(members.size()));
    Progress& progress = **victim;
    box_.engine().drop(pass, progress.id);
    std::vector<int32_t>& free = free_of(progress.pool);
    for (const int32_t block : progress.blocks)
      free.insert(free.begin() + below(static_cast<int32_t>(free.size()) + 1), block);
    progress.blocks.clear();
    progress.in_pass = false;
    progress.num_cached = 0;
    progress.id += 1000;
    members.erase(victim);
    ++counts_.num_drops;
  }

  void interactive() {
    std::vector<Progress*> members = pick(1 + below(6), 1 + below(box_.config().rows_max));
    if (members.empty()) return;
    Pass pass = begin(members);
    counts_.num_interrupts += bulk_.alive() && bulk_layers_ > 0 ? 1 : 0;
    if (coin(8)) drop_one(pass, members);
    while (box_.engine().advance(pass)) {
      if (coin(20)) drop_one(pass, members);
    }
    commit(box_.engine().finish(std::move(pass)), members);
  }

  void advance_bulk() {
    if (box_.engine().advance(bulk_)) {
      ++bulk_layers_;
      if (coin(10)) drop_one(bulk_, bulk_members_);
      return;
    }
    if (coin(10)) drop_one(bulk_, bulk_members_);
    commit(box_.engine().finish(std::move(bulk_)), bulk_members_);
    bulk_ = Pass();
  }

  EngineBox& box_;
  std::mt19937_64 random_;
  CrowdCounts& counts_;
  std::array<std::vector<int32_t>, 2> free_;  // of each pool
  std::vector<Progress> progress_;
  Pass bulk_;
  std::vector<Progress*> bulk_members_;
  int32_t bulk_layers_ = 0;
};

}  // namespace

std::unique_ptr<Device> opened(std::string_view spec, const DeviceOptions& options) {
  auto device = open_device(test_device(spec), options);
  MOED_CHECK(device.ok()) << device.status().message();
  return std::move(device).value();
}

EngineBox::EngineBox(Model model, const TensorSource& source, const DeviceOptions& options, const EngineConfig& config)
    : EngineBox(std::move(model), source, opened("cpu", options), config) {}

EngineBox::EngineBox(Model model, const TensorSource& source, std::unique_ptr<Device> device,
                     const EngineConfig& config)
    : model_(std::move(model)),
      config_(config),
      device_(std::move(device)),
      weights_(loaded(DenseWeights::load(model_, source, [](int64_t) {}))),
      experts_(loaded(ExpertStore::load(model_, source, [](int64_t) {}))),
      engine_(loaded(make_engine(model_, weights_, experts_, *device_, config_))) {}

void EngineBox::read(void* target, const void* source, int64_t bytes) {
  const auto stream = device_->make_stream();
  const auto copied = device_->make_event();
  stream->copy(target, source, bytes);
  stream->record(*copied);
  MOED_CHECK(copied->join().ok()) << "a copy of " << bytes << " bytes failed";
}

StepPlan EngineBox::plan(int32_t split) {
  if (planner_) return planner_(model_.config, split);
  StepPlan plan;
  plan.split = split;
  plan.layers.assign(model_.config.num_layers, LayerMode::kRouted);
  return plan;
}

std::span<const TinyModel> tiny_models() { return kTinyModels; }

Model parse_tiny(const TinyModel& tiny) { return loaded(parse_model_config(tiny.config_json, "")); }

Answer run_alone(EngineBox& box, const Job& job, int32_t chunk_rows) {
  Progress progress(job, 1);
  progress.blocks.resize(box.config().kv_blocks);
  std::iota(progress.blocks.rbegin(), progress.blocks.rend(), 0);
  while (!progress.done()) {
    const StepSequence sequence = progress.step(std::min(chunk_rows, progress.rows_left()));
    Pass pass = box.engine().begin({&sequence, 1}, box.plan(1));
    while (box.engine().advance(pass)) {
    }
    progress.commit(box.engine().finish(std::move(pass)).sequences.at(0));
  }
  return progress.answer;
}

std::vector<Answer> run_crowd(EngineBox& box, std::span<const Job> jobs, uint64_t seed, CrowdCounts& counts) {
  return Crowd(box, jobs, seed, counts).run();
}

}  // namespace moed
