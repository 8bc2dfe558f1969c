#include "kernels/sampling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

namespace moed {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(Logits, ExponentialIsAccurateAndZeroFarDown) {
  double worst = 0.0;
  for (float x = 0.0F; x > -86.9F; x -= 0.00137F) {
    worst = std::max(worst, std::abs(exp_negative(x) / std::exp(static_cast<double>(x)) - 1.0));
  }
  EXPECT_LT(worst, 2e-7);
  EXPECT_EQ(exp_negative(0.0F), 1.0F);
  EXPECT_EQ(exp_negative(-87.5F), 0.0F);
  EXPECT_EQ(exp_negative(-kInfinity), 0.0F);
}

TEST(Logits, PeakTakesTheLowerIdAndSeesNaNs) {
  for (const int size : {1, 2, 15, 16, 17, 31, 33, 1000}) {
    for (int at = 0; at < size; at += 1 + size / 7) {
      std::vector<float> logits(size, -1.5F);
      logits[at] = 3.0F;
      logits[size - 1] = 3.0F;
      EXPECT_EQ(logits_peak(logits).token, at);
      EXPECT_FALSE(logits_peak(logits).has_nan);
      logits[at] = std::nanf("");
      EXPECT_TRUE(logits_peak(logits).has_nan) << size << " " << at;
    }
  }
  EXPECT_EQ(logits_peak(std::vector<float>(40, -kInfinity)).logit, -kInfinity);
}

TEST(Logits, TopEqualsASortWithTiesToTheLowerId) {
  std::mt19937_64 random(5);
  for (int round = 0; round < 200; ++round) {
    const int size = 1 + static_cast<int>(random() % 700);
    std::vector<float> logits(size);
    const int levels = 1 + static_cast<int>(random() % 300);
    for (float& logit : logits) logit = static_cast<float>(random() % levels);
    const auto shape = random() % 4;
    if (shape == 1) std::sort(logits.begin(), logits.end());
    if (shape == 2) logits[random() % size] = -kInfinity;
    std::vector<int32_t> order(size);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    while (logits[order.back()] == -kInfinity && order.size() > 1) order.pop_back();
    const int count = static_cast<int>(random() % (size + 3));
    std::vector<Candidate> best;
    top_logits(logits, count, best);
    ASSERT_EQ(best.size(), std::min<size_t>(count, order.size()));
    for (size_t i = 0; i < best.size(); ++i) {
      EXPECT_EQ(best[i].token, order[i]);
      EXPECT_EQ(best[i].logit, logits[order[i]]);
    }
  }
}

}  // namespace
}  // namespace moed
