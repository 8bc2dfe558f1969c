#include "engine/moe_executor.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace moed {
namespace {

// Predictions pay while rows want less than one in so many of a layer's experts: where they want more, what they bring
// pushes out what is wanted as much.
constexpr int32_t kPredictedRows = 2;

}  // namespace

MoeExecutor::MoeExecutor(const MoeInputs& inputs, ExpertTables tables, Device& device, Stream& stream, HostLane& lane)
    : model_(inputs.model),
      weights_(inputs.weights),
      experts_(inputs.experts),
      ring_(inputs.ring),
      ring_slots_(inputs.ring_slots),
      all_fit_(ring_slots_ >= std::count(model_.layers.begin(), model_.layers.end(), LayerKind::kMoe) *
                                  int64_t{model_.moe.num_experts}),
      tables_(std::move(tables)),
      device_(device),
      ops_(device.ops()),
      stream_(stream),
      lane_(lane),
      reached_(device.make_event()),
      places_(model_.moe.num_experts),
      counts_(model_.moe.num_experts) {
  const auto num_experts = static_cast<size_t>(model_.moe.num_experts);
  streamed_.reserve(num_experts);
  hosted_.reserve(num_experts);
  present_.reserve(num_experts);
  pending_.reserve(num_experts);
  submitted_.reserve(num_experts);
  wanted_.reserve(std::min(ring_slots_, ExpertRing::kPrefetchMax));
}

bool MoeExecutor::streams(const StepPlan& plan) const { return ring_ != nullptr && plan.costs.device_allowed(); }

// The layers to come, then those that are behind, for the pass that follows: what the plan names, then all of the
// layers that come whole.
void MoeExecutor::prefetch(RunningPass& pass) {
  if (ring_ == nullptr) return;
  if (std::exchange(prefetched_for_, &pass) == &pass && pass.prefetched_layer == pass.layer) return;
  pass.prefetched_layer = pass.layer;
  const std::span<const ExpertId> listed = pass.plan().prefetch;
  // What stands before the first one of a layer to come stays behind for good.
  while (pass.num_passed < listed.size() && listed[pass.num_passed].layer < pass.layer) ++pass.num_passed;
  wanted_.clear();
  want_layers(pass.plan(), listed.subspan(pass.num_passed), pass.layer, model_.num_layers);
  want_layers(pass.plan(), listed, 0, pass.layer);
  if (wanted_.empty() && !prefetching_) return;
  prefetching_ = !wanted_.empty();
  ring_->prefetch(wanted_);
  ring_->pump();
}

void MoeExecutor::want_layers(const StepPlan& plan, std::span<const ExpertId> listed, int32_t begin, int32_t end) {
  const auto full = [&] { return wanted_.size() == wanted_.capacity(); };
  for (const ExpertId id : listed) {
    if (full()) return;
    if (id.layer >= begin && id.layer < end) wanted_.push_back(id);
  }
  if (!streams(plan)) return;
  for (int32_t layer = begin; layer < end; ++layer) {
    if (plan.layers[layer] != LayerMode::kWhole || model_.layers[layer] != LayerKind::kMoe) continue;
    for (int32_t expert = 0; expert < model_.moe.num_experts; ++expert) {
      if (full()) return;
      wanted_.push_back({layer, expert});
    }
  }
}

void MoeExecutor::run(int32_t layer, RunningPass& pass, const Half& half) {
  const Work work{layer, pass, half, pass.rows(half), pass.tables(half), model_.ffn_choices(layer)};
  if (model_.layers[layer] == LayerKind::kDense) {
    run_dense(work);
    pass.clock().mark(Lane::kDense);
    return;
  }
  route(work, layer, work.rows.experts, work.rows.expert_weights);
  if (device_.is_host()) {
    run_on_host_device(work);
  } else if (streams(pass.plan()) && pass.plan().layers[layer] == LayerMode::kWhole) {
    run_whole(work);
  } else {
    run_routed(work);
  }
  pass.clock().mark(Lane::kExperts);
}

