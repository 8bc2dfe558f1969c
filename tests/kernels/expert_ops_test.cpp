#include <gtest/gtest.h>

#include <numeric>

#include "tests/kernels/ops_fixture.h"

namespace moed {
namespace {

using cases::Random;
using reference::kEpsBf16;
using reference::kEpsFloat;
using reference::tolerance;

// The ops behind the router, as OpsTest.
using ExpertOpsTest = OpsTest;

// top_k different experts for each row; some experts get none.
std::vector<int32_t> choose_experts(Random& random, int32_t rows, int32_t num_experts, int32_t top_k) {
  std::vector<int32_t> chosen;
  for (int32_t row = 0; row < rows; ++row) {
    std::vector<int32_t> order(num_experts);
    std::iota(order.begin(), order.end(), 0);
    for (int32_t i = 0; i < top_k; ++i) {
      std::swap(order[i], order[i + random.below(std::max(top_k, num_experts - 1) - i)]);
      chosen.push_back(order[i]);
    }
  }
  return chosen;
}

TEST_P(ExpertOpsTest, GroupMatchesBruteForce) {
  struct Case {
    int32_t rows, num_experts, top_k, choices;
  };
  for (const Case& c : {Case{1, 1, 1, 1}, Case{1, 8, 2, 2}, Case{5, 3, 3, 4}, Case{33, 60, 4, 5}, Case{512, 128, 8, 8},
                        Case{600, 256, 4, 4}, Case{0, 8, 2, 2}}) {
    SCOPED_TRACE(testing::Message() << c.rows << " rows, " << c.top_k << " of " << c.num_experts);
    Random random(c.rows + 1);
    const int32_t stride = c.top_k + 2;
    const std::vector<int32_t> chosen = choose_experts(random, c.rows, c.num_experts, c.top_k);
    std::vector<int32_t> experts(c.rows * stride, -9);
    for (size_t i = 0; i < chosen.size(); ++i) experts[i / c.top_k * stride + i % c.top_k] = chosen[i];
    std::vector<int32_t> wanted_offsets = {0};
    std::vector<int32_t> wanted_pairs;
    for (int32_t expert = 0; expert < c.num_experts; ++expert) {
      for (size_t i = 0; i < chosen.size(); ++i) {
        if (chosen[i] == expert) wanted_pairs.push_back(static_cast<int32_t>(i) / c.top_k * c.choices + i % c.top_k);
      }
      wanted_offsets.push_back(static_cast<int32_t>(wanted_pairs.size()));
    }
    for (const bool twice : {false, true}) {
      std::vector<int32_t> offsets(c.num_experts + 2, -7), host_offsets = offsets;
      std::vector<int32_t> pairs(chosen.size() + 1, -7), host_pairs = pairs;
      Group args;
      args.experts = Matrix<const int32_t>(experts.data(), c.rows, c.top_k, stride);
      args.num_experts = c.num_experts;
      args.choices = c.choices;
      args.offsets = offsets.data();
      args.pairs = pairs.data();
      if (twice) args.host_offsets = host_offsets.data();
      if (twice) args.host_pairs = host_pairs.data();
      ops().group(args, *stream_);
      EXPECT_EQ(offsets.back(), -7);
      EXPECT_EQ(pairs.back(), -7);
      if (twice) {
        EXPECT_EQ(host_offsets, offsets);
        EXPECT_EQ(host_pairs, pairs);
      }
      offsets.pop_back();
      pairs.pop_back();
      EXPECT_EQ(offsets, wanted_offsets);
      EXPECT_EQ(pairs, wanted_pairs);
    }
  }
}

// Which experts a call leaves out: none, all but each third, all.
bool left_out(int how, int32_t expert) { return how == 2 || (how == 1 && expert % 3 != 1); }

void check_ffn(const FfnSetup& setup, int how) {
  const BlobShape& shape = setup.args.shape;
  for (size_t expert = 0; expert < setup.weights.size(); ++expert) {
    for (int32_t i = setup.offsets[expert]; i < setup.offsets[expert + 1]; ++i) {
      const float* y = setup.args.y.row(setup.pairs[i]);
      if (left_out(how, static_cast<int32_t>(expert))) {
        for (int32_t k = 0; k < shape.hidden; ++k) ASSERT_EQ(y[k], -3.0F) << "pair " << setup.pairs[i];
        for (int32_t k = 0; k < shape.intermediate; ++k) ASSERT_TRUE(setup.args.scratch.row(i)[k] == Bf16(-3.0F));
        continue;
      }
      const std::byte* blob = reinterpret_cast<const std::byte*>(setup.weights[expert].data());
      const Bf16* x = setup.args.x.row(setup.pairs[i] / setup.args.choices);
      const reference::Checked wanted = reference::ffn(x, {blob, shape});
      std::vector<double> tolerances;
      // The product of gate and up is rounded to bf16 once: each term of down is off by up to 2^-8 of itself.
      for (const double norm : wanted.norm) {
        tolerances.push_back(tolerance(kEpsBf16, 1, norm) +
                             tolerance(kEpsFloat, shape.intermediate + shape.hidden, norm) + 1e-4 * norm);
      }
      expect_close(y, wanted.value, tolerances);
    }
  }
}

TEST_P(ExpertOpsTest, ExpertFfnMatchesDouble) {
  for (const cases::FfnCase& c : cases::kFfn) {
    for (int how = 0; how < 3; ++how) {
      SCOPED_TRACE(testing::Message() << c.rows << " rows, " << c.hidden << " x " << c.intermediate << ", " << how);
      FfnSetup setup(c, 9);
      for (int32_t expert = 0; expert < c.experts; ++expert) {
        if (left_out(how, expert)) setup.blobs[expert] = nullptr;
      }
      ops().expert_ffn(setup.args, *stream_);
      check_ffn(setup, how);
    }
  }
}

// A table for more pairs than there are: rows behind the last pair stay as they were.
TEST_P(ExpertOpsTest, ExpertFfnWritesNothingBehindItsPairs) {
  FfnSetup setup({5, 64, 96, 4, 3}, 9);
  for (int32_t& offset : setup.offsets) offset = std::min(offset, 9);
  ops().expert_ffn(setup.args, *stream_);
  for (int32_t i = 9; i < 15; ++i) {
    for (int32_t k = 0; k < 64; ++k) ASSERT_EQ(setup.args.y.row(setup.pairs[i])[k], -3.0F) << "pair " << i;
    for (int32_t k = 0; k < 96; ++k) ASSERT_TRUE(setup.args.scratch.row(i)[k] == Bf16(-3.0F)) << "pair " << i;
  }
  ASSERT_NE(setup.args.y.row(setup.pairs[8])[0], -3.0F);
}

struct CombineSetup {
  static constexpr int32_t kRows = 7;
  static constexpr int32_t kHidden = 129;
  static constexpr int32_t kChoices = 3;
  static constexpr int32_t kExperts = 6;
  std::vector<float> y, host_y, weights, before;
  std::vector<int32_t> experts;  // [rows, choices - 1]: the last choice is a shared expert
  std::vector<const std::byte*> host_blobs;
  std::vector<float> residual;
  Combine args;

