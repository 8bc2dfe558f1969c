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

StepShape together(const StepShape& a, const StepShape& b) {
  return {.num_sequences = a.num_sequences + b.num_sequences,
          .num_rows = a.num_rows + b.num_rows,
          .num_sampled = a.num_sampled + b.num_sampled,
          .context_tokens = a.context_tokens + b.context_tokens,
          .attended_tokens = a.attended_tokens + b.attended_tokens};
}

// Weights whose products one row takes part in: all dense ones but the embedding table, and the chosen experts.
double active_weights(const ModelConfig& config) {
  double weights = static_cast<double>(dense_weight_bytes(config)) / kBytesPerWeight;
  if (!config.tied_embeddings) weights -= static_cast<double>(config.vocab_size) * config.hidden_size;
  if (config.moe.num_experts > 0) {
    weights += static_cast<double>(expert_weight_bytes(config)) / kBytesPerWeight * config.moe.router.top_k /
               config.moe.num_experts;
  }
  return weights;
}

}  // namespace

double StepModel::sweep_us(int32_t num_rows) const {
  return costs_.dense_us + costs_.experts_us * (1.0 - std::pow(1.0 - costs_.expert_share, num_rows));
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

StepModel prior_step_model(const ModelConfig& config, double bytes_per_us, double flops_per_us) {
  const auto num_experts = static_cast<double>(config.moe.num_experts);
  return StepModel(StepCosts{.dense_us = static_cast<double>(dense_weight_bytes(config)) / bytes_per_us,
                             .experts_us = static_cast<double>(expert_weight_bytes(config)) / bytes_per_us,
                             .expert_share = num_experts > 0.0 ? config.moe.router.top_k / num_experts : 0.0,
                             .row_us = 2.0 * active_weights(config) / flops_per_us,
                             .context_us = static_cast<double>(config.kv_bytes_per_token()) / bytes_per_us,
                             .attended_us = 4.0 * config.q_size() * config.num_layers / flops_per_us});
}

}  // namespace moed
