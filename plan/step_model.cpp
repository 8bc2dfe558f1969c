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

double corrected(double value, double prior, double exponent, double log_ratio) {
  return std::clamp(value * std::exp(exponent * log_ratio), prior / kPriorFactor, prior * kPriorFactor);
}

StepShape together(const StepShape& a, const StepShape& b) {
  return {.num_sequences = a.num_sequences + b.num_sequences,
          .num_rows = a.num_rows + b.num_rows,
          .num_sampled = a.num_sampled + b.num_sampled,
          .context_tokens = a.context_tokens + b.context_tokens};
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

double StepModel::predict_us(const StepShape& shape) const {
  if (shape.num_rows == 0) return 0.0;
  return std::max(sweep_us_, shape.num_rows * row_us_) + static_cast<double>(shape.context_tokens) * context_us_;
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
  const double attention = static_cast<double>(shape.context_tokens) * model_.context_us() / predicted_us;
  const bool row_bound = shape.num_rows * model_.row_us() > model_.sweep_us();
  // The smallest change of the parameters' logarithms that moves the prediction's by `step`.
  const double norm = attention * attention + (1.0 - attention) * (1.0 - attention);
  const double product_share = (1.0 - attention) / norm;
  const double sweep_share = row_bound ? 0.0 : product_share;
  const double row_share = row_bound ? product_share : 0.0;
  const double step = smoothing * log_ratio;
  model_ = StepModel(corrected(model_.sweep_us(), prior_.sweep_us(), sweep_share, step),
                     corrected(model_.row_us(), prior_.row_us(), row_share, step),
                     corrected(model_.context_us(), prior_.context_us(), attention / norm, step));
}

StepModel prior_step_model(const ModelConfig& config, double bytes_per_us, double flops_per_us) {
  const auto weight_bytes = static_cast<double>(dense_weight_bytes(config) + expert_weight_bytes(config));
  const double flops_per_row = 2.0 * active_weights(config);
  const double context_flops = 4.0 * config.q_size() * config.num_layers;
  const auto context_bytes = static_cast<double>(config.kv_bytes_per_token());
  return StepModel(weight_bytes / bytes_per_us, flops_per_row / flops_per_us,
                   std::max(context_flops / flops_per_us, context_bytes / bytes_per_us));
}

}  // namespace moed
