#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "tests/kernels/cases.h"

namespace {

std::atomic<int64_t> allocations{0};
std::atomic<int64_t> allocated_bytes{0};

}  // namespace

// Counts what this binary takes from the heap. Not inlined: GCC would see a free() of what its own operator new
// returned.
[[gnu::noinline]] void* operator new(size_t bytes) {
  allocations.fetch_add(1);
  allocated_bytes.fetch_add(static_cast<int64_t>(bytes));
  if (void* data = std::malloc(bytes)) return data;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  allocations.fetch_add(1);
  allocated_bytes.fetch_add(static_cast<int64_t>(bytes));
  return std::malloc(bytes);
}
[[gnu::noinline]] void operator delete(void* data) noexcept { std::free(data); }
[[gnu::noinline]] void operator delete(void* data, size_t) noexcept { std::free(data); }

namespace moed {
namespace {

TEST(Allocation, OpsTakeNothingAfterReserve) {
  auto device = open_device("cpu", {.num_threads = 2, .deterministic = true, .isa = ""}).value();
  const auto stream = device->make_stream();
  Ops& ops = device->ops();
  ASSERT_TRUE(ops.reserve(cases::limits_for(100)).ok());
  cases::Random random(1);
  const std::vector<Bf16> x = random.bf16s(100 * 64);
  const std::vector<Bf16> w = random.bf16s(64 * 192);
  std::vector<float> y(100 * 192);
  std::vector<Bf16> scratch(100 * 64);
  std::vector<int32_t> pairs(100);
  for (int32_t i = 0; i < 100; ++i) pairs[i] = i;
  const std::byte* blob = reinterpret_cast<const std::byte*>(w.data());
  const int32_t offsets[] = {0, 100};
  ExpertFfn ffn;
  ffn.x = Matrix<const Bf16>(x.data(), 100, 64);
  ffn.shape = {BlobFormat::kBf16, 64, 64};
  ffn.blobs = {&blob, 1};
  ffn.offsets = offsets;
  ffn.pairs = pairs.data();
  ffn.pairs_max = 100;
  ffn.scratch = Matrix<Bf16>(scratch.data(), 100, 64);
  ffn.y = Matrix<float>(y.data(), 100, 64);
  const cases::PagedKv kv = cases::make_kv({4, 2, 16, {{900, 1}, {0, 99}}}, 2);
  const AttentionSpan spans[] = {{0, 1, 900, kv.blocks[0].data()}, {1, 99, 0, kv.blocks[1].data()}};
  Attention attention;
  attention.q = ffn.x;
  attention.num_heads = 4;
  attention.kv = kv.layer;
  attention.spans = spans;
  attention.scale = 0.25F;
  attention.out = ffn.scratch;
  std::vector<int32_t> experts(100 * 2);
  std::vector<float> weights(100 * 2);
  Route route;
  route.x = ffn.x;
  route.gate = {w.data(), nullptr, 64, 8};
  route.top_k = 2;
  route.experts = Matrix<int32_t>(experts.data(), 100, 2);
  route.weights = Matrix<float>(weights.data(), 100, 2);
  Group group;
  group.experts = route.experts;
  group.num_experts = 8;
  group.choices = 2;
  std::vector<int32_t> group_offsets(9);
  std::vector<int32_t> group_pairs(200);
  group.offsets = group_offsets.data();
  group.pairs = group_pairs.data();
  const std::vector<float> logits = random.floats(cases::limits_for(1).vocab);
  const SampleRow sample_row{.temperature = 1.0F, .top_p = 0.9F, .uniform = 0.5};
  int32_t token = 0;
  Sample sample;
  sample.logits = Matrix<const float>(logits.data(), 1, static_cast<int32_t>(logits.size()));
  sample.rows = {&sample_row, 1};
  sample.tokens = &token;
  const auto sliced = device->make_host_attention();

  const int64_t before = allocations.load();
  ops.linear({x.data(), 100, 64}, {w.data(), nullptr, 64, 192}, false, {y.data(), 100, 192}, *stream);
  ops.expert_ffn(ffn, *stream);
  ops.attention(attention, *stream);
  ops.route(route, *stream);
  ops.group(group, *stream);
  ops.sample(sample, *stream);
  sliced->begin(attention);
  while (!sliced->done()) sliced->run(50.0);
  EXPECT_EQ(allocations.load(), before);
}

// plan/memory_budget.cpp grants the process 384 MiB for all that is neither weights, KV nor activations.
TEST(Allocation, WorkspacesOfLongContextsStayWithinTheBudget) {
  auto device = open_device("cpu", {.num_threads = 64, .deterministic = true, .isa = ""}).value();
  OpLimits limits;
  limits.rows = 512;
  limits.hidden = 4096;
  limits.intermediate = 14336;
  limits.num_heads = 32;
  limits.head_dim = 128;
  limits.context_tokens = 131072;
  limits.num_experts = 64;
  limits.choices = 8;
  limits.vocab = 151936;
  const int64_t before = allocated_bytes.load();
  ASSERT_TRUE(device->ops().reserve(limits).ok());
  EXPECT_LT(allocated_bytes.load() - before, int64_t{128} << 20);
}

}  // namespace
}  // namespace moed
