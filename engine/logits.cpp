#include "engine/logits.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace moed {
namespace {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// condition ? x : 0, without the branch that keeps compilers from vectorising.
float kept_if(bool condition, float x) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & (0U - static_cast<uint32_t>(condition)));
}

// Addends further down than this are 0: see exp_negative().
constexpr float kFarthest = 87.5F;
constexpr float kBinsPerUnit = static_cast<float>(kNumBins) / 88.0F;

bool better(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

}  // namespace

LogitsPeak logits_peak(std::span<const float> logits) {
  const auto size = static_cast<int32_t>(logits.size());
  float most[kLanes];
  int32_t nans[kLanes] = {};
  std::fill_n(most, kLanes, -kInfinity);
  const int32_t whole = size / kLanes * kLanes;
  for (int32_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float x = logits[i + lane];
      most[lane] = x > most[lane] ? x : most[lane];
      nans[lane] |= x != x ? 1 : 0;
    }
  }
  LogitsPeak peak{.token = 0, .logit = -kInfinity};
  for (int lane = 0; lane < kLanes; ++lane) {
    peak.logit = std::max(peak.logit, most[lane]);
    peak.has_nan |= nans[lane] != 0;
  }
  for (int32_t i = whole; i < size; ++i) {
    peak.logit = logits[i] > peak.logit ? logits[i] : peak.logit;
    peak.has_nan |= std::isnan(logits[i]);
  }
  int32_t begin = 0;
  for (; begin < whole; begin += kLanes) {
    int32_t equal = 0;
    for (int lane = 0; lane < kLanes; ++lane) equal |= logits[begin + lane] == peak.logit ? 1 : 0;
    if (equal != 0) break;
  }
  const auto at = std::find(logits.begin() + begin, logits.end(), peak.logit);
  if (at != logits.end()) peak.token = static_cast<int32_t>(at - logits.begin());
  return peak;
}

// 2^n * e^r with |r| <= ln(2) / 2; e^r by its Taylor polynomial, whose next term is below 2e-8 there.
float exp_negative(float x) {
  constexpr float kLog2E = 1.44269504F;
  constexpr float kLn2High = 0.693359375F;
  constexpr float kLn2Low = -2.12194440e-4F;
  constexpr float kRound =
      12582912.0F;  // 1.5 * 2^23: adding it rounds to a whole number, which then stands in the low bits
  // Whole numbers compare without a branch where floats do not; of floats of one sign they keep the order.
  constexpr int32_t kFar = std::bit_cast<int32_t>(87.0F);
  const int32_t distance = std::bit_cast<int32_t>(x) & 0x7fffffff;
  const float clamped = -std::bit_cast<float>(std::min(distance, kFar));
  const float shifted = clamped * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float p = 1.0F / 5040.0F;
  p = p * r + 1.0F / 720.0F;
  p = p * r + 1.0F / 120.0F;
  p = p * r + 1.0F / 24.0F;
  p = p * r + 1.0F / 6.0F;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  const float scale = std::bit_cast<float>((exponent + 127) << 23);
  return kept_if(distance <= kFar, p * scale);
}

double sum_weights(std::span<const float> logits, float peak, float inverse_temperature, float weight_min,
                   std::vector<double>& sums) {
  const auto size = static_cast<int32_t>(logits.size());
  sums.clear();
  double total = 0.0;
  for (int32_t begin = 0; begin < size; begin += kSumBlock) {
    const int32_t count = std::min(kSumBlock, size - begin);
    const float* block = logits.data() + begin;
    float lanes[kLanes] = {};
    const int32_t whole = count / kLanes * kLanes;
    for (int32_t i = 0; i < whole; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const float weight = exp_negative((block[i + lane] - peak) * inverse_temperature);
        lanes[lane] += kept_if(weight >= weight_min, weight);
      }
    }
    double sum = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    for (int32_t i = whole; i < count; ++i) {
      const float weight = exp_negative((block[i] - peak) * inverse_temperature);
      sum += kept_if(weight >= weight_min, weight);
    }
    sums.push_back(sum);
    total += sum;
  }
  return total;
}

void bin_weights(std::span<const float> logits, float peak, float inverse_temperature, float weight_min,
                 std::vector<double>& masses) {
  const auto size = static_cast<int32_t>(logits.size());
  masses.assign(kNumBins, 0.0);
  for (int32_t begin = 0; begin < size; begin += kSumBlock) {
    const int32_t count = std::min(kSumBlock, size - begin);
    const float* block = logits.data() + begin;
    float weights[kSumBlock];
    int32_t bins[kSumBlock];
    for (int32_t i = 0; i < count; ++i) {
      const float distance = (peak - block[i]) * inverse_temperature;
      const float weight = exp_negative(-distance);
      weights[i] = kept_if(weight >= weight_min, weight);
      bins[i] = static_cast<int32_t>(std::min(distance, kFarthest) * kBinsPerUnit);
    }
    for (int32_t i = 0; i < count; ++i) masses[bins[i]] += weights[i];
  }
}

void collect_bin(std::span<const float> logits, float peak, float inverse_temperature, int32_t bin,
                 std::vector<Candidate>& tokens) {
  tokens.clear();
  const auto size = static_cast<int32_t>(logits.size());
  const auto low = static_cast<float>(bin);
  const auto is_in = [&](float logit) {
    const float position = std::min((peak - logit) * inverse_temperature, kFarthest) * kBinsPerUnit;
    return position >= low && position < low + 1.0F;
  };
  for (int32_t begin = 0; begin < size; begin += kLanes) {
    const int32_t end = std::min(begin + kLanes, size);
    if (end - begin == kLanes) {
      int32_t any = 0;
      for (int lane = 0; lane < kLanes; ++lane) any |= is_in(logits[begin + lane]) ? 1 : 0;
      if (any == 0) continue;
    }
    for (int32_t i = begin; i < end; ++i) {
      if (is_in(logits[i])) tokens.push_back({i, logits[i]});
    }
  }
  std::sort(tokens.begin(), tokens.end(), better);
}

// Keeps up to two times `count` candidates above a floor; when they are that many, the worse half goes and the floor
// rises.
void top_logits(std::span<const float> logits, int32_t count, std::vector<Candidate>& best) {
  const auto size = static_cast<int32_t>(logits.size());
  const auto wanted = static_cast<size_t>(std::clamp(count, 0, size));
  best.clear();
  if (wanted == 0) return;
  float floor = -kInfinity;
  const size_t room = std::max<size_t>(2 * wanted, 64);
  for (int32_t begin = 0; begin < size; begin += kLanes) {
    const int32_t end = std::min(begin + kLanes, size);
    if (end - begin == kLanes) {
      int32_t above = 0;
      for (int lane = 0; lane < kLanes; ++lane) above |= logits[begin + lane] > floor ? 1 : 0;
      if (above == 0) continue;
    }
    for (int32_t i = begin; i < end; ++i) {
      if (logits[i] > floor) best.push_back({i, logits[i]});
    }
    if (best.size() >= room) {
      std::nth_element(best.begin(), best.begin() + static_cast<int64_t>(wanted) - 1, best.end(), better);
      best.resize(wanted);
      floor = best.back().logit;
    }
  }
  if (best.size() > wanted) {
    std::nth_element(best.begin(), best.begin() + static_cast<int64_t>(wanted) - 1, best.end(), better);
    best.resize(wanted);
  }
  std::sort(best.begin(), best.end(), better);
}

}  // namespace moed
