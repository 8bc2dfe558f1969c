#include "tests/kernels/reference.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace moed::reference {

std::vector<double> to_double(const Bf16* x, int64_t n) {
  std::vector<double> out(n);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(x[i]);
  return out;
}

std::vector<double> to_double(const float* x, int64_t n) { return {x, x + n}; }

double tolerance(double eps, double k, double norm) { return 2.0 * std::sqrt(std::max(k, 1.0)) * eps * norm + 1e-30; }

double truncation(double k, double magnitude) { return k / 8.0 * 2.0 * kEpsFloat * magnitude; }

namespace {

struct Sum {
  double value = 0.0;
  double squares = 0.0;
  void add(double term) {
    value += term;
    squares += term * term;
  }
};

Sum dot(const Bf16* a, const Bf16* b, int64_t n) {
  Sum sum;
  for (int64_t i = 0; i < n; ++i) sum.add(double{static_cast<float>(a[i])} * double{static_cast<float>(b[i])});
  return sum;
}

}  // namespace

Checked linear(Matrix<const Bf16> x, const LinearWeights& weights) {
  Checked out;
  for (int32_t row = 0; row < x.rows; ++row) {
    for (int32_t n = 0; n < weights.out; ++n) {
      Sum sum = dot(x.row(row), weights.weight + int64_t{n} * weights.in, weights.in);
      if (weights.bias != nullptr) sum.add(weights.bias[n]);
      out.value.push_back(sum.value);
      out.norm.push_back(std::sqrt(sum.squares));
    }
  }
  return out;
}

std::vector<double> rms_norm(Matrix<const float> x, const float* weight, double eps) {
  std::vector<double> out;
  for (int32_t row = 0; row < x.rows; ++row) {
    double squares = 0.0;
    for (int32_t i = 0; i < x.cols; ++i) squares += double{x.row(row)[i]} * x.row(row)[i];
    const double scale = 1.0 / std::sqrt(squares / x.cols + eps);
    for (int32_t i = 0; i < x.cols; ++i) out.push_back(x.row(row)[i] * scale * weight[i]);
  }
  return out;
}

namespace {

void norm_heads(std::vector<double>& x, const RopeAppend& args, const float* weight) {
  const auto size = static_cast<int32_t>(x.size());
  const int32_t span = args.norm == RopeAppend::Norm::kPerHead ? args.kv.head_dim : size;
  if (args.norm == RopeAppend::Norm::kNone) return;
  for (int32_t begin = 0; begin < size; begin += span) {
    double squares = 0.0;
    for (int32_t i = 0; i < span; ++i) squares += x[begin + i] * x[begin + i];
    for (int32_t i = 0; i < span; ++i) x[begin + i] *= weight[i] / std::sqrt(squares / span + double{args.eps});
  }
}

void clip(std::vector<double>& x, double limit) {
  for (double& value : x) value = std::clamp(value, -limit, limit);
}

void turn(std::vector<double>& x, const RopeAppend& args, const float* cos_sin) {
  const int32_t half = args.rotary_dim / 2;
  for (size_t begin = 0; begin < x.size(); begin += args.kv.head_dim) {
    for (int32_t i = 0; i < half; ++i) {
      const double a = x[begin + i];
      const double b = x[begin + half + i];
      x[begin + i] = a * cos_sin[i] - b * cos_sin[half + i];
      x[begin + half + i] = b * cos_sin[i] + a * cos_sin[half + i];
    }
  }
}

void append(std::vector<double>& all, const std::vector<double>& more) {
  all.insert(all.end(), more.begin(), more.end());
}

}  // namespace

Rope rope(const RopeAppend& args) {
  Rope out;
  const int32_t q_size = args.num_heads * args.kv.head_dim;
  const int32_t k_size = args.kv.num_kv_heads * args.kv.head_dim;
  for (int32_t row = 0; row < args.qkv.rows; ++row) {
    const float* qkv = args.qkv.row(row);
    const float* cos_sin = args.cos_sin + int64_t{args.positions[row]} * args.rotary_dim;
    std::vector<double> q = to_double(qkv, q_size);
    std::vector<double> k = to_double(qkv + q_size, k_size);
    std::vector<double> v = to_double(qkv + q_size + k_size, k_size);
    norm_heads(q, args, args.q_norm);
    norm_heads(k, args, args.k_norm);
    for (auto* x : {&q, &k, &v}) clip(*x, args.clip);
    turn(q, args, cos_sin);
    turn(k, args, cos_sin);
    append(out.q, q);
    append(out.k, k);
    append(out.v, v);
  }
  return out;
}

