#include "tests/engine/reference_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/check.h"

namespace moed {
namespace {

double rounded(double x) { return static_cast<float>(Bf16(static_cast<float>(x))); }

void round_rows(std::vector<std::vector<double>>& rows) {
  for (auto& row : rows) {
    for (double& x : row) x = rounded(x);
  }
}

void add(std::vector<std::vector<double>>& sum, const std::vector<std::vector<double>>& x) {
  for (size_t r = 0; r < sum.size(); ++r) {
    for (size_t i = 0; i < sum[r].size(); ++i) sum[r][i] += x[r][i];
  }
}

std::string replaced(std::string text, const std::string& what, int32_t with) {
  if (const size_t at = text.find(what); at != std::string::npos) text.replace(at, what.size(), std::to_string(with));
  return text;
}

void normalise(double* x, size_t size, const float* weight, double eps) {
  double sum = 0.0;
  for (size_t i = 0; i < size; ++i) sum += x[i] * x[i];
  const double scale = 1.0 / std::sqrt(sum / static_cast<double>(size) + eps);
  for (size_t i = 0; i < size; ++i) x[i] *= scale * weight[i];
}

}  // namespace

std::vector<float> ReferenceModel::read(const std::string& pattern, int32_t layer, int32_t expert) const {
  const std::string name = replaced(replaced(pattern, "{l}", layer), "{e}", expert);
  const std::vector<int64_t>* shape = source_.shape(name);
  MOED_CHECK(shape != nullptr) << name;
  std::vector<Bf16> bits(std::accumulate(shape->begin(), shape->end(), int64_t{1}, std::multiplies<>()));
  const Status status = source_.read(name, std::span<Bf16>(bits));
  MOED_CHECK(status.ok()) << status.message();
  std::vector<float> values(bits.size());
  std::transform(bits.begin(), bits.end(), values.begin(), [](Bf16 x) { return static_cast<float>(x); });
  return values;
}

ReferenceModel::Rows ReferenceModel::product(const Rows& x, const std::string& weight, const std::string& bias,
                                             int32_t layer, int32_t expert) const {
  const std::vector<float> w = read(weight, layer, expert);
  const std::vector<float> b = bias.empty() ? std::vector<float>() : read(bias, layer);
  const size_t in = x[0].size();
  const size_t out = w.size() / in;
  Rows y(x.size(), std::vector<double>(out));
  for (size_t r = 0; r < x.size(); ++r) {
    for (size_t o = 0; o < out; ++o) {
      double sum = b.empty() ? 0.0 : b[o];
      for (size_t i = 0; i < in; ++i) sum += x[r][i] * w[o * in + i];
      y[r][o] = sum;
    }
  }
  return y;
}

ReferenceModel::Rows ReferenceModel::norm(const Rows& x, const std::string& weight, int32_t layer) const {
  const std::vector<float> w = read(weight, layer);
  Rows y = x;
  for (auto& row : y) normalise(row.data(), row.size(), w.data(), model_.config.rms_norm_eps);
  round_rows(y);
  return y;
}

void ReferenceModel::norm_heads(Rows& x, const std::string& weight, int32_t layer) const {
  if (model_.config.attention.qk_norm == AttentionConfig::QkNorm::kNone) return;
  const std::vector<float> w = read(weight, layer);
  for (auto& row : x) {
    for (size_t begin = 0; begin < row.size(); begin += w.size()) {
      normalise(row.data() + begin, w.size(), w.data(), model_.config.rms_norm_eps);
    }
  }
}

void ReferenceModel::rope(Rows& x) const {
  const int32_t dim = model_.config.rope.rotary_dim;
  MOED_CHECK(model_.config.rope.scaling == RopeConfig::Scaling::kNone);
  for (size_t position = 0; position < x.size(); ++position) {
    for (size_t head = 0; head < x[position].size(); head += model_.config.attention.head_dim) {
      for (int32_t i = 0; i < dim / 2; ++i) {
        const double angle = static_cast<double>(position) * std::pow(model_.config.rope.theta, -2.0 * i / dim);
        double& a = x[position][head + i];
        double& b = x[position][head + i + dim / 2];
        const double turned = a * std::cos(angle) - b * std::sin(angle);
        b = b * std::cos(angle) + a * std::sin(angle);
        a = turned;
      }
    }
  }
}

ReferenceModel::Rows ReferenceModel::attention(const Rows& x, int32_t layer) const {
  const AttentionConfig& config = model_.config.attention;
  const TensorNames& names = model_.names;
  Rows q = product(x, names.q, config.qkv_bias ? names.q_bias : "", layer);
  Rows k = product(x, names.k, config.qkv_bias ? names.k_bias : "", layer);
  Rows v = product(x, names.v, config.qkv_bias ? names.v_bias : "", layer);
  norm_heads(q, names.q_norm, layer);
  norm_heads(k, names.k_norm, layer);
  for (Rows* rows : {&q, &k, &v}) {
    for (auto& row : *rows) {
      for (double& value : row) value = std::clamp<double>(value, -config.clip_qkv, config.clip_qkv);
    }
  }
  rope(q);
  rope(k);
  for (Rows* rows : {&q, &k, &v}) round_rows(*rows);
  const int32_t dim = config.head_dim;
  Rows out(x.size(), std::vector<double>(q[0].size()));
  for (size_t row = 0; row < x.size(); ++row) {
    for (int32_t head = 0; head < config.num_heads; ++head) {
      const double* query = q[row].data() + head * dim;
      const int32_t kv = head / (config.num_heads / config.num_kv_heads) * dim;
      std::vector<double> weights(row + 1);
      for (size_t j = 0; j <= row; ++j) {
        weights[j] = config.scale * std::inner_product(query, query + dim, k[j].data() + kv, 0.0);
      }
      const double most = *std::max_element(weights.begin(), weights.end());
      double total = 0.0;
      for (double& weight : weights) total += weight = std::exp(weight - most);
      for (size_t j = 0; j <= row; ++j) {
        for (int32_t i = 0; i < dim; ++i) out[row][head * dim + i] += weights[j] / total * v[j][kv + i];
      }
    }
  }
  round_rows(out);
  return product(out, names.o, config.output_bias ? names.o_bias : "", layer);
}

ReferenceModel::Rows ReferenceModel::ffn(const Rows& x, int32_t layer, const std::string (&names)[3],
                                         int32_t expert) const {
  Rows inner = product(x, names[0], "", layer, expert);
  const Rows up = product(x, names[1], "", layer, expert);
  for (size_t r = 0; r < inner.size(); ++r) {
    for (size_t i = 0; i < inner[r].size(); ++i) {
      inner[r][i] = rounded(inner[r][i] / (1.0 + std::exp(-inner[r][i])) * up[r][i]);
    }
  }
  return product(inner, names[2], "", layer, expert);
}

ReferenceModel::Rows ReferenceModel::moe(const Rows& x, int32_t layer, std::vector<double>& gaps) const {
  const MoeConfig& config = model_.config.moe;
  const TensorNames& names = model_.names;
  const std::string expert_names[3] = {names.expert_gate, names.expert_up, names.expert_down};
  const std::string shared_names[3] = {names.shared_gate, names.shared_up, names.shared_down};
  const Rows logits = product(x, names.router, "", layer);
  Rows out(x.size(), std::vector<double>(x[0].size()));
  for (size_t r = 0; r < x.size(); ++r) {
    std::vector<int32_t> order(config.num_experts);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[r][a] > logits[r][b]; });
    const int32_t top_k = config.router.top_k;
    if (top_k < config.num_experts) {
      gaps[r] = std::min(gaps[r], logits[r][order[top_k - 1]] - logits[r][order[top_k]]);
    }
    double all = 0.0;
    double chosen = 0.0;
    for (int32_t i = 0; i < config.num_experts; ++i) {
      const double score = std::exp(logits[r][order[i]] - logits[r][order[0]]);
      all += score;
      if (i < top_k) chosen += score;
    }
    for (int32_t i = 0; i < top_k; ++i) {
      const double score = std::exp(logits[r][order[i]] - logits[r][order[0]]);
      const double weight = score / (config.router.renormalize ? chosen : all) * config.router.scaling;
      const Rows y = ffn({x[r]}, layer, expert_names, order[i]);
      for (size_t j = 0; j < out[r].size(); ++j) out[r][j] += weight * y[0][j];
    }
  }
  if (config.shared_intermediate_size > 0) {
    const Rows y = ffn(x, layer, shared_names);
    const Rows gate = config.shared_gate ? product(x, names.shared_router, "", layer) : Rows();
    for (size_t r = 0; r < x.size(); ++r) {
      const double weight = config.shared_gate ? 1.0 / (1.0 + std::exp(-gate[r][0])) : 1.0;
      for (size_t j = 0; j < out[r].size(); ++j) out[r][j] += weight * y[r][j];
    }
  }
  return out;
}