void MoeExecutor::run_dense(const Work& work) {
  const RowViews& rows = work.rows;
  const int32_t num_rows = rows.residual.rows;
  ExpertFfn args;
  args.x = rows.normed;
  args.shape = {.hidden = model_.hidden_size, .intermediate = model_.dense_intermediate_size};
  args.blobs = tables_.dense(work.layer);
  args.offsets = work.tables.whole_offsets;
  args.pairs = rows.identity;
  args.pairs_max = num_rows;
  args.scratch = Matrix<Bf16>(rows.expert_scratch, num_rows, args.shape.intermediate);
  args.y = Matrix<float>(rows.expert_outputs, num_rows, model_.hidden_size);
  ops_.expert_ffn(args, stream_);
  ops_.combine({.y = args.y, .weights = {}, .choices = 1, .residual = rows.residual}, stream_);
}

void MoeExecutor::route(const Work& work, int32_t layer, Matrix<int32_t> experts, Matrix<float> expert_weights) {
  const LayerWeights& weights = weights_.layers[layer];
  const RouterConfig& router = model_.moe.router;
  Route args;
  args.x = work.rows.normed;
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
  args.experts = experts;
  args.weights = expert_weights;
  ops_.route(args, stream_);
}

void MoeExecutor::group(const Work& work, bool mirror) {
  Group args;
  args.experts = work.rows.experts;
  args.num_experts = model_.moe.num_experts;
  args.choices = work.choices;
  args.offsets = work.tables.offsets;
  args.pairs = work.rows.pairs;
  if (mirror) {
    args.host_offsets = work.tables.host_offsets;
    args.host_pairs = work.rows.host_pairs;
  }
  ops_.group(args, stream_);
}

bool MoeExecutor::wants_prediction(const Work& work) const {
  const StepPlan& plan = work.pass.plan();
  const int32_t next = work.layer + 1;
  const int32_t num_pairs = work.rows.residual.rows * model_.moe.router.top_k;
  return streams(plan) && !all_fit_ && work.half.num_paths() == 1 && next < model_.num_layers &&
         num_pairs * kPredictedRows < model_.moe.num_experts && model_.layers[next] == LayerKind::kMoe &&
         plan.layers[next] == LayerMode::kRouted && ring_->wants_prediction(next);
}

void MoeExecutor::predict(const Work& work) {
  route(work, work.layer + 1, work.rows.next_experts, work.rows.next_weights);
  Group args;
  args.experts = work.rows.next_experts;
  args.num_experts = model_.moe.num_experts;
  args.choices = work.choices;
  args.offsets = work.tables.next_offsets;
  args.pairs = work.rows.next_pairs;
  args.host_offsets = work.tables.next_host_offsets;
  ops_.group(args, stream_);
}

// What calls on the device over routed experts have in common; the table comes.
ExpertFfn MoeExecutor::device_args(const Work& work) const {
  const int32_t num_pairs = work.rows.residual.rows * model_.moe.router.top_k;
  ExpertFfn args;
  args.x = work.rows.normed;
  args.shape = experts_.shape();
  args.offsets = work.tables.offsets;
  args.pairs = work.rows.pairs;
  args.pairs_max = num_pairs;
  args.choices = work.choices;
  args.scratch = Matrix<Bf16>(work.rows.expert_scratch, num_pairs, args.shape.intermediate);
  args.y = Matrix<float>(work.rows.expert_outputs, work.rows.residual.rows * work.choices, model_.hidden_size);
  return args;
}

void MoeExecutor::run_shared(const Work& work) {
  if (model_.moe.shared_intermediate_size == 0) return;
  const int32_t num_rows = work.rows.residual.rows;
  ExpertFfn args = device_args(work);
  args.shape = {.hidden = model_.hidden_size, .intermediate = model_.moe.shared_intermediate_size};
  args.blobs = tables_.dense(work.layer);
  args.offsets = work.tables.whole_offsets;
  args.pairs = work.rows.shared_pairs;
  args.pairs_max = num_rows;
  args.scratch = Matrix<Bf16>(work.rows.expert_scratch, num_rows, args.shape.intermediate);
  ops_.expert_ffn(args, stream_);
}

