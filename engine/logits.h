#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace moed {

// Pure arithmetic on one row of logits, [vocab] fp32, written so that compilers vectorise it on any CPU. Entries of
// -infinity are tokens that cannot be chosen.

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

}  // namespace moed
