#include "plan/step_model.h"

#include <algorithm>
#include <cmath>

#include "plan/memory_budget.h"

namespace moed {
namespace {

constexpr double kOutlierFactor = 2.0;
constexpr double kPriorFactor = 64.0;
constexpr double kSmoothing = 1.0 / 8.0;
constexpr double kFirstSmoothing = 1.0 / 2.0;
constexpr double kBytesPerWeight = 2.0;  // bf16
constexpr double kFlopsPerWeight = 2.0;  // of a row

StepShape together(const StepShape& a, const StepShape& b) {
  return {.num_sequences = a.num_sequences + b.num_sequences,
          .num_rows = a.num_rows + b.num_rows,
          .num_sampled = a.num_sampled + b.num_sampled,
          .context_tokens = a.context_tokens + b.context_tokens,
          .attended_tokens = a.attended_tokens + b.attended_tokens};
}

// Dense weights whose products one row takes part in: all but the embedding table.
double active_dense_weights(const ModelConfig& config) {
  const double table = static_cast<double>(config.vocab_size) * config.hidden_size;
  return static_cast<double>(dense_weight_bytes(config)) / kBytesPerWeight - (config.tied_embeddings ? 0.0 : table);
}

double chosen_share(const ModelConfig& config) {
  return config.moe.num_experts > 0 ? static_cast<double>(config.moe.router.top_k) / config.moe.num_experts : 0.0;
}

}  // namespace

double StepModel::sweep_us(int32_t num_rows) const {
  const double chosen = 1.0 - std::pow(1.0 - costs_.expert_share, num_rows);
  const double rows = chosen > 0.0 ? num_rows * costs_.expert_share / chosen : 0.0;  // of a chosen expert
  const double host_rate = (1.0 - costs_.link_share) * std::min(1.0, costs_.host_rows / std::max(rows, 1.0));
  return costs_.dense_us + costs_.experts_us * chosen / (costs_.link_share + host_rate);
}

double StepModel::attention_us(const StepShape& shape) const {
  return std::max(static_cast<double>(shape.context_tokens) * costs_.context_us,
                  static_cast<double>(shape.attended_tokens) * costs_.attended_us);
}

double StepModel::predict_us(const StepShape& shape) const {
  if (shape.num_rows == 0) return 0.0;
  return std::max(sweep_us(shape.num_rows), shape.num_rows * costs_.row_us) + attention_us(shape);
}

bool StepModel::share_sweep(const StepShape& light, const StepShape& heavy) const {
  if (light.num_rows == 0 || heavy.num_rows == 0) return false;
  const double alone_us = predict_us(light);
  const double shared_us = predict_us(together(light, heavy));
  const double saved_us = alone_us + predict_us(heavy) - shared_us;
  const double delay_us = shared_us - alone_us;
  return delay_us < saved_us;
}

void Tracker::observe(const StepShape& shape, double measured_us) {
  const double predicted_us = model_.predict_us(shape);
  if (!(measured_us > 0.0) || !std::isfinite(measured_us) || !(predicted_us > 0.0)) return;
  ++num_observed_;
  const double limit = std::log(kOutlierFactor);
  const double log_ratio = std::clamp(std::log(measured_us / predicted_us), -limit, limit);
  const double smoothing = std::clamp(1.0 / static_cast<double>(num_observed_), kSmoothing, kFirstSmoothing);
  const StepCosts& now = model_.costs();
  const StepCosts& prior = prior_.costs();
  const double attention = model_.attention_us(shape) / predicted_us;
  const bool row_bound = shape.num_rows * now.row_us > model_.sweep_us(shape.num_rows);
  const bool product_bound = static_cast<double>(shape.attended_tokens) * now.attended_us >
                             static_cast<double>(shape.context_tokens) * now.context_us;
  // The smallest change of the parameters' logarithms that moves the prediction's by `step`.
  const double norm = attention * attention + (1.0 - attention) * (1.0 - attention);
  const double step = smoothing * log_ratio;
  const double weights_step = step * (1.0 - attention) / norm;
  const double attention_step = step * attention / norm;
  const auto moved = [](double value, double from, double by) {
    return std::clamp(value * std::exp(by), from / kPriorFactor, from * kPriorFactor);
  };
  StepCosts next = now;
  if (row_bound) {
    next.row_us = moved(now.row_us, prior.row_us, weights_step);
  } else {
    next.dense_us = moved(now.dense_us, prior.dense_us, weights_step);
    next.experts_us = moved(now.experts_us, prior.experts_us, weights_step);
  }
  if (product_bound) {
    next.attended_us = moved(now.attended_us, prior.attended_us, attention_step);
  } else {
    next.context_us = moved(now.context_us, prior.context_us, attention_step);
  }
  model_ = StepModel(next);
}

StepModel prior_step_model(const ModelConfig& config, const Planning& planning) {
  const MachineRates& rates = planning.rates;
  const Policy& policy = *planning.policy;
  const bool has_device = planning.residency.has_device;
  const double dense_bytes = has_device ? rates.device_bytes : rates.host_bytes;
  const double dense_flops = has_device ? rates.device_flops : rates.host_flops;
  const double kv_bytes = has_device && planning.kv == KvPlacement::kDevice ? rates.device_bytes : rates.host_bytes;
  // Who streams every expert asks the link alone; else the host takes its share of what is absent.
  const double absent = absent_share(config, planning);
  const bool shares = policy.uses_device && !policy.streams_all && absent > 0.0;
  double absent_bytes = policy.streams_all ? rates.link_bytes : rates.host_bytes;
  if (shares) absent_bytes += rates.link_bytes;
  const auto experts = static_cast<double>(expert_weight_bytes(config));
  const double chosen = chosen_share(config);
  const double expert_flops = policy.uses_device ? rates.device_flops : rates.host_flops;
  StepCosts costs;
  costs.dense_us = static_cast<double>(dense_weight_bytes(config)) / dense_bytes;
  costs.experts_us = experts * absent / absent_bytes;
  if (absent < 1.0) costs.experts_us += experts * (1.0 - absent) / rates.device_bytes;
  costs.expert_share = policy.streams_all && absent > 0.0 ? 1.0 : chosen;
  if (shares) {
    costs.link_share = rates.link_bytes / absent_bytes;
    costs.host_rows = rates.host_flops / rates.host_bytes * kBytesPerWeight / kFlopsPerWeight;
  }
  costs.row_us = kFlopsPerWeight *
                 (active_dense_weights(config) / dense_flops + experts / kBytesPerWeight * chosen / expert_flops);
  costs.context_us = static_cast<double>(config.kv_bytes_per_token()) / kv_bytes;
  // Prompts attend on the device wherever their KV is to be.
  costs.attended_us = 4.0 * config.q_size() * config.num_layers / dense_flops;
  return StepModel(costs);
}

}  // namespace moed
