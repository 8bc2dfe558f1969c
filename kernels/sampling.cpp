#include "kernels/sampling.h"

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

// Most distributions hold their mass in so many tokens.
constexpr int32_t kFirstCandidates = 64;
constexpr int32_t kReservedCandidates = 4096;

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

namespace {

struct Weights {
  float peak = 0.0F;
  float inverse_temperature = 1.0F;
  float weight_min = 0.0F;  // of the peak's weight, which is 1
  float operator()(float logit) const {
    const float weight = exp_negative((logit - peak) * inverse_temperature);
    return weight < weight_min ? 0.0F : weight;
  }
};

// No prefix is cut: walks the tokens in order of id.
int32_t draw_any(std::span<const float> logits, const Weights& weights, double uniform, std::vector<double>& sums) {
  double left = uniform * sum_weights(logits, weights.peak, weights.inverse_temperature, weights.weight_min, sums);
  size_t block = 0;
  while (block + 1 < sums.size() && left >= sums[block]) left -= sums[block++];
  // Rounding may leave a remainder beyond the last block with any weight.
  while (block > 0 && sums[block] == 0.0) --block;
  const auto begin = static_cast<int32_t>(block) * kSumBlock;
  const auto end = std::min(begin + kSumBlock, static_cast<int32_t>(logits.size()));
  int32_t chosen = -1;
  for (int32_t token = begin; token < end; ++token) {
    const float weight = weights(logits[token]);
    if (weight == 0.0F) continue;
    chosen = token;
    if (left < weight) break;
    left -= weight;
  }
  return chosen;
}

// How many of the sorted candidates top_p keeps: the shortest prefix that holds its share of `total`; nothing when they
// hold less.
size_t prefix_of_mass(std::span<const Candidate> candidates, const Weights& weights, double mass) {
  double held = 0.0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    held += weights(candidates[i].logit);
    if (held >= mass) return i + 1;
  }
  return 0;
}

// The token at which so much of the mass is passed; rounding may leave a remainder beyond the last.
int32_t walk(std::span<const Candidate> candidates, const Weights& weights, double left) {
  int32_t chosen = candidates.front().token;
  for (const Candidate& candidate : candidates) {
    const float weight = weights(candidate.logit);
    if (weight == 0.0F) break;
    chosen = candidate.token;
    if (left < weight) break;
    left -= weight;
  }
  return chosen;
}

int32_t draw_prefix(std::span<const Candidate> candidates, const Weights& weights, double uniform) {
  double total = 0.0;
  for (const Candidate& candidate : candidates) total += weights(candidate.logit);
  return walk(candidates, weights, uniform * total);
}

// draw_prefix() of the shortest prefix that holds `mass`, of a distribution so wide that sorting it would be dear.
int32_t draw_wide(std::span<const float> logits, const Weights& weights, double mass, double uniform,
                  SamplingScratch& scratch) {
  std::vector<double>& masses = scratch.bin_masses;
  bin_weights(logits, weights.peak, weights.inverse_temperature, weights.weight_min, masses);
  // The bin in which the prefix ends, and how much of it belongs.
  double before = 0.0;
  int32_t last = 0;
  for (int32_t bin = 0; bin < kNumBins; ++bin) {
    if (masses[bin] == 0.0) continue;
    if (bin > 0) before += masses[last];
    last = bin;
    if (before + masses[bin] >= mass) break;
  }
  collect_bin(logits, weights.peak, weights.inverse_temperature, last, scratch.candidates);
  const size_t kept = prefix_of_mass(scratch.candidates, weights, mass - before);
  if (kept > 0) scratch.candidates.resize(kept);
  double held = 0.0;
  for (const Candidate& candidate : scratch.candidates) held += weights(candidate.logit);

  double left = uniform * (before + held);
  int32_t chosen = 0;
  while (chosen < last && left >= masses[chosen]) left -= masses[chosen++];
  if (chosen < last) collect_bin(logits, weights.peak, weights.inverse_temperature, chosen, scratch.candidates);
  return walk(scratch.candidates, weights, left);
}

}  // namespace

void SamplingScratch::reserve(int32_t vocab) {
  block_sums.reserve((static_cast<size_t>(vocab) + kSumBlock - 1) / kSumBlock);
  bin_masses.reserve(kNumBins);
  candidates.reserve(std::min(vocab, kReservedCandidates));
}

int32_t draw_token(std::span<const float> logits, float peak, const SampleRow& row, SamplingScratch& scratch) {
  if (peak == -kInfinity) return -1;
  const auto vocab = static_cast<int32_t>(logits.size());
  const Weights weights{peak, 1.0F / row.temperature, row.min_p};
  const int32_t top_k = row.top_k > 0 && row.top_k < vocab ? row.top_k : vocab;
  if (top_k == vocab && row.top_p >= 1.0F) return draw_any(logits, weights, row.uniform, scratch.block_sums);

  std::vector<Candidate>& candidates = scratch.candidates;
  double total = 0.0;
  if (top_k < vocab) {
    top_logits(logits, top_k, candidates);
    for (const Candidate& candidate : candidates) total += weights(candidate.logit);
    if (row.top_p >= 1.0F) return draw_prefix(candidates, weights, row.uniform);
  } else {
    total = sum_weights(logits, peak, weights.inverse_temperature, weights.weight_min, scratch.block_sums);
    top_logits(logits, std::min(kFirstCandidates, vocab), candidates);
  }
  // Most distributions hold their mass in few tokens.
  const double mass = row.top_p * total;
  size_t kept = prefix_of_mass(candidates, weights, mass);
  if (kept == 0 && top_k == vocab && vocab > kFirstCandidates)
    return draw_wide(logits, weights, mass, row.uniform, scratch);
  if (kept == 0) kept = candidates.size();
  return draw_prefix(std::span(candidates).first(kept), weights, row.uniform);
}

int32_t sample_logits(std::span<const float> logits, const SampleRow& row, SamplingScratch& scratch) {
  const LogitsPeak peak = logits_peak(logits);
  if (peak.has_nan || !(peak.logit < kInfinity)) return -1;
  if (row.temperature < kTemperatureMin) return peak.token;
  return draw_token(logits, peak.logit, row, scratch);
}

}  // namespace moed
