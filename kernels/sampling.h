#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/ops.h"

namespace moed {

// Pure arithmetic on one row of logits, [vocab] fp32, written so that compilers vectorise it on any CPU. Entries of
// -infinity are tokens that cannot be chosen. HostOps::sample and the engine's sampler call the same functions, so that
// a row has the same token wherever the host computes it.

struct LogitsPeak {
  int32_t token = 0;  // of the largest logit, the lowest on ties
  float logit = 0.0F;
  bool has_nan = false;
};
LogitsPeak logits_peak(std::span<const float> logits);

// exp(x) for x <= 0 within 2e-7 relative; 0 below -87.
float exp_negative(float x);

// Sums exp((logit - peak) * inverse_temperature) over each run of kSumBlock tokens, leaving out addends below
// `weight_min`; sums[b] is of tokens [b * kSumBlock, ...). Returns their total. REQUIRES: peak is the largest logit.
inline constexpr int32_t kSumBlock = 256;
double sum_weights(std::span<const float> logits, float peak, float inverse_temperature, float weight_min,
                   std::vector<double>& sums);

// Sorts tokens into bins of equal width by (peak - logit) * inverse_temperature; masses[b] is the sum of bin b's
// addends as in sum_weights(). The bins cover all addends above 0, the best come first.
inline constexpr int32_t kNumBins = 4096;
void bin_weights(std::span<const float> logits, float peak, float inverse_temperature, float weight_min,
                 std::vector<double>& masses);

struct Candidate {
  int32_t token = 0;
  float logit = 0.0F;
};
// The `count` largest logits, best first, ties to the lower token; fewer when fewer are above -infinity.
void top_logits(std::span<const float> logits, int32_t count, std::vector<Candidate>& best);

// The tokens of one of those bins, best first, ties to the lower token.
void collect_bin(std::span<const float> logits, float peak, float inverse_temperature, int32_t bin,
                 std::vector<Candidate>& tokens);

// Workspaces that calls share, of one thread.
struct SamplingScratch {
  std::vector<double> block_sums;
  std::vector<double> bin_masses;
  std::vector<Candidate> candidates;
  // For rows of `vocab` logits. A row with many candidates (a top_k of thousands, a flat distribution) grows it.
  void reserve(int32_t vocab);
};

// The token that Sample's comment defines, of logits whose largest is `peak`; -1: none has any weight. REQUIRES:
// row.temperature >= kTemperatureMin, no NaN, peak below infinity.
int32_t draw_token(std::span<const float> logits, float peak, const SampleRow& row, SamplingScratch& scratch);

// The same with its greedy case; -1 also where a logit is a NaN or +infinity.
int32_t sample_logits(std::span<const float> logits, const SampleRow& row, SamplingScratch& scratch);

}  // namespace moed