Checked attention(const Attention& args, int32_t rows) {
  const KvLayer& kv = args.kv;
  const int32_t dim = kv.head_dim;
  Checked out;
  out.value.resize(int64_t{rows} * args.num_heads * dim);
  out.norm.resize(out.value.size());
  for (const AttentionSpan& span : args.spans) {
    for (int32_t row = 0; row < span.num_rows; ++row) {
      for (int32_t head = 0; head < args.num_heads; ++head) {
        const int32_t kv_head = head / (args.num_heads / kv.num_kv_heads);
        const Bf16* q = args.q.row(span.row_begin + row) + int64_t{head} * dim;
        const auto at = [&](Bf16* base, int32_t position) { return base + int64_t{position % kv.block_tokens} * dim; };
        std::vector<double> weights;
        for (int32_t p = 0; p <= span.num_cached + row; ++p) {
          weights.push_back(dot(q, at(kv.k(span.blocks[p / kv.block_tokens], kv_head), p), dim).value * args.scale);
        }
        const double peak = *std::max_element(weights.begin(), weights.end());
        double total = 0.0;
        for (double& weight : weights) total += weight = std::exp(weight - peak);
        const int64_t to = (int64_t{span.row_begin + row} * args.num_heads + head) * dim;
        for (size_t p = 0; p < weights.size(); ++p) {
          const Bf16* v = at(kv.v(span.blocks[p / kv.block_tokens], kv_head), static_cast<int32_t>(p));
          for (int32_t d = 0; d < dim; ++d) {
            out.value[to + d] += weights[p] / total * double{static_cast<float>(v[d])};
            out.norm[to + d] = std::max(out.norm[to + d], std::abs(double{static_cast<float>(v[d])}));
          }
        }
      }
    }
  }
  return out;
}

namespace {

// Indices of the k largest, the lower index first among equals; `gap` shrinks to the smallest distance that decided the
// set or its order.
std::vector<int32_t> top(const std::vector<double>& x, int32_t k, double& gap) {
  std::vector<int32_t> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return x[a] > x[b]; });
  for (int32_t i = 0; i < k && i + 1 < static_cast<int32_t>(order.size()); ++i) {
    gap = std::min(gap, x[order[i]] - x[order[i + 1]]);
  }
  order.resize(k);
  return order;
}

void mask_groups(const Route& args, std::vector<double>& ranks, double& gap) {
  const int32_t size = args.gate.out / args.num_groups;
  std::vector<double> worth;
  for (int32_t group = 0; group < args.num_groups; ++group) {
    std::vector<double> members(ranks.begin() + group * size, ranks.begin() + (group + 1) * size);
    std::sort(members.rbegin(), members.rend());
    worth.push_back(members[0] + (args.correction_bias != nullptr && size > 1 ? members[1] : 0.0));
  }
  double group_gap = INFINITY;
  const std::vector<int32_t> kept = top(worth, args.groups_kept, group_gap);
  gap = std::min(gap, group_gap);
  for (int32_t i = 0; i < args.gate.out; ++i) {
    if (std::find(kept.begin(), kept.end(), i / size) == kept.end()) ranks[i] = -INFINITY;
  }
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

}  // namespace

