#include "kernels/ops.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>

#include "tests/kernels/ops_fixture.h"

namespace moed {
namespace {

using cases::Random;
using reference::kEpsBf16;
using reference::kEpsFloat;
using reference::tolerance;

TEST_P(OpsTest, LinearMatchesDouble) {
  for (const cases::LinearCase& c : cases::kLinear) {
    SCOPED_TRACE(testing::Message() << c.rows << " x " << c.in << " -> " << c.out);
    Random random(c.rows * 31 + c.in);
    const std::vector<Bf16> w = random.bf16s(int64_t{c.in} * c.out);
    const std::vector<Bf16> x = random.bf16s(int64_t{c.rows} * (c.in + 3));
    const std::vector<float> bias = random.floats(c.out);
    const std::vector<float> before = random.floats(int64_t{c.rows} * c.out);
    const Matrix<const Bf16> xs(x.data(), c.rows, c.in, c.in + 3);
    for (const bool with_bias : {false, true}) {
      for (const bool accumulate : {false, true}) {
        const LinearWeights weights{w.data(), with_bias ? bias.data() : nullptr, c.in, c.out};
        std::vector<float> y = before;
        ops().linear(xs, weights, accumulate, {y.data(), c.rows, c.out}, *stream_);
        reference::Checked wanted = reference::linear(xs, weights);
        std::vector<double> tolerances;
        for (size_t i = 0; i < y.size(); ++i) {
          const double old = accumulate ? before[i] : 0.0;
          wanted.value[i] += old;
          const double norm = wanted.norm[i] + std::abs(old);
          tolerances.push_back(tolerance(kEpsFloat, c.in + 2, norm));
          if (has_tensor_cores()) {
            tolerances.back() += reference::truncation(c.in, std::max(norm, std::abs(wanted.value[i])));
          }
        }
        expect_close(y.data(), wanted.value, tolerances);
      }
    }
  }
}

TEST_P(OpsTest, LinearWritesNothingBesideItsColumns) {
  Random random(5);
  const std::vector<Bf16> w = random.bf16s(33 * 19);
  const std::vector<Bf16> x = random.bf16s(7 * 33);
  std::vector<float> y(7 * 24, -7.0F);
  ops().linear({x.data(), 7, 33}, {w.data(), nullptr, 33, 19}, false, {y.data(), 7, 19, 24}, *stream_);
  for (int row = 0; row < 7; ++row) {
    for (int column = 19; column < 24; ++column) EXPECT_EQ(y[row * 24 + column], -7.0F);
  }
}

TEST_P(OpsTest, EmbedCopiesRows) {
  Random random(1);
  const std::vector<Bf16> table = random.bf16s(11 * 127);
  const std::vector<int32_t> tokens = {10, 0, 3, 3, 7};
  std::vector<float> out(5 * 127);
  ops().embed(tokens, {table.data(), 11, 127}, {out.data(), 5, 127}, *stream_);
  for (int row = 0; row < 5; ++row) {
    for (int i = 0; i < 127; ++i) EXPECT_EQ(out[row * 127 + i], static_cast<float>(table[tokens[row] * 127 + i]));
  }
}

TEST_P(OpsTest, RmsNormMatchesDouble) {
  for (const int32_t cols : {1, 7, 127, 129, 576, 1000}) {
    for (const int32_t rows : {1, 7, 40}) {
      Random random(cols);
      const std::vector<float> x = random.floats(int64_t{rows} * cols, 3.0F);
      const std::vector<float> weight = random.floats(cols);
      std::vector<Bf16> out(std::max(rows, 2) * cols);
      ops().rms_norm({x.data(), rows, cols}, {}, weight.data(), 1e-5F, {out.data(), rows, cols}, *stream_);
      const std::vector<double> wanted = reference::rms_norm({x.data(), rows, cols}, weight.data(), 1e-5);
      expect_close(out.data(), wanted, bf16_tolerances(wanted));
      const std::vector<int32_t> picked = {rows - 1, 0};
      ops().rms_norm({x.data(), rows, cols}, picked, weight.data(), 1e-5F, {out.data(), 2, cols}, *stream_);
      const std::vector<double> last(wanted.end() - cols, wanted.end());
      expect_close(out.data(), last, bf16_tolerances(last));
    }
  }
}

struct RopeCase {
  int32_t num_heads, num_kv_heads, head_dim, rotary_dim;
  RopeAppend::Norm norm;
  float clip;
};

void check_rope(Ops& ops, Stream& stream, const RopeCase& c) {
  constexpr int32_t kRows = 9;
  constexpr int32_t kBlocks = 3;
  Random random(c.head_dim);
  RopeAppend args;
  const int32_t width = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim;
  const std::vector<float> qkv = random.floats(kRows * width);
  const std::vector<float> q_norm = random.floats(c.num_heads * c.head_dim);
  const std::vector<float> k_norm = random.floats(c.num_kv_heads * c.head_dim);
  std::vector<float> cos_sin;
  for (int position = 0; position < 40; ++position) {
    for (int i = 0; i < c.rotary_dim; ++i) {
      const int pair = i % std::max(1, c.rotary_dim / 2);
      const double angle = position * std::pow(10000.0, -2.0 * pair / c.rotary_dim);
      cos_sin.push_back(static_cast<float>(i < c.rotary_dim / 2 ? std::cos(angle) : std::sin(angle)));
    }
  }
  const std::vector<int32_t> positions = {0, 1, 2, 17, 5, 39, 8, 8, 30};
  const std::vector<int64_t> slots = {0, 1, 15, 16, 47, -1, 33, 20, -5};
  const int64_t stride = int64_t{2} * c.num_kv_heads * 16 * c.head_dim;
  std::vector<Bf16> cache((kBlocks - 1) * stride, Bf16(-77.0F));
  std::vector<Bf16> staging(stride, Bf16(-77.0F));
  std::vector<Bf16> q(kRows * c.num_heads * c.head_dim);
  args.qkv = Matrix<const float>(qkv.data(), kRows, width);
  args.num_heads = c.num_heads;
  args.norm = c.norm;
  args.q_norm = q_norm.data();
  args.k_norm = k_norm.data();
  args.eps = 1e-6F;
  args.clip = c.clip;
  args.cos_sin = cos_sin.data();
  args.rotary_dim = c.rotary_dim;
  args.positions = positions;
  args.slots = slots;
  args.kv = {cache.data(), stride, 16, c.num_kv_heads, c.head_dim, staging.data(), kBlocks - 1};
  args.q = Matrix<Bf16>(q.data(), kRows, c.num_heads * c.head_dim);
  ops.rope_append(args, stream);

  const reference::Rope wanted = reference::rope(args);
  // A turned pair is a difference of two products: its error goes with the larger of the two, bounded by the row's
  // peak.
  const auto tolerances = [](const std::vector<double>& x) {
    std::vector<double> out = bf16_tolerances(x);
    double peak = 0.0;
    for (const double value : x) peak = std::max(peak, std::abs(value));
    for (double& value : out) value += tolerance(kEpsFloat, 4, peak);
    return out;
  };
  expect_close(q.data(), wanted.q, tolerances(wanted.q));
  std::vector<bool> written(kBlocks * 16);
  for (int row = 0; row < kRows; ++row) {
    if (slots[row] < 0) continue;
    written[slots[row]] = true;
    for (int head = 0; head < c.num_kv_heads; ++head) {
      const auto block = static_cast<int32_t>(slots[row] / 16);
      const int64_t offset = slots[row] % 16 * c.head_dim;
      const auto slice = [&](const std::vector<double>& x) {
        const auto begin = x.begin() + (int64_t{row} * c.num_kv_heads + head) * c.head_dim;
        return std::vector<double>(begin, begin + c.head_dim);
      };
      expect_close(args.kv.k(block, head) + offset, slice(wanted.k), tolerances(slice(wanted.k)));
      expect_close(args.kv.v(block, head) + offset, slice(wanted.v), tolerances(slice(wanted.v)));
    }
  }
  for (int slot = 0; slot < kBlocks * 16; ++slot) {
    if (written[slot]) continue;
    EXPECT_TRUE(args.kv.k(slot / 16, 0)[slot % 16 * c.head_dim] == Bf16(-77.0F)) << "slot " << slot;
  }
}

TEST_P(OpsTest, RopeAppendMatchesDouble) {
  using Norm = RopeAppend::Norm;
  for (const RopeCase& c :
       {RopeCase{9, 3, 64, 64, Norm::kNone, INFINITY}, RopeCase{4, 2, 20, 20, Norm::kPerHead, INFINITY},
        RopeCase{6, 6, 18, 18, Norm::kWhole, 0.8F}, RopeCase{2, 1, 96, 24, Norm::kNone, 1.5F},
        RopeCase{1, 1, 2, 2, Norm::kPerHead, INFINITY}, RopeCase{3, 1, 128, 0, Norm::kWhole, INFINITY}}) {
    SCOPED_TRACE(testing::Message() << c.num_heads << " heads of " << c.head_dim << ", rotary " << c.rotary_dim);
    check_rope(ops(), *stream_, c);
  }
}

TEST_P(OpsTest, AttentionMatchesDouble) {
  for (const cases::AttentionCase& c : cases::attention_cases()) {
    SCOPED_TRACE(testing::Message() << c.num_heads << "/" << c.num_kv_heads << " heads of " << c.head_dim);
    AttentionSetup setup(c, 3);
    ops().attention(setup.args, *stream_);
    const reference::Checked wanted = reference::attention(setup.args, setup.rows);
    std::vector<double> tolerances = bf16_tolerances(wanted.value);
    for (size_t i = 0; i < tolerances.size(); ++i) tolerances[i] += tolerance(kEpsFloat, 1024, wanted.norm[i]);
    expect_close(setup.out.data(), wanted.value, tolerances);
  }
}

TEST_P(OpsTest, RouteMatchesDouble) {
  struct Case {
    int32_t rows, hidden, experts, top_k;
    Route::Score score;
    bool renormalize, shared, bias;
    int32_t groups, kept;
  };
  constexpr auto kSoftmax = Route::Score::kSoftmax;
  constexpr auto kSigmoid = Route::Score::kSigmoid;
  int compared = 0;
  for (const Case& c :
       {Case{33, 64, 8, 2, kSoftmax, true, false, false, 1, 1}, Case{7, 65, 60, 4, kSoftmax, false, true, false, 1, 1},
        Case{129, 127, 128, 8, kSoftmax, true, false, false, 1, 1},
        Case{40, 64, 32, 4, kSigmoid, true, true, true, 8, 4}, Case{40, 64, 24, 3, kSoftmax, false, false, false, 6, 2},
        Case{5, 7, 3, 3, kSigmoid, false, false, false, 1, 1}}) {
    Random random(c.experts);
    Route args;
    const std::vector<Bf16> x = random.bf16s(int64_t{c.rows} * c.hidden);
    const std::vector<Bf16> gate = random.bf16s(int64_t{c.experts} * c.hidden, 0.05F);
    const std::vector<Bf16> shared_gate = random.bf16s(c.hidden, 0.1F);
    const std::vector<float> bias = random.floats(c.experts, 0.05F);
    std::vector<int32_t> experts(c.rows * c.top_k);
    std::vector<float> weights(c.rows * (c.top_k + c.shared));
    args.x = Matrix<const Bf16>(x.data(), c.rows, c.hidden);
    args.gate = {gate.data(), nullptr, c.hidden, c.experts};
    args.score = c.score;
    args.top_k = c.top_k;
    args.renormalize = c.renormalize;
    args.scaling = 1.5F;
    args.num_groups = c.groups;
    args.groups_kept = c.kept;
    args.correction_bias = c.bias ? bias.data() : nullptr;
    args.shared = c.shared;
    if (c.shared && c.score == kSoftmax) args.shared_gate = {shared_gate.data(), nullptr, c.hidden, 1};
    args.experts = Matrix<int32_t>(experts.data(), c.rows, c.top_k);
    args.weights = Matrix<float>(weights.data(), c.rows, c.top_k + c.shared);
    ops().route(args, *stream_);
    const reference::Routed wanted = reference::route(args);
    const int32_t width = c.top_k + c.shared;
    for (int row = 0; row < c.rows; ++row) {
      // Logits are off by some 1e-5 at most; a closer decision may go either way.
      if (wanted.gap[row] < 1e-4) continue;
      ++compared;
      for (int i = 0; i < c.top_k; ++i) ASSERT_EQ(experts[row * c.top_k + i], wanted.chosen[row * c.top_k + i]);
      for (int i = 0; i < width; ++i) ASSERT_NEAR(weights[row * width + i], wanted.weights[row * width + i], 1e-4);
    }
  }
  EXPECT_GT(compared, 150);
}

TEST_P(OpsTest, RouteTiesGoToTheLowerExpert) {
  const std::vector<Bf16> x(16, Bf16(1.0F));
  const std::vector<Bf16> gate(6 * 16, Bf16(0.5F));
  std::vector<int32_t> experts(3);
  std::vector<float> weights(3);
  Route args;
  args.x = Matrix<const Bf16>(x.data(), 1, 16);
  args.gate = {gate.data(), nullptr, 16, 6};
  args.top_k = 3;
  args.renormalize = true;
  args.experts = Matrix<int32_t>(experts.data(), 1, 3);
  args.weights = Matrix<float>(weights.data(), 1, 3);
  ops().route(args, *stream_);
  EXPECT_EQ(experts, (std::vector<int32_t>{0, 1, 2}));
  for (const float weight : weights) EXPECT_NEAR(weight, 1.0F / 3.0F, 1e-6F);
}

INSTANTIATE_TEST_SUITE_P(Devices, OpsTest, testing::ValuesIn(ops_devices()), OpsDeviceName());

// The same bits for a row whatever stands beside it and however many threads there are.
class InvarianceTest : public testing::TestWithParam<OpsDevice> {
 protected:
  void SetUp() override {
    OpsDevice alone = GetParam();
    alone.num_threads = 1;
    device_ = open_ops_device(GetParam(), true).value();
    alone_device_ = open_ops_device(alone, true).value();
    stream_ = device_->make_stream();
    alone_stream_ = alone_device_->make_stream();
    staged_ = std::make_unique<StagedOps>(*device_);
    alone_staged_ = std::make_unique<StagedOps>(*alone_device_);
    ASSERT_TRUE(device_->ops().reserve(cases::limits_for(kRowsMax)).ok());
    ASSERT_TRUE(alone_device_->ops().reserve(cases::limits_for(1)).ok());
  }
  Ops& ops() { return device_->is_host() ? device_->ops() : *staged_; }
  Ops& alone_ops() { return alone_device_->is_host() ? alone_device_->ops() : *alone_staged_; }

