#include "engine/moe_executor.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace moed {

MoeExecutor::MoeExecutor(const ModelConfig& model, const DenseWeights& weights, const ExpertStore& experts,
                         Device& device, Stream& stream)
    : model_(model),
      weights_(weights),
      experts_(experts),
      device_(device),
      ops_(device.ops()),
      stream_(stream),
      routed_(device.make_event()),
      pair_ends_(model.moe.num_experts) {
  works_.reserve(std::max(1, model.moe.num_experts));
}

void MoeExecutor::run(int32_t layer, const RowViews& rows, StepClock& clock) {
  const LayerWeights& weights = weights_.layer(layer);
  if (model_.layers[layer] == LayerKind::kDense) {
    run_dense(weights, rows);
    clock.mark(Lane::kDense);
    return;
  }
  route(weights, rows);
  clock.mark(Lane::kDense);
  const int32_t choices = model_.ffn_choices(layer);
  run_works(group(layer, rows), choices, rows);
  if (model_.moe.shared_intermediate_size > 0) {
    run_shared(layer, weights, rows);
  }
  const Matrix<float> outputs(rows.expert_outputs, rows.residual.rows * choices, model_.hidden_size);
  ops_.combine({.y = outputs, .weights = rows.expert_weights, .choices = choices, .residual = rows.residual}, stream_);
  clock.mark(Lane::kExperts);
}

void MoeExecutor::run_dense(const LayerWeights& weights, const RowViews& rows) {
  const BlobShape shape{.hidden = model_.hidden_size, .intermediate = model_.dense_intermediate_size};
  const ExpertWork work{{reinterpret_cast<const std::byte*>(weights.ffn), shape},
                        {rows.identity, static_cast<size_t>(rows.residual.rows)}};
  run_works({&work, 1}, 1, rows);
  const Matrix<float> outputs(rows.expert_outputs, rows.residual.rows, model_.hidden_size);
  ops_.combine({.y = outputs, .weights = {}, .choices = 1, .residual = rows.residual}, stream_);
}

void MoeExecutor::route(const LayerWeights& weights, const RowViews& rows) {
  const RouterConfig& router = model_.moe.router;
  Route args;
  args.x = rows.normed;
  args.gate = {weights.router, nullptr, model_.hidden_size, model_.moe.num_experts};
  args.score = router.score == RouterConfig::Score::kSoftmax ? Route::Score::kSoftmax : Route::Score::kSigmoid;
  args.top_k = router.top_k;
  args.renormalize = router.renormalize;
  args.scaling = router.scaling;
  args.num_groups = router.num_groups;
  args.groups_kept = router.groups_kept;
  args.correction_bias = weights.router_correction;
  args.shared = model_.moe.shared_intermediate_size > 0;
  if (args.shared) args.shared_gate = {weights.shared_router, nullptr, model_.hidden_size, 1};
  args.experts = rows.experts;
  args.weights = rows.expert_weights;
  ops_.route(args, stream_);
}

// Counting sort of pairs by expert: ascending within each, as the works want them.
std::span<const ExpertWork> MoeExecutor::group(int32_t layer, const RowViews& rows) {
  stream_.record(*routed_);
  const Status joined = routed_->join();
  MOED_CHECK(joined.ok()) << joined.message();

  const int32_t num_rows = rows.residual.rows;
  const int32_t top_k = model_.moe.router.top_k;
  const int32_t choices = model_.ffn_choices(layer);
  const int64_t table_bytes = int64_t{num_rows} * top_k * int64_t{sizeof(int32_t)};
  device_.host_access(rows.experts.data, table_bytes, Access::kRead);
  device_.host_access(rows.pairs, table_bytes, Access::kWrite);
  std::fill(pair_ends_.begin(), pair_ends_.end(), 0);
  for (int32_t row = 0; row < num_rows; ++row) {
    for (int32_t choice = 0; choice < top_k; ++choice) {
      const int32_t expert = rows.experts.row(row)[choice];
      MOED_CHECK(expert >= 0 && expert < model_.moe.num_experts) << "the router chose expert " << expert;
      ++pair_ends_[expert];
    }
  }
  int32_t begin = 0;
  for (int32_t& end : pair_ends_) begin += std::exchange(end, begin);
  for (int32_t row = 0; row < num_rows; ++row) {
    for (int32_t choice = 0; choice < top_k; ++choice) {
      rows.pairs[pair_ends_[rows.experts.row(row)[choice]]++] = row * choices + choice;
    }
  }
  works_.clear();
  begin = 0;
  for (int32_t expert = 0; expert < model_.moe.num_experts; ++expert) {
    const int32_t end = pair_ends_[expert];
    if (end > begin) {
      works_.push_back({experts_.blob({layer, expert}), {rows.pairs + begin, static_cast<size_t>(end - begin)}});
    }
    begin = end;
  }
  return works_;
}

// The shared expert is the last choice of every row. Its pairs lie behind the routed ones, which may still be read.
void MoeExecutor::run_shared(int32_t layer, const LayerWeights& weights, const RowViews& rows) {
  const BlobShape shape{.hidden = model_.hidden_size, .intermediate = model_.moe.shared_intermediate_size};
  const int32_t num_rows = rows.residual.rows;
  const int32_t top_k = model_.moe.router.top_k;
  const int32_t choices = model_.ffn_choices(layer);
  int32_t* pairs = rows.pairs + int64_t{num_rows} * top_k;
  device_.host_access(pairs, num_rows * int64_t{sizeof(*pairs)}, Access::kWrite);
  for (int32_t row = 0; row < num_rows; ++row) pairs[row] = row * choices + top_k;
  const ExpertWork work{{reinterpret_cast<const std::byte*>(weights.ffn), shape},
                        {pairs, static_cast<size_t>(num_rows)}};
  run_works({&work, 1}, choices, rows);
}

void MoeExecutor::run_works(std::span<const ExpertWork> works, int32_t choices, const RowViews& rows) {
  int32_t num_pairs = 0;
  int32_t widest = 0;
  for (const ExpertWork& work : works) {
    num_pairs += static_cast<int32_t>(work.pairs.size());
    widest = std::max(widest, work.weights.shape.intermediate);
  }
  ExpertFfn args;
  args.x = rows.normed;
  args.works = works;
  args.choices = choices;
  args.scratch = Matrix<Bf16>(rows.expert_scratch, num_pairs, widest);
  args.y = Matrix<float>(rows.expert_outputs, rows.residual.rows * choices, model_.hidden_size);
  ops_.expert_ffn(args, stream_);
}

}  // namespace moed
