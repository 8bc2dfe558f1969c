#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moed {
namespace {

// Low frequencies are divided by factor, high ones stay, those between are blended.
double llama3(const RopeConfig& rope, double frequency) {
  const double turns = rope.original_max_positions * frequency / (2.0 * std::numbers::pi);
  if (turns < rope.low_freq_factor) return frequency / rope.factor;
  if (turns > rope.high_freq_factor) return frequency;
  const double smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0 - smooth) * frequency / rope.factor + smooth * frequency;
}

// The dimension whose frequency turns `rotations` times over the original context.
double yarn_correction_dim(const RopeConfig& rope, double rotations) {
  return rope.rotary_dim * std::log(rope.original_max_positions / (rotations * 2.0 * std::numbers::pi)) /
         (2.0 * std::log(rope.theta));
}

void apply_yarn(const RopeConfig& rope, std::vector<double>* frequencies) {
  double low = yarn_correction_dim(rope, rope.beta_fast);
  double high = yarn_correction_dim(rope, rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, rope.rotary_dim - 1.0);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < frequencies->size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    double& frequency = (*frequencies)[i];
    frequency = frequency / rope.factor * ramp + frequency * (1.0 - ramp);
  }
}

}  // namespace

std::vector<double> rope_frequencies(const RopeConfig& rope) {
  std::vector<double> frequencies(rope.rotary_dim / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    double frequency = std::pow(rope.theta, -2.0 * static_cast<double>(i) / rope.rotary_dim);
    if (rope.scaling == RopeConfig::Scaling::kLinear) frequency /= rope.factor;
    if (rope.scaling == RopeConfig::Scaling::kLlama3) frequency = llama3(rope, frequency);
    frequencies[i] = frequency;
  }
  if (rope.scaling == RopeConfig::Scaling::kYarn) apply_yarn(rope, &frequencies);
  return frequencies;
}

std::vector<float> rope_cos_sin(const RopeConfig& rope, int32_t positions) {
  // A long context has millions of entries: cos and sin of 256 k + r come from those of 256 k and of r, exact to a few
  // ulp of a double.
  constexpr int32_t kRun = 256;
  const std::vector<double> frequencies = rope_frequencies(rope);
  const int64_t half = static_cast<int64_t>(frequencies.size());
  std::vector<double> cosines(kRun), sines(kRun);
  std::vector<float> table(static_cast<size_t>(positions) * half * 2);
  for (int64_t i = 0; i < half; ++i) {
    for (int32_t r = 0; r < kRun; ++r) {
      cosines[r] = std::cos(r * frequencies[i]);
      sines[r] = std::sin(r * frequencies[i]);
    }
    for (int32_t begin = 0; begin < positions; begin += kRun) {
      const double c = std::cos(begin * frequencies[i]) * rope.attention_factor;
      const double s = std::sin(begin * frequencies[i]) * rope.attention_factor;
      const int32_t count = std::min(kRun, positions - begin);
      for (int32_t r = 0; r < count; ++r) {
        float* row = table.data() + (begin + r) * half * 2;
        row[i] = static_cast<float>(c * cosines[r] - s * sines[r]);
        row[half + i] = static_cast<float>(s * cosines[r] + c * sines[r]);
      }
    }
  }
  return table;
}

}  // namespace moed
