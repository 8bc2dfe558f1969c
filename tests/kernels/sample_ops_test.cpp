#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "tests/kernels/ops_fixture.h"

namespace moed {
namespace {

// fp32 weights and their sums are off by some 1e-7; a nearer decision may go either way.
constexpr double kMarginMin = 1e-6;

class SampleCases {
 public:
  SampleCases(int32_t vocab, int32_t num_rows, uint64_t seed) : random_(seed), vocab_(vocab) {
    for (int32_t row = 0; row < num_rows; ++row) {
      add_logits();
      add_row();
    }
  }
  std::vector<float> logits;  // [rows, stride()]
  std::vector<SampleRow> rows;
  int64_t stride() const { return vocab_ + 3; }
  std::span<const float> of_row(size_t row) const {
    return std::span(logits).subspan(row * stride(), static_cast<size_t>(vocab_));
  }
  Matrix<const float> matrix() const { return {logits.data(), static_cast<int32_t>(rows.size()), vocab_, stride()}; }

 private:
  template <class T>
  T one_of(std::initializer_list<T> all) {
    return all.begin()[random_() % all.size()];
  }

  void add_logits() {
    // Of a large vocabulary only steep distributions have edges that are far enough apart.
    const float deviation = vocab_ > 10000 ? one_of({5.0F, 8.0F}) : one_of({0.0F, 0.1F, 2.0F, 6.0F});
    std::normal_distribution<float> normal(one_of({0.0F, -20.0F, 15.0F}), 1.0F);
    const bool ties = random_() % 3 == 0;
    const bool holes = random_() % 3 == 0;
    for (int32_t token = 0; token < stride(); ++token) {
      float x = deviation * normal(random_);
      if (ties) x = std::round(x * 4.0F) / 4.0F;
      if (ties && x == 0.0F) x = std::copysign(x, one_of({-1.0F, 1.0F}));
      if (holes && random_() % 4 == 0) x = one_of({-INFINITY, -1e30F});
      logits.push_back(token < vocab_ ? x : NAN);
    }
    if (holes && std::none_of(logits.end() - stride(), logits.end() - 3, [](float x) { return x > -INFINITY; })) {
      logits[logits.size() - stride()] = 1.0F;
    }
  }

  void add_row() {
    SampleRow row;
    row.temperature = one_of({0.0F, 1e-6F, 0.05F, 0.7F, 1.0F, 1.0F, 1.6F});
    if (random_() % 3 == 0) row.top_k = one_of({1, 2, 5, 40, 500, vocab_, vocab_ + 9});
    if (random_() % 2 == 0) row.top_p = one_of({1e-9F, 0.3F, 0.47F, 0.9F, 0.95F, 0.9999F});
    if (random_() % 3 == 0) row.min_p = one_of({1e-4F, 0.05F, 0.3F, 1.0F});
    row.uniform = std::uniform_real_distribution<double>(0.0, 1.0)(random_);
    if (random_() % 20 == 0) row.uniform = one_of({0.0, 1.0 - 0x1p-53});
    rows.push_back(row);
  }

