#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "kernels/host/host_ops.h"

namespace moed {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// The best of a row, the lower index first among equals.
int32_t best_of(const float* scores, int32_t n) {
  int32_t best = 0;
  for (int32_t i = 1; i < n; ++i) {
    if (scores[i] > scores[best]) best = i;
  }
  return best;
}

float sigmoid(float x) { return 1.0F / (1.0F + std::exp(-x)); }

}  // namespace

void HostOps::route(const Route& args, Stream& stream) {
  const int32_t num_experts = args.gate.out;
  MOED_CHECK(num_experts <= limits_.num_experts && args.top_k <= num_experts && args.top_k >= 1)
      << "route: top " << args.top_k << " of " << num_experts << " experts, reserved for " << limits_.num_experts;
  MOED_CHECK(args.num_groups >= 1 && num_experts % args.num_groups == 0 && args.groups_kept <= args.num_groups &&
             args.groups_kept >= 1 && args.top_k <= num_experts / args.num_groups * args.groups_kept)
      << "route: " << args.groups_kept << " of " << args.num_groups << " groups, top " << args.top_k << " of "
      << num_experts;
  MOED_CHECK(args.experts.cols == args.top_k && args.weights.cols == args.top_k + (args.shared ? 1 : 0))
      << "route: " << args.experts.cols << " ids and " << args.weights.cols << " weights for top " << args.top_k;
  linear(args.x, args.gate, false, {logits_.data(), args.x.rows, num_experts}, stream);
  if (args.shared && args.shared_gate.weight != nullptr) {
    linear(args.x, args.shared_gate, false, {shared_logits_.data(), args.x.rows, 1}, stream);
  }
  for_rows(args.x.rows, int64_t{num_experts} * (args.top_k + 2),
           [&](int64_t row, int thread) { choose_experts(args, row, thread); });
}

void HostOps::choose_experts(const Route& args, int64_t row, int thread) {
  const int32_t num_experts = args.gate.out;
  Scratch& scratch = scratch_[thread];
  float* scores = logits_.data() + row * num_experts;
  if (args.score == Route::Score::kSoftmax) {
    const float total = kernels_.exp_shifted(scores, scores[best_of(scores, num_experts)], num_experts);
    for (int32_t i = 0; i < num_experts; ++i) scores[i] /= total;
  } else {
    for (int32_t i = 0; i < num_experts; ++i) scores[i] = sigmoid(scores[i]);
  }
  float* ranks = scratch.choice_scores.data();
  for (int32_t i = 0; i < num_experts; ++i) {
    ranks[i] = scores[i] + (args.correction_bias == nullptr ? 0.0F : args.correction_bias[i]);
  }
  if (args.groups_kept < args.num_groups) keep_best_groups(args, scratch);

  int32_t* experts = args.experts.row(row);
  float* weights = args.weights.row(row);
  float total = 0.0F;
  for (int32_t choice = 0; choice < args.top_k; ++choice) {
    experts[choice] = best_of(ranks, num_experts);
    ranks[experts[choice]] = kNone;
    weights[choice] = scores[experts[choice]];
    total += weights[choice];
  }
  // 1e-20 as in DeepSeek-V3: sigmoids of very negative logits may all be 0.
  const float divisor = args.renormalize ? total + 1e-20F : 1.0F;
  for (int32_t choice = 0; choice < args.top_k; ++choice) weights[choice] = weights[choice] / divisor * args.scaling;
  if (args.shared) {
    weights[args.top_k] = args.shared_gate.weight == nullptr ? 1.0F : sigmoid(shared_logits_[row]);
  }
}

// Rules out all groups but the best. A group is worth the sum of its two best when scores are corrected by a bias
// (DeepSeek-V3), else its best (DeepSeek-V2).
void HostOps::keep_best_groups(const Route& args, Scratch& scratch) const {
  const int32_t size = args.gate.out / args.num_groups;
  const bool two = args.correction_bias != nullptr && size > 1;
  for (int32_t group = 0; group < args.num_groups; ++group) {
    const float* ranks = scratch.choice_scores.data() + group * size;
    float first = kNone;
    float second = kNone;
    for (int32_t i = 0; i < size; ++i) {
      if (ranks[i] > first) {
        second = first;
        first = ranks[i];
      } else {
        second = std::max(second, ranks[i]);
      }
    }
    scratch.group_scores[group] = two ? first + second : first;
  }
  for (int32_t kept = 0; kept < args.groups_kept; ++kept) {
    scratch.group_scores[best_of(scratch.group_scores.data(), args.num_groups)] = kNone;
  }
  for (int32_t group = 0; group < args.num_groups; ++group) {
    if (scratch.group_scores[group] == kNone) continue;
    std::fill_n(scratch.choice_scores.begin() + group * size, size, kNone);
  }
}

}  // namespace moed
