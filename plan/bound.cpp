#include "plan/bound.h"

#include <algorithm>
#include <cmath>

namespace moed {
namespace {

constexpr double kBytesPerWeight = 2.0;

double expert_bytes(const ModelConfig& config) {
  return 3.0 * config.hidden_size * config.moe.intermediate_size * kBytesPerWeight;
}

// Experts of a layer that at least one of the rows chooses.
double chosen_experts(const ModelConfig& config, int64_t rows) {
  const double experts = config.moe.num_experts;
  const double missed = 1.0 - config.moe.router.top_k / experts;
  return experts * (1.0 - std::pow(missed, static_cast<double>(rows)));
}

void add_experts(const ModelConfig& config, const StepShape& shape, const Planning& planning, LeastWork* work) {
  const auto layers = static_cast<double>(std::count(config.layers.begin(), config.layers.end(), LayerKind::kMoe));
  if (layers == 0.0) return;
  const double bytes = expert_bytes(config);
  const double all = layers * config.moe.num_experts;
  const double chosen = layers * chosen_experts(config, shape.num_rows);
  const double flops =
      layers * shape.num_rows * config.moe.router.top_k * 6.0 * config.hidden_size * config.moe.intermediate_size;
  if (!planning.policy->uses_device) {
    work->host_bytes = chosen * bytes;
    work->host_flops = flops;
    return;
  }
  const double absent = absent_share(config, planning);
  const bool whole = planning.policy->streams_all;
  if (whole) {
    work->link_bytes = all * absent * bytes;
  } else {
    work->shared_bytes = chosen * absent * bytes;
    work->shared_flops = flops * absent;
  }
  work->device_bytes += chosen * bytes * (whole ? 1.0 : 1.0 - absent);
  work->device_flops += flops * (whole ? 1.0 : 1.0 - absent);
}

// Weights that every pass reads, and their products.
void add_dense(const ModelConfig& config, const StepShape& shape, LeastWork* work) {
  const double hidden = config.hidden_size;
  const double attention = hidden * (config.q_size() + 2.0 * config.kv_size()) + hidden * config.q_size();
  for (const LayerKind kind : config.layers) {
    double weights = attention;
    if (kind == LayerKind::kDense) weights += 3.0 * hidden * config.dense_intermediate_size;
    if (kind == LayerKind::kMoe) {
      weights += hidden * config.moe.num_experts + 3.0 * hidden * config.moe.shared_intermediate_size;
    }
    work->device_bytes += weights * kBytesPerWeight;
    work->device_flops += 2.0 * weights * shape.num_rows;
  }
  const double head = hidden * config.vocab_size;
  if (shape.num_sampled > 0) work->device_bytes += head * kBytesPerWeight;
  work->device_flops += 2.0 * head * shape.num_sampled;
}

}  // namespace

double MachineProfile::link_left(double host_share) const {
  const double share = std::clamp(host_share, 0.0, 1.0);
  for (size_t i = 1; i < interference.size(); ++i) {
    const Point& begin = interference[i - 1];
    const Point& end = interference[i];
    if (share > end.host_share) continue;
    const double part = (share - begin.host_share) / (end.host_share - begin.host_share);
    return begin.link_share + part * (end.link_share - begin.link_share);
  }
  return interference.empty() ? 1.0 : interference.back().link_share;
}

LeastWork least_work(const ModelConfig& config, const StepShape& shape, const Planning& planning,
                     double host_kv_share) {
  LeastWork work;
  add_dense(config, shape, &work);
  add_experts(config, shape, planning, &work);
  const double kv_bytes = static_cast<double>(shape.context_tokens * config.kv_bytes_per_token());
  const double kv_flops = 4.0 * static_cast<double>(shape.attended_tokens) * config.q_size() * config.num_layers;
  work.attention_bytes = host_kv_share * kv_bytes;
  work.attention_flops = host_kv_share * kv_flops;
  work.device_bytes += (1.0 - host_kv_share) * kv_bytes;
  work.device_flops += (1.0 - host_kv_share) * kv_flops;
  return work;
}

double Bound::us() const { return std::max({link_us, host_us, device_us}); }

const char* Bound::binding() const {
  if (us() == device_us) return "device";
  return us() == link_us ? "link" : "host";
}

Bound closed_form_bound(const MachineProfile& machine, const LeastWork& work) {
  Bound bound;
  bound.device_us = std::max(work.device_bytes / machine.device_bytes, work.device_flops / machine.device_flops);
  // The host's threads alone, and how much of host memory they take while they run.
  const double attention_us =
      std::max(work.attention_bytes / machine.attention_bytes, work.attention_flops / machine.attention_flops);
  const double experts_us = std::max(work.host_bytes / machine.host_bytes, work.host_flops / machine.host_flops);
  const double alone_us = attention_us + experts_us;
  const double rate = alone_us > 0.0 ? (work.attention_bytes + work.host_bytes) / alone_us : 0.0;
  const double left = machine.link_bytes * machine.link_left(rate / machine.host_bytes);
  // While both run the host gets what the link leaves, unless that is less than half.
  const auto beside = [&](double wanted) {
    return std::min(wanted, std::max(machine.host_bytes - left, machine.host_bytes / 2));
  };
  const double copy_us = work.link_bytes / machine.link_bytes;
  const double slow = rate > 0.0 ? rate / beside(rate) : 1.0;
  const double copied_beside_us = work.link_bytes / left;
  if (alone_us * slow <= copied_beside_us) {  // the host is done first; then the link has all of its rate
    bound.host_us = alone_us * slow;
    bound.link_us = bound.host_us + (work.link_bytes - left * bound.host_us) / machine.link_bytes;
  } else {  // the copies are
    bound.link_us = copied_beside_us;
    bound.host_us = copied_beside_us + (alone_us - copied_beside_us / slow);
  }
  bound.link_us = std::max(bound.link_us, copy_us);
  if (work.shared_bytes > 0.0) {
    // Either may take any of it, so both end together, and slow each other as long as it lasts.
    const double wanted =
        std::min(machine.host_bytes, machine.host_flops * work.shared_bytes / std::max(work.shared_flops, 1.0));
    const double link_rate = machine.link_bytes * machine.link_left(wanted / machine.host_bytes);
    const double host_rate = std::min(wanted, std::max(machine.host_bytes - link_rate, machine.host_bytes / 2));
    const double both_us = work.shared_bytes / std::max(host_rate + link_rate, machine.link_bytes);
    const double extra_us = both_us + std::min(bound.host_us, bound.link_us);
    bound.host_us = std::max(bound.host_us, extra_us);
    bound.link_us = std::max(bound.link_us, extra_us);
  }
  return bound;
}

}  // namespace moed
