#include <gtest/gtest.h>

#include <cstring>

#include "tests/kernels/ops_fixture.h"

namespace moed {
namespace {

constexpr int32_t kAttentionRowsMax = 64;

// Attention in slices: against the whole of it, on devices whose host lane runs beside them and where it is the device.
class HostAttentionTest : public testing::TestWithParam<std::tuple<std::string, int>> {
 protected:
  void SetUp() override {
    const auto& [name, threads] = GetParam();
    device_ = open_device(name, {.num_threads = threads, .deterministic = true}).value();
    OpLimits limits = cases::limits_for(kAttentionRowsMax);
    // Little room for partials, so that long contexts take several turns.
    limits.num_heads = 12;
    limits.head_dim = 64;
    limits.context_tokens = 256;
    early_ = device_->make_host_attention();
    ASSERT_TRUE(device_->host_ops().reserve(limits).ok());
    late_ = device_->make_host_attention();
  }

  static cases::AttentionCase random_case(cases::Random& random) {
    const int32_t kv_heads = 1 + static_cast<int32_t>(random.below(3));
    cases::AttentionCase c{kv_heads * (1 + static_cast<int32_t>(random.below(4))),
                           kv_heads,
                           2 * (1 + static_cast<int32_t>(random.below(32))),
                           {}};
    int32_t rows = 0;
    do {
      const int32_t cached = random.below(4) == 0 ? static_cast<int32_t>(random.below(8000)) : random.below(600);
      const int32_t count =
          std::min<int32_t>(kAttentionRowsMax - rows, random.below(3) == 0 ? 1 + random.below(40) : 1);
      c.spans.emplace_back(cached, count);
      rows += count;
    } while (rows < kAttentionRowsMax && random.below(6) != 0);
    return c;
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<HostAttention> early_;
  std::unique_ptr<HostAttention> late_;
};

TEST_P(HostAttentionTest, SlicesHaveTheBitsOfTheWhole) {
  cases::Random random(7);
  for (int round = 0; round < 30; ++round) {
    SCOPED_TRACE(round);
    const cases::AttentionCase c = random_case(random);
    AttentionSetup whole(c, 100 + round);
    AttentionSetup sliced(c, 100 + round);
    device_->host_ops().attention(whole.args, device_->host_stream());
    HostAttention& slices = round % 2 == 0 ? *early_ : *late_;
    EXPECT_TRUE(slices.done());
    slices.begin(sliced.args);
    const double slice_us = round % 3 == 0 ? 0.0 : 30.0;
    while (!slices.done()) slices.run(slice_us);
    ASSERT_EQ(0, std::memcmp(whole.out.data(), sliced.out.data(), whole.out.size() * sizeof(Bf16)))
        << c.num_heads << "/" << c.num_kv_heads << " heads of " << c.head_dim << ", " << c.spans.size() << " spans";
  }
}

// Two halves' attention and other ops take turns.
TEST_P(HostAttentionTest, OtherOpsRunBetweenSlices) {
  const cases::AttentionCase one{8, 2, 64, {{3000, 1}, {500, 9}, {2000, 2}}};
  const cases::AttentionCase two{6, 6, 32, {{0, 40}, {8000, 1}}};
  AttentionSetup whole_one(one, 1), sliced_one(one, 1), whole_two(two, 2), sliced_two(two, 2), between(two, 3);
  FfnSetup ffn({20, 64, 96, 4, 2}, 4);
  Ops& ops = device_->host_ops();
  Stream& lane = device_->host_stream();
  ops.attention(whole_one.args, lane);
  ops.attention(whole_two.args, lane);
  early_->begin(sliced_one.args);
  late_->begin(sliced_two.args);
  int slices = 0;
  while (!early_->done() || !late_->done()) {
    if (!early_->done()) early_->run(0.0);
    if (!late_->done()) late_->run(0.0);
    if (++slices % 4 == 0) ops.attention(between.args, lane);
    ops.expert_ffn(ffn.args, lane);
  }
  EXPECT_GT(slices, 10);
  EXPECT_EQ(0, std::memcmp(whole_one.out.data(), sliced_one.out.data(), whole_one.out.size() * sizeof(Bf16)));
  EXPECT_EQ(0, std::memcmp(whole_two.out.data(), sliced_two.out.data(), whole_two.out.size() * sizeof(Bf16)));
}

// A slice without time still does something, but no more than one unit a thread, however long the context: four rows of
// 32 chunks and two heads, and what merges them.
TEST_P(HostAttentionTest, SlicesEndInTime) {
  AttentionSetup setup({8, 2, 64, {{8000, 1}, {8000, 1}, {8000, 1}, {8000, 1}}}, 1);
  early_->begin(setup.args);
  int slices = 0;
  for (; !early_->done(); ++slices) early_->run(0.0);
  EXPECT_GE(slices * std::get<1>(GetParam()), 4 * (32 + 1) * 2);
  early_->begin(setup.args);
  early_->run(60e6);
  EXPECT_TRUE(early_->done());
}

TEST_P(HostAttentionTest, NothingToDoIsDoneAtOnce) {
  AttentionSetup setup({2, 1, 8, {}}, 1);
  early_->begin(setup.args);
  EXPECT_TRUE(early_->done());
}

using HostAttentionDeathTest = HostAttentionTest;

TEST_P(HostAttentionDeathTest, BeginAndRunInTurn) {
  EXPECT_DEATH(early_->run(1.0), "no attention under way");
  AttentionSetup setup({8, 2, 64, {{3000, 1}}}, 1);
  early_->begin(setup.args);
  EXPECT_DEATH(early_->begin(setup.args), "attention begins while one is under way");
}

INSTANTIATE_TEST_SUITE_P(Devices, HostAttentionTest,
                         testing::Combine(testing::Values("cpu", "emulated"), testing::Values(1, 2, 3)),
                         [](const auto& param_info) {
                           return std::get<0>(param_info.param) + "_" + std::to_string(std::get<1>(param_info.param));
                         });
INSTANTIATE_TEST_SUITE_P(Devices, HostAttentionDeathTest, testing::Combine(testing::Values("cpu"), testing::Values(1)));

}  // namespace
}  // namespace moed