Routed route(const Route& args) {
  Routed out;
  const Checked logits = linear(args.x, args.gate);
  const Checked shared = args.shared_gate.weight != nullptr ? linear(args.x, args.shared_gate) : Checked{};
  for (int32_t row = 0; row < args.x.rows; ++row) {
    std::vector<double> scores(logits.value.begin() + int64_t{row} * args.gate.out,
                               logits.value.begin() + int64_t{row + 1} * args.gate.out);
    const double peak = *std::max_element(scores.begin(), scores.end());
    double total = 0.0;
    for (const double score : scores) total += std::exp(score - peak);
    for (double& score : scores) {
      score = args.score == Route::Score::kSoftmax ? std::exp(score - peak) / total : sigmoid(score);
    }
    std::vector<double> ranks = scores;
    for (int32_t i = 0; args.correction_bias != nullptr && i < args.gate.out; ++i) ranks[i] += args.correction_bias[i];
    double gap = INFINITY;
    if (args.groups_kept < args.num_groups) mask_groups(args, ranks, gap);
    const std::vector<int32_t> chosen = top(ranks, args.top_k, gap);
    double sum = 0.0;
    for (const int32_t expert : chosen) sum += scores[expert];
    for (const int32_t expert : chosen) {
      out.chosen.push_back(expert);
      out.weights.push_back(scores[expert] / (args.renormalize ? sum : 1.0) * double{args.scaling});
    }
    if (args.shared) out.weights.push_back(args.shared_gate.weight != nullptr ? sigmoid(shared.value[row]) : 1.0);
    append(out.scores, scores);
    out.gap.push_back(gap);
  }
  return out;
}

namespace {

// Where the sum of weights passes `target`, of tokens in the order given.
Sampled walk(const std::vector<int32_t>& order, const std::vector<double>& weights, double target, double total) {
  Sampled sampled{-1, 1.0};
  double before = 0.0;
  for (const int32_t token : order) {
    if (weights[token] == 0.0) continue;
    // The first and the last token have one edge.
    if (before > 0.0) sampled.margin = std::min(sampled.margin, std::abs(target - before) / total);
    if (target < before) break;
    sampled.token = token;
    before += weights[token];
  }
  return sampled;
}

}  // namespace

Sampled sample(std::span<const float> logits, const SampleRow& row) {
  for (const float x : logits) {
    if (std::isnan(x) || x == INFINITY) return {-1, 1.0};
  }
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (row.temperature < 1e-5F) return {order[0], 1.0};
  const double peak = logits[order[0]];
  if (std::isinf(peak)) return {-1, 1.0};
  double margin = 1.0;
  std::vector<double> weights;
  for (const float x : logits) {
    const double weight = std::exp((x - peak) / row.temperature);
    weights.push_back(weight >= row.min_p ? weight : 0.0);
    if (row.min_p > 0.0F && x != peak) margin = std::min(margin, std::abs(weight / row.min_p - 1.0));
  }
  const auto total_of = [&] {
    double total = 0.0;
    for (const int32_t token : order) total += weights[token];
    return total;
  };
  const bool cut = row.top_p < 1.0F || (row.top_k > 0 && row.top_k < static_cast<int32_t>(logits.size()));
  if (row.top_k > 0 && static_cast<size_t>(row.top_k) < order.size()) order.resize(row.top_k);
  if (row.top_p < 1.0F) {
    const double total = total_of();
    const double wanted = row.top_p * total;
    size_t kept = 0;
    double before = 0.0;
    double held = 0.0;
    while (kept == 0 || held < wanted) {
      before = held;
      held += weights[order[kept++]];
    }
    margin = std::min({margin, kept == 1 ? 1.0 : (wanted - before) / total, (held - wanted) / total});
    order.resize(kept);
  }
  if (!cut) std::iota(order.begin(), order.end(), 0);
  const double total = total_of();
  const Sampled drawn = walk(order, weights, row.uniform * total, total);
  return {drawn.token, std::min(margin, drawn.margin)};
}

Checked ffn(const Bf16* x, const BlobView& weights) {
  const int32_t hidden = weights.shape.hidden;
  const int32_t intermediate = weights.shape.intermediate;
  std::vector<double> middle;
  for (int32_t i = 0; i < intermediate; ++i) {
    const double gate = dot(x, weights.gate() + int64_t{i} * hidden, hidden).value;
    middle.push_back(gate * sigmoid(gate) * dot(x, weights.up() + int64_t{i} * hidden, hidden).value);
  }
  Checked out;
  for (int32_t i = 0; i < hidden; ++i) {
    Sum sum;
    for (int32_t j = 0; j < intermediate; ++j) {
      sum.add(middle[j] * double{static_cast<float>(weights.down()[int64_t{i} * intermediate + j])});
    }
    out.value.push_back(sum.value);
    out.norm.push_back(std::sqrt(sum.squares));
  }
  return out;
}

}  // namespace moed::reference
