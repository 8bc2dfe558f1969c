#include "kernels/simulated/op_costs.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/op_ranges.h"
#include "kernels/simulated/random.h"

namespace moed {
namespace {

// Addresses: every other MiB is of the device.
constexpr auto is_device = [](const void* data) { return (reinterpret_cast<uintptr_t>(data) >> 20) % 2 == 1; };

// Adds up what a call declares.
class Adder : public RangeVisitor {
 public:
  void range(const char*, Access access, const void*& base, Runs runs) override {
    runs([&](int64_t, int64_t bytes) {
      if (access != Access::kWrite) add(base, bytes, declared.host_read_bytes);
      if (access != Access::kRead) add(base, bytes, declared.host_write_bytes);
    });
  }
  void table(const char*, const void*& data, int64_t bytes) override { add(data, bytes, declared.host_read_bytes); }
  OpCost declared;

 private:
  void add(const void* data, int64_t bytes, int64_t& of_host) {
    (is_device(data) ? declared.device_bytes : of_host) += bytes;
  }
};

class OpCosts : public testing::Test {
 protected:
  int32_t any(int32_t least, int32_t most) {
    return least + static_cast<int32_t>(next_random(random_) % static_cast<uint64_t>(most - least + 1));
  }
  // An address of either memory: nothing is read there.
  template <class T>
  T* somewhere() {
    const uint64_t mib = 1 + next_random(random_) % 4096;
    return reinterpret_cast<T*>((uintptr_t{1} << 40) + (mib << 20));
  }
  template <class T>
  Matrix<T> matrix(int32_t rows, int32_t cols) {
    return {somewhere<T>(), rows, cols, cols + any(0, 3)};
  }
  LinearWeights linear(int32_t in, int32_t out) {
    return {somewhere<Bf16>(), any(0, 1) == 1 ? somewhere<float>() : nullptr, in, out};
  }
  KvLayer kv() { return {somewhere<Bf16>(), 16 * 2 * 3 * 8, 16, 3, 8}; }

  void expect_conserved(OpCall call) {
    const OpCost counted = op_cost(call, is_device, 1);
    Adder adder;
    visit_ranges(call, adder);
    EXPECT_EQ(counted.device_bytes, adder.declared.device_bytes) << op_name(call);
    EXPECT_EQ(counted.host_read_bytes, adder.declared.host_read_bytes) << op_name(call);
    EXPECT_EQ(counted.host_write_bytes, adder.declared.host_write_bytes) << op_name(call);
  }