ReferenceModel::Output ReferenceModel::run(std::span<const int32_t> tokens) const {
  const ModelConfig& config = model_.config;
  const std::vector<float> table = read(model_.names.embedding);
  Rows x;
  for (const int32_t token : tokens) {
    const auto begin = table.begin() + int64_t{token} * config.hidden_size;
    x.emplace_back(begin, begin + config.hidden_size);
  }
  Output output;
  output.router_gaps.assign(tokens.size(), std::numeric_limits<double>::infinity());
  const std::string dense_names[3] = {model_.names.dense_gate, model_.names.dense_up, model_.names.dense_down};
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    add(x, attention(norm(x, model_.names.attention_norm, layer), layer));
    const Rows normed = norm(x, model_.names.ffn_norm, layer);
    const bool dense = config.layers[layer] == LayerKind::kDense;
    add(x, dense ? ffn(normed, layer, dense_names) : moe(normed, layer, output.router_gaps));
  }
  const std::string head = config.tied_embeddings ? model_.names.embedding : model_.names.head;
  output.logprobs = product(norm(x, model_.names.final_norm, -1), head, "", -1);
  for (auto& row : output.logprobs) {
    const double most = *std::max_element(row.begin(), row.end());
    double sum = 0.0;
    for (const double logit : row) sum += std::exp(logit - most);
    for (double& logit : row) logit -= most + std::log(sum);
  }
  return output;
}

}  // namespace moed