void MoeExecutor::run_on_host_device(const Work& work) {
  group(work, false);
  work.pass.clock().mark(Lane::kDense);
  ExpertFfn args = device_args(work);
  args.blobs = tables_.store(work.layer);
  ops_.expert_ffn(args, stream_);
  host_expert_rows_ += args.pairs_max;
  run_shared(work);
  combine(work, false);
}

void MoeExecutor::run_whole(const Work& work) {
  group(work, false);
  work.pass.clock().mark(Lane::kDense);
  run_shared(work);
  streamed_.clear();
  for (int32_t expert = 0; expert < model_.moe.num_experts; ++expert) streamed_.push_back(expert);
  next_streamed_ = 0;
  finish_streams(work);
  device_expert_rows_ += int64_t{work.rows.residual.rows} * model_.moe.router.top_k;
  combine(work, false);
}

void MoeExecutor::run_routed(const Work& work) {
  group(work, true);
  present_.clear();
  if (ring_ != nullptr) ring_->acquire_present(work.layer, present_);
  const bool predicts = wants_prediction(work);
  if (predicts) predict(work);
  // Rows for the host lane set out before the answer is there, unless nothing will be asked of it. A half with several
  // KV paths, or with a prediction, has op calls enough and sends them when it must.
  const StepPlan& plan = work.pass.plan();
  const bool sent = present_.size() < counts_.size() && (plan.costs.host_allowed() || !streams(plan)) &&
                    work.half.num_paths() == 1 && !predicts;
  if (sent) send_normed(work);
  stream_.record(*reached_);
  work.pass.clock().mark(Lane::kDense);
  std::fill(places_.begin(), places_.end(), Place::kHost);
  for (const Lease& lease : present_) places_[lease.id().expert] = Place::kResident;
  if (!present_.empty()) enqueue_leases(work, present_);
  run_shared(work);
  lane_.wait(*reached_, work.pass);
  if (predicts) {
    count_rows(work, work.tables.next_host_offsets);
    ring_->predicted(work.layer + 1, work.pass.id(work.half), counts_);
  }
  count_rows(work, work.tables.host_offsets);
  place(work);
  run_missing(work, sent);
  combine(work, !hosted_.empty());
}

void MoeExecutor::send_normed(const Work& work) { ops_.move(work.rows.normed, work.rows.host_normed, stream_); }

void MoeExecutor::count_rows(const Work& work, const int32_t* offsets) {
  const auto num_experts = static_cast<int32_t>(counts_.size());
  device_.host_access(offsets, (num_experts + 1) * int64_t{sizeof(*offsets)}, Access::kRead);
  for (int32_t expert = 0; expert < num_experts; ++expert) counts_[expert] = offsets[expert + 1] - offsets[expert];
  MOED_CHECK(offsets[num_experts] == work.rows.residual.rows * model_.moe.router.top_k)
      << "layer " << work.layer << ": the router's answer counts " << offsets[num_experts] << " pairs";
}

void MoeExecutor::place(const Work& work) {
  if (ring_ != nullptr) ring_->routed(work.layer, work.pass.id(work.half), counts_);
  if (streams(work.pass.plan())) placer_.place(work.pass.plan().costs, counts_, places_);
  streamed_.clear();
  hosted_.clear();
  next_streamed_ = 0;
  for (int32_t expert = 0; expert < model_.moe.num_experts; ++expert) {
    if (counts_[expert] == 0) continue;
    if (places_[expert] == Place::kHost) {
      hosted_.push_back(expert);
      host_expert_rows_ += counts_[expert];
      continue;
    }
    device_expert_rows_ += counts_[expert];
    if (places_[expert] == Place::kStreamed) streamed_.push_back(expert);
  }
}