  uint64_t random_ = 5;
};

TEST_F(OpCosts, SimpleOpsMoveTheBytesThatTheyDeclare) {
  for (int i = 0; i < 200; ++i) {
    const int32_t rows = any(1, 40);
    const int32_t cols = any(1, 200);
    const int32_t out = any(1, 100);
    std::vector<int32_t> chosen(rows);
    for (int32_t& row : chosen) row = any(0, 50);
    expect_conserved(EmbedCall{chosen, matrix<const Bf16>(60, cols), matrix<float>(rows, cols)});
    expect_conserved(
        RmsNormCall{matrix<const float>(60, cols), chosen, somewhere<float>(), 0.0F, matrix<Bf16>(rows, cols)});
    expect_conserved(
        RmsNormCall{matrix<const float>(rows, cols), {}, somewhere<float>(), 0.0F, matrix<Bf16>(rows, cols)});
    expect_conserved(
        LinearCall{matrix<const Bf16>(rows, cols), linear(cols, out), any(0, 1) == 1, matrix<float>(rows, out)});
    expect_conserved(MoveCall{matrix<const Bf16>(rows, cols), matrix<Bf16>(rows, cols)});
    const std::vector<SampleRow> samples(rows);
    expect_conserved(Sample{matrix<const float>(rows, cols), samples, somewhere<int32_t>()});
  }
}

TEST_F(OpCosts, AttentionMovesTheBytesThatItDeclares) {
  for (int i = 0; i < 200; ++i) {
    const int32_t rows = any(1, 60);
    std::vector<int32_t> positions(rows);
    std::vector<int64_t> slots(rows);
    for (int64_t& slot : slots) slot = any(-1, 2000);
    for (int32_t& position : positions) position = any(0, 4000);
    RopeAppend rope;
    rope.kv = kv();
    rope.num_heads = 6;
    rope.norm = static_cast<RopeAppend::Norm>(any(0, 2));
    rope.q_norm = somewhere<float>();
    rope.k_norm = somewhere<float>();
    rope.cos_sin = somewhere<float>();
    rope.rotary_dim = 4;
    rope.positions = positions;
    rope.slots = slots;
    rope.qkv = matrix<const float>(rows, 12 * 8);
    rope.q = matrix<Bf16>(rows, 6 * 8);
    expect_conserved(rope);

    std::vector<int32_t> blocks(100);
    std::iota(blocks.begin(), blocks.end(), any(0, 9));
    std::vector<AttentionSpan> spans;
    for (int32_t row = 0; row < rows;) {
      const int32_t count = std::min(any(1, 20), rows - row);
      spans.push_back({row, count, any(0, 1000), blocks.data()});
      row += count;
    }
    Attention attention;
    attention.q = matrix<const Bf16>(rows, 6 * 8);
    attention.num_heads = 6;
    attention.kv = kv();
    attention.spans = spans;
    attention.out = matrix<Bf16>(rows, 6 * 8);
    expect_conserved(attention);
  }
}

TEST_F(OpCosts, RoutersMoveTheBytesThatTheyDeclare) {
  for (int i = 0; i < 200; ++i) {
    const int32_t rows = any(1, 40);
    const int32_t top_k = any(1, 8);
    Route route;
    route.x = matrix<const Bf16>(rows, 64);
    route.gate = linear(64, 16);
    route.top_k = top_k;
    route.correction_bias = any(0, 1) == 1 ? somewhere<float>() : nullptr;
    route.shared = any(0, 1) == 1;
    if (any(0, 1) == 1) route.shared_gate = linear(64, 1);
    route.experts = matrix<int32_t>(rows, top_k);
    route.weights = matrix<float>(rows, top_k + (route.shared ? 1 : 0));
    expect_conserved(route);
    Group group;
    group.experts = matrix<const int32_t>(rows, top_k);
    group.num_experts = 16;
    group.choices = top_k;
    group.offsets = somewhere<int32_t>();
    group.pairs = somewhere<int32_t>();
    if (any(0, 1) == 1) group.host_offsets = somewhere<int32_t>();
    if (any(0, 1) == 1) group.host_pairs = somewhere<int32_t>();
    expect_conserved(group);
    Combine combine;
    combine.choices = top_k + (route.shared ? 1 : 0);
    combine.y = matrix<const float>(rows * combine.choices, 64);
    if (any(0, 3) > 0) combine.weights = matrix<const float>(rows, combine.choices);
    combine.residual = matrix<float>(rows, 64);
    expect_conserved(combine);
  }
}

// A row that the host computed is read there and not here; what an op may read it declares twice.
TEST_F(OpCosts, CombineReadsEachOutputOnce) {
  const std::vector<int32_t> experts{0, 1, 2, 1, 3, 0};
  const std::byte blob{};
  const std::vector<const std::byte*> host_blobs{nullptr, &blob, nullptr, &blob};
  const auto in_device = [](const void* data) { return reinterpret_cast<uintptr_t>(data) == uintptr_t{64}; };
  Combine combine;
  combine.choices = 2;
  combine.y = {reinterpret_cast<const float*>(uintptr_t{64}), 6, 10};
  combine.host_y = {reinterpret_cast<const float*>(uintptr_t{128}), 6, 10};
  combine.experts = {experts.data(), 3, 2};
  combine.host_blobs = host_blobs;
  combine.residual = {reinterpret_cast<float*>(uintptr_t{64}), 3, 10};
  const OpCost cost = op_cost(combine, in_device, 1);
  EXPECT_EQ(cost.device_bytes, (3 + 2 * 3) * 10 * 4);               // three outputs, the residual twice
  EXPECT_EQ(cost.host_read_bytes, 3 * 10 * 4 + 4 * 8 + 3 * 2 * 4);  // three outputs, the table, the choices
}

TEST_F(OpCosts, ProductsAreOfWholeTiles) {
  const auto flops = [&](int32_t rows) {
    return op_cost(LinearCall{matrix<const Bf16>(rows, 30), linear(30, 7), false, matrix<float>(rows, 7)}, is_device,
                   16)
        .flops;
  };
  EXPECT_EQ(flops(1), 2.0 * 16 * 30 * 7);
  EXPECT_EQ(flops(16), 2.0 * 16 * 30 * 7);
  EXPECT_EQ(flops(17), 2.0 * 32 * 30 * 7);
}

TEST_F(OpCosts, AttentionIsCausal) {
  const std::vector<AttentionSpan> spans{{0, 3, 10, nullptr}, {3, 1, 0, nullptr}};
  Attention attention;
  attention.num_heads = 6;
  attention.kv = kv();
  attention.q = attention.out = matrix<Bf16>(4, 48);
  attention.spans = spans;
  EXPECT_EQ(op_cost(attention, is_device, 64).attention_flops, 4.0 * 6 * 8 * (11 + 12 + 13 + 1));
}

}  // namespace
}  // namespace moed