  explicit CombineSetup(bool weighted, bool split) {
    Random random(2);
    y = random.floats(kRows * kChoices * kHidden);
    host_y = random.floats(kRows * kChoices * kHidden);
    weights = random.floats(kRows * kChoices);
    before = residual = random.floats(kRows * kHidden);
    experts = choose_experts(random, kRows, kExperts, kChoices - 1);
    for (int expert = 0; expert < kExperts; ++expert) {
      host_blobs.push_back(expert % 2 == 0 ? reinterpret_cast<const std::byte*>(y.data()) : nullptr);
    }
    args.y = Matrix<const float>(y.data(), kRows * kChoices, kHidden);
    if (weighted) args.weights = Matrix<const float>(weights.data(), kRows, kChoices);
    args.choices = kChoices;
    args.residual = Matrix<float>(residual.data(), kRows, kHidden);
    if (!split) return;
    args.host_y = Matrix<const float>(host_y.data(), kRows * kChoices, kHidden);
    args.experts = Matrix<const int32_t>(experts.data(), kRows, kChoices - 1);
    args.host_blobs = host_blobs;
  }
  const std::vector<float>& outputs(int row, int choice) const {
    const bool on_host = args.host_y.data != nullptr && choice < kChoices - 1 &&
                         host_blobs[experts[row * (kChoices - 1) + choice]] != nullptr;
    return on_host ? host_y : y;
  }
};

TEST_P(ExpertOpsTest, CombineAddsInOrder) {
  for (const bool weighted : {true, false}) {
    for (const bool split : {true, false}) {
      CombineSetup setup(weighted, split);
      ops().combine(setup.args, *stream_);
      for (int row = 0; row < setup.kRows; ++row) {
        for (int i = 0; i < setup.kHidden; ++i) {
          double wanted = setup.before[row * setup.kHidden + i];
          double norm = std::abs(wanted);
          for (int choice = 0; choice < setup.kChoices; ++choice) {
            const int pair = row * setup.kChoices + choice;
            const double term =
                double{weighted ? setup.weights[pair] : 1.0F} * setup.outputs(row, choice)[pair * setup.kHidden + i];
            wanted += term;
            norm += std::abs(term);
          }
          ASSERT_NEAR(setup.residual[row * setup.kHidden + i], wanted, tolerance(kEpsFloat, setup.kChoices + 1, norm));
        }
      }
    }
  }
}

TEST_P(ExpertOpsTest, MoveCopiesRowsAndNothingBeside) {
  for (const auto& [rows, cols] : {std::pair{1, 1}, {7, 129}, {64, 512}, {600, 33}}) {
    Random random(rows);
    const std::vector<Bf16> from = random.bf16s(int64_t{rows} * (cols + 5));
    std::vector<Bf16> to(int64_t{rows} * (cols + 2), Bf16(-7.0F));
    ops().move({from.data(), rows, cols, cols + 5}, {to.data(), rows, cols, cols + 2}, *stream_);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < cols + 2; ++i) {
        const Bf16 wanted = i < cols ? from[row * (cols + 5) + i] : Bf16(-7.0F);
        ASSERT_TRUE(to[row * (cols + 2) + i] == wanted) << "row " << row << ", column " << i;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, ExpertOpsTest, testing::ValuesIn(ops_devices()), OpsDeviceName());

}  // namespace
}  // namespace moed