  std::unique_ptr<Device> device_;
  std::unique_ptr<Device> alone_device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Stream> alone_stream_;
  std::unique_ptr<StagedOps> staged_;
  std::unique_ptr<StagedOps> alone_staged_;
};

TEST_P(InvarianceTest, LinearRows) {
  for (const cases::LinearCase& c : {cases::LinearCase{1, 129, 40},
                                     {2, 577, 33},
                                     {5, 64, 129},
                                     {6, 1000, 17},
                                     {7, 31, 24},
                                     {64, 576, 100},
                                     {129, 200, 50},
                                     {600, 576, 40}}) {
    Random random(c.rows);
    const std::vector<Bf16> w = random.bf16s(int64_t{c.in} * c.out);
    const std::vector<Bf16> x = random.bf16s(int64_t{c.rows} * c.in);
    std::vector<float> together(int64_t{c.rows} * c.out);
    std::vector<float> alone(c.out);
    ops().linear({x.data(), c.rows, c.in}, {w.data(), nullptr, c.in, c.out}, false, {together.data(), c.rows, c.out},
                 *stream_);
    for (int32_t row = 0; row < c.rows; ++row) {
      alone_ops().linear({x.data() + int64_t{row} * c.in, 1, c.in}, {w.data(), nullptr, c.in, c.out}, false,
                         {alone.data(), 1, c.out}, *alone_stream_);
      ASSERT_EQ(0, std::memcmp(alone.data(), together.data() + int64_t{row} * c.out, c.out * sizeof(float)))
          << "row " << row << " of " << c.rows;
    }
  }
}

TEST_P(InvarianceTest, AttentionRows) {
  for (const cases::AttentionCase& c : cases::attention_cases()) {
    AttentionSetup setup(c, 4);
    ops().attention(setup.args, *stream_);
    std::vector<Bf16> alone(c.num_heads * c.head_dim);
    for (const AttentionSpan& span : setup.spans) {
      for (int32_t row = 0; row < span.num_rows; ++row) {
        Attention args = setup.args;
        args.q = setup.args.q.slice(span.row_begin + row, 1);
        const AttentionSpan one = {0, 1, span.num_cached + row, span.blocks};
        args.spans = {&one, 1};
        args.out = Matrix<Bf16>(alone.data(), 1, c.num_heads * c.head_dim);
        alone_ops().attention(args, *alone_stream_);
        ASSERT_EQ(0, std::memcmp(alone.data(), setup.args.out.row(span.row_begin + row), alone.size() * sizeof(Bf16)))
            << "row " << row << " after " << span.num_cached;
      }
    }
  }
}

TEST_P(InvarianceTest, ExpertRows) {
  for (const cases::FfnCase& c : cases::kFfn) {
    FfnSetup setup(c, 10);
    ops().expert_ffn(setup.args, *stream_);
    std::vector<float> alone(c.choices * c.hidden);
    std::vector<Bf16> scratch(c.intermediate);
    const int32_t offsets[] = {0, 1};
    for (int32_t expert = 0; expert < c.experts; ++expert) {
      for (int32_t i = setup.offsets[expert]; i < setup.offsets[expert + 1]; ++i) {
        const int32_t pair = setup.pairs[i];
        const int32_t own = pair % c.choices;
        ExpertFfn args = setup.args;
        args.x = setup.args.x.slice(pair / c.choices, 1);
        args.blobs = {&setup.blobs[expert], 1};
        args.offsets = offsets;
        args.pairs = &own;
        args.pairs_max = 1;
        args.scratch = Matrix<Bf16>(scratch.data(), 1, c.intermediate);
        args.y = Matrix<float>(alone.data(), c.choices, c.hidden);
        alone_ops().expert_ffn(args, *alone_stream_);
        ASSERT_EQ(0, std::memcmp(args.y.row(own), setup.args.y.row(pair), c.hidden * sizeof(float))) << "pair " << pair;
      }
    }
  }
}

// Experts may be split over calls in any way.
TEST_P(InvarianceTest, ExpertsOverCalls) {
  for (const cases::FfnCase& c : cases::kFfn) {
    FfnSetup together(c, 11);
    FfnSetup apart(c, 11);
    ops().expert_ffn(together.args, *stream_);
    for (int32_t part = 2; part >= 0; --part) {
      std::vector<const std::byte*> some(c.experts);
      for (int32_t expert = part; expert < c.experts; expert += 3) some[expert] = apart.blobs[expert];
      apart.args.blobs = some;
      ops().expert_ffn(apart.args, *stream_);
    }
    EXPECT_TRUE(apart.y == together.y);
    EXPECT_EQ(0, std::memcmp(apart.scratch.data(), together.scratch.data(), together.scratch.size() * sizeof(Bf16)));
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, InvarianceTest, testing::ValuesIn(invariant_devices()), [](const auto& param_info) {
  return param_info.param.isa + "_" + std::to_string(param_info.param.num_threads);
});

}  // namespace
}  // namespace moed