  std::mt19937_64 random_;
  const int32_t vocab_;
};

Sample sample_of(const SampleCases& cases, std::vector<int32_t>& tokens) {
  tokens.assign(cases.rows.size(), -7);
  return {.logits = cases.matrix(), .rows = cases.rows, .tokens = tokens.data()};
}

TEST_P(OpsTest, SampleEqualsAFullSort) {
  int num_compared = 0;
  int num_close = 0;
  for (const auto& [vocab, num_rows] :
       {std::pair{1, 10}, {7, 120}, {31, 60}, {33, 60}, {127, 120}, {1000, 120}, {2049, 80}, {151936, 16}}) {
    const SampleCases cases(vocab, num_rows, 77 + vocab);
    std::vector<int32_t> tokens;
    ops().sample(sample_of(cases, tokens), *stream_);
    for (size_t row = 0; row < cases.rows.size(); ++row) {
      const SampleRow& how = cases.rows[row];
      const reference::Sampled wanted = reference::sample(cases.of_row(row), how);
      (wanted.margin < kMarginMin ? num_close : num_compared) += 1;
      if (wanted.margin < kMarginMin) continue;
      EXPECT_EQ(tokens[row], wanted.token)
          << "row " << row << " of vocab " << vocab << ": temperature " << how.temperature << ", top_k " << how.top_k
          << ", top_p " << how.top_p << ", min_p " << how.min_p << ", uniform " << how.uniform << ", margin "
          << wanted.margin;
    }
  }
  EXPECT_GT(num_compared, 550);
  EXPECT_LT(num_close, 8) << "of " << num_close + num_compared;
}

// Weights that are powers of two have sums without rounding, so that the very edges of cuts and draws are defined.
TEST_P(OpsTest, SampleKeepsToItsEdges) {
  const std::vector<float> flat(1000, 3.0F);
  const auto token_of = [&](std::span<const float> logits, const SampleRow& row) {
    int32_t token = -7;
    const Matrix<const float> matrix(logits.data(), 1, static_cast<int32_t>(logits.size()));
    ops().sample({.logits = matrix, .rows = {&row, 1}, .tokens = &token}, *stream_);
    return token;
  };
  for (const int32_t size : {1, 2, 4, 64, 512}) {
    const std::span<const float> logits(flat.data(), static_cast<size_t>(size));
    for (int32_t i = 0; i < size; i += std::max(1, size / 5)) {
      const double edge = static_cast<double>(i) / size;
      for (const double uniform : {edge, edge + 0.5 / size, edge + (1.0 - 0x1p-20) / size}) {
        EXPECT_EQ(token_of(logits, {.temperature = 1.0F, .uniform = uniform}), i) << uniform << " of " << size;
        EXPECT_EQ(token_of(logits, {.temperature = 1.0F, .top_p = 1.0F - 0x1p-20F, .uniform = uniform}), i);
      }
    }
    // Half of the tokens are half of the weights: the lower ids.
    const int32_t half = std::max(1, size / 2);
    const double last = 1.0 - 0x1p-30;
    EXPECT_EQ(token_of(logits, {.temperature = 1.0F, .top_p = 0.5F, .uniform = last}), half - 1) << size;
    EXPECT_EQ(token_of(logits, {.temperature = 1.0F, .top_k = half, .uniform = last}), half - 1) << size;
    EXPECT_EQ(token_of(logits, {.temperature = 1.0F, .top_k = half, .top_p = 0.5F, .uniform = last}),
              std::max(1, half / 2) - 1)
        << size;
  }
}

TEST_P(OpsTest, SampleTellsBrokenLogits) {
  for (const int32_t vocab : {1, 40, 3000}) {
    for (const int32_t at : {0, vocab / 2, vocab - 1}) {
      for (const float broken : {NAN, -NAN, INFINITY}) {
        std::vector<float> logits(vocab, -1.0F);
        logits[at] = broken;
        const std::vector<SampleRow> rows = {
            {}, {.temperature = 1.0F}, {.temperature = 1.0F, .top_k = 3, .top_p = 0.5F, .min_p = 0.1F}};
        std::vector<int32_t> tokens(rows.size(), -7);
        ops().sample({.logits = {logits.data(), 3, vocab, 0}, .rows = rows, .tokens = tokens.data()}, *stream_);
        EXPECT_EQ(tokens, std::vector<int32_t>(3, -1)) << broken << " at " << at << " of " << vocab;
      }
    }
  }
  const std::vector<float> nothing(100, -INFINITY);
  const std::vector<SampleRow> rows = {{}, {.temperature = 1.0F}, {.temperature = 1.0F, .top_p = 0.5F}};
  std::vector<int32_t> tokens(rows.size(), -7);
  ops().sample({.logits = {nothing.data(), 3, 100, 0}, .rows = rows, .tokens = tokens.data()}, *stream_);
  EXPECT_EQ(tokens, (std::vector<int32_t>{0, -1, -1}));
}

// A row's token does not depend on those beside it, nor on what ran before.
TEST_P(OpsTest, SampleTakesRowsAlone) {
  const SampleCases cases(1000, 60, 5);
  std::vector<int32_t> together;
  ops().sample(sample_of(cases, together), *stream_);
  for (size_t row = cases.rows.size(); row-- > 0;) {
    int32_t alone = -7;
    const Matrix<const float> logits = cases.matrix().slice(static_cast<int32_t>(row), 1);
    ops().sample({.logits = logits, .rows = {&cases.rows[row], 1}, .tokens = &alone}, *stream_);
    EXPECT_EQ(alone, together[row]) << "row " << row;
  }
}

}  // namespace
}  // namespace moed