// Copies first, so that they run while the host computes, which feeds them meanwhile.
void MoeExecutor::run_missing(const Work& work, bool sent) {
  if (!hosted_.empty()) {
    if (!sent) {
      send_normed(work);
      stream_.record(*reached_);
    }
    stream_some(work);
    if (!sent) lane_.wait(*reached_, work.pass);
    const std::span<const std::byte*> table(work.tables.host_blobs, places_.size());
    device_.host_access(table.data(), static_cast<int64_t>(table.size_bytes()), Access::kWrite);
    std::fill(table.begin(), table.end(), nullptr);
    for (const int32_t expert : hosted_) table[expert] = experts_.blob({work.layer, expert}).data;
    run_hosted(work);
  }
  finish_streams(work);
}

void MoeExecutor::run_hosted(const Work& work) {
  const double begin_us = device_.now_us();
  ExpertFfn args = device_args(work);
  args.x = work.rows.host_normed;
  args.blobs = {work.tables.host_blobs, places_.size()};
  args.offsets = work.tables.host_offsets;
  args.pairs = work.rows.host_pairs;
  args.scratch.data = work.rows.host_scratch;
  args.y.data = work.rows.host_outputs;
  lane_.compute([&] { device_.host_ops().expert_ffn(args, device_.host_stream()); }, [&] { stream_some(work); });
  work.pass.clock().add_host_experts(begin_us);
}

bool MoeExecutor::stream_some(const Work& work) {
  if (ring_ == nullptr) return false;
  ring_->pump();
  const size_t num_leased = pending_.size();
  while (next_streamed_ < streamed_.size()) {
    std::optional<Lease> lease = ring_->acquire({work.layer, streamed_[next_streamed_]});
    if (!lease.has_value()) break;
    pending_.push_back(std::move(*lease));
    ++next_streamed_;
  }
  // Not after an acquire() in vain: what it waits for is to be still under way when wait() looks.
  if (pending_.size() > num_leased) ring_->pump();
  submitted_.clear();
  size_t num_waiting = 0;
  for (Lease& lease : pending_) {
    if (ring_->submitted(lease)) {
      submitted_.push_back(std::move(lease));
    } else if (Lease& place = pending_[num_waiting++]; &place != &lease) {
      place = std::move(lease);
    }
  }
  pending_.resize(num_waiting);
  if (submitted_.empty()) return false;
  enqueue_leases(work, submitted_);
  return true;
}

void MoeExecutor::finish_streams(const Work& work) {
  while (next_streamed_ < streamed_.size() || !pending_.empty()) {
    if (!stream_some(work)) lane_.wait_ring(work.pass);
  }
}

void MoeExecutor::enqueue_leases(const Work& work, std::vector<Lease>& leases) {
  const ExpertTables::Table table = tables_.take([&](Event& event) { lane_.wait(event, work.pass); });
  for (const Lease& lease : leases) {
    ring_->order(lease, stream_);
    table[lease.id().expert] = lease.view().data;
  }
  ExpertFfn args = device_args(work);
  args.blobs = table;
  ops_.expert_ffn(args, stream_);
  tables_.used(stream_);
  ring_->retire(leases, stream_);
}

void MoeExecutor::combine(const Work& work, bool with_host) {
  const int32_t num_outputs = work.rows.residual.rows * work.choices;
  Combine args;
  args.y = Matrix<float>(work.rows.expert_outputs, num_outputs, model_.hidden_size);
  args.weights = work.rows.expert_weights;
  args.choices = work.choices;
  args.residual = work.rows.residual;
  if (with_host) {
    args.host_y = Matrix<float>(work.rows.host_outputs, num_outputs, model_.hidden_size);
    args.experts = work.rows.experts;
    args.host_blobs = {work.tables.host_blobs, places_.size()};
  }
  ops_.combine(args, stream_);
}

}  // namespace moed
