#include "kernels/simulated/simulated_device.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "tests/support/temporary_folder.h"

namespace moed {
namespace {

// Rates that make sums easy: 1e6 FLOP and 100,000 bytes of device memory a microsecond, 10,000 bytes over the link up.
constexpr const char* kRound = R"(
name = "round"
[device]
memory_gib = 8
bf16_tflops = 1.0
dram_gb_s = 100.0
kernel_us = 2.0
tile_rows = 16
[link]
h2d_gb_s = 10.0
d2h_gb_s = 5.0
[host]
memory_gib = 64
dram_gb_s = 20.0
bf16_gflops = 100.0
attention_gb_s = 16.0
attention_gflops = 50.0
fork_us = 3.0
[calls]
launch_us = 4.6
copy_us = 8.4
event_us = 1.0
poll_us = 0.5
wake_us = 3.0
[interference]
dram_share = [0.0, 1.0]
link_share = [1.0, 0.5]
)";
constexpr double kTiny = 1e-6;

std::unique_ptr<Device> open(DeviceOptions options = {}, const std::string& more = "") {
  const TemporaryFolder folder;
  auto device = open_device("simulated:" + folder.write("round.toml", kRound + more), options);
  MOED_CHECK(device.ok()) << device.status().message();
  return std::move(device).value();
}

TEST(SimulatedDevice, SaysWhatItIs) {
  const auto device = open({.seed = 7, .router = "zipf:1.0"});
  EXPECT_EQ(device->description(), "simulated: round, 8.00 GiB, router zipf:1.0, seed 7");
  EXPECT_FALSE(device->is_host());
  EXPECT_EQ(device->memory_bytes(), int64_t{8} << 30);
  EXPECT_EQ(open({.memory_gib = 2.0})->memory_bytes(), int64_t{2} << 30);
  EXPECT_EQ(open({.memory_gib = 20.0})->memory_bytes(), int64_t{8} << 30);
}

TEST(SimulatedDevice, NeedsAMachine) {
  EXPECT_EQ(open_device("simulated", {}).status().param(), "device");
  EXPECT_EQ(open_device("simulated:none.toml", {}).status().code(), StatusCode::kNotFound);
  const TemporaryFolder folder;
  const std::string path = "simulated:" + folder.write("round.toml", kRound);
  EXPECT_EQ(open_device(path, {.memory_gib = -1.0}).status().param(), "device_memory_gib");
  EXPECT_EQ(open_device(path, {.router = "dice"}).status().param(), "router");
}

// More than this box has; nothing of it is touched.
TEST(SimulatedDevice, MemoryIsAddressesUpToTheCapacity) {
  const auto device = open();
  Buffer host = device->allocate(int64_t{200} << 30, Memory::kMapped).value();
  Buffer most = device->allocate(int64_t{7} << 30, Memory::kDevice).value();
  const auto more = device->allocate(int64_t{2} << 30, Memory::kDevice);
  ASSERT_FALSE(more.ok());
  EXPECT_EQ(more.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(more.status().message().find("7.000 GiB of 8.000 GiB"), std::string::npos) << more.status().message();
  most = Buffer();
  EXPECT_TRUE(device->allocate(int64_t{8} << 30, Memory::kDevice).ok());
  EXPECT_EQ(host.as<char>()[int64_t{100} << 30], 0);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(host.data()) % 64, 0U);
  EXPECT_EQ(device->allocate(0, Memory::kDevice).value().data(), nullptr);
  EXPECT_FALSE(device->allocate(-1, Memory::kDevice).ok());
}

// Two launches cost the host 9.2 us; each kernel 2 * 16 * 1000 * 1000 FLOP = 32 us, its weights 2 MB = 20 us alone.
TEST(SimulatedDevice, ProductsTakeWholeTilesAndLaunchesTheHostsTime) {
  const auto device = open();
  const auto stream = device->make_stream();
  const Buffer memory = device->allocate(8 << 20, Memory::kDevice).value();
  const Matrix<const Bf16> x(memory.as<Bf16>(), 3, 1000);
  const LinearWeights weights{memory.as<Bf16>(), nullptr, 1000, 1000};
  const Matrix<float> y(memory.as<float>(), 3, 1000);
  device->ops().linear(x, weights, false, y, *stream);
  device->ops().linear(x, weights, false, y, *stream);
  EXPECT_NEAR(device->now_us(), 2 * 4.6, kTiny);
  const auto done = device->make_event();
  stream->record(*done);
  EXPECT_FALSE(done->done());
  ASSERT_TRUE(done->join().ok());
  EXPECT_NEAR(device->now_us(), 4.6 + 2 * 32.0 + 3.0, kTiny);
  EXPECT_TRUE(done->done());
  EXPECT_NEAR(device->now_us(), 4.6 + 2 * 32.0 + 3.0 + 0.5, kTiny);
  EXPECT_EQ(device->totals()->device_bytes, 2 * (2'000'000 + 3 * 1000 * (2 + 4)));
  EXPECT_NEAR(device->totals()->kernels_us, 64.0, kTiny);
}

TEST(SimulatedDevice, PollingGetsThere) {
  const auto device = open();
  const auto stream = device->make_stream();
  const Buffer target = device->allocate(1 << 20, Memory::kDevice).value();
  const Buffer source = device->allocate(1 << 20, Memory::kPinned).value();
  const auto begun = device->make_event();
  const auto done = device->make_event();
  stream->record(*begun);
  stream->copy(target.data(), source.data(), 1'000'000);
  stream->record(*done);
  int polls = 0;
  while (!done->done()) ++polls;
  EXPECT_GT(polls, 150);
  EXPECT_LT(polls, 210);
  EXPECT_NEAR(done->us_since(*begun), 100.0 + 8.4, kTiny);  // the stream was idle while the host enqueued the copy
}

// The ring's way: a copy on one stream, the kernel that reads it on another.
TEST(SimulatedDevice, StreamsWaitForEvents) {
  const auto device = open();
  const auto copies = device->make_stream();
  const auto compute = device->make_stream();
  const Buffer memory = device->allocate(8 << 20, Memory::kDevice).value();
  const Buffer source = device->allocate(8 << 20, Memory::kPinned).value();
  const auto copied = device->make_event();
  const auto done = device->make_event();
  copies->copy(memory.data(), source.data(), 2'000'000);  // until 8.4 + 200
  copies->record(*copied);
  compute->wait(*copied);
  device->ops().linear(Matrix<const Bf16>(memory.as<Bf16>(), 16, 1000), {memory.as<Bf16>(), nullptr, 1000, 1000}, false,
                       Matrix<float>(memory.as<float>(), 16, 1000), *compute);
  compute->record(*done);
  ASSERT_TRUE(done->join().ok());
  EXPECT_NEAR(done->us_since(*copied), 32.0, kTiny);
  EXPECT_NEAR(device->now_us(), 8.4 + 200.0 + 32.0 + 3.0, kTiny);
}

TEST(SimulatedDevice, CopiesKnowTheirDirection) {
  const auto device = open();
  const auto stream = device->make_stream();
  const Buffer memory = device->allocate(4 << 20, Memory::kDevice).value();
  const Buffer host = device->allocate(4 << 20, Memory::kPinned).value();
  const auto event = device->make_event();
  const auto time = [&](void* target, const void* source) {
    const auto begun = device->make_event();
    stream->record(*begun);
    stream->copy(target, source, 1'000'000);
    stream->record(*event);
    EXPECT_TRUE(event->join().ok());
    return event->us_since(*begun) - 8.4;
  };
  EXPECT_NEAR(time(memory.data(), host.data()), 100.0, kTiny);
  EXPECT_NEAR(time(host.data(), memory.data()), 200.0, kTiny);
  EXPECT_NEAR(time(memory.data() + (2 << 20), memory.data()), 20.0, kTiny);  // read and written
  EXPECT_EQ(device->totals()->up_bytes, 1'000'000);
  EXPECT_EQ(device->totals()->down_bytes, 1'000'000);
  EXPECT_EQ(device->totals()->device_bytes, 2'000'000);
  EXPECT_NEAR(device->totals()->up_us, 100.0, kTiny);
  EXPECT_NEAR(device->totals()->down_us, 200.0, kTiny);
}

TEST(SimulatedDevice, SmallCopiesArriveAndLargeOnesOnlyTakeTime) {
  const auto device = open();
  const auto stream = device->make_stream();
  const Buffer memory = device->allocate(1 << 20, Memory::kDevice).value();
  const Buffer host = device->allocate(1 << 20, Memory::kMapped).value();
  std::fill_n(host.as<uint8_t>(), 1 << 20, uint8_t{7});
  stream->copy(memory.data(), host.data(), 64 << 10);
  const auto event = device->make_event();
  stream->record(*event);
  EXPECT_EQ(memory.as<uint8_t>()[0], 0);
  ASSERT_TRUE(event->join().ok());
  EXPECT_EQ(memory.as<uint8_t>()[(64 << 10) - 1], 7);
  stream->copy(memory.data() + (128 << 10), host.data(), 512 << 10);
  stream->record(*event);
  ASSERT_TRUE(event->join().ok());
  EXPECT_EQ(memory.as<uint8_t>()[128 << 10], 0);
}

// What a layer with an expert in device memory and two on the host looks like, all counted by hand.
class SimulatedLayer : public testing::Test {
 protected:
  static constexpr int32_t kRows = 20;
  static constexpr int32_t kHidden = 100;
  static constexpr int32_t kIntermediate = 50;
  static constexpr int32_t kExperts = 8;
  static constexpr int32_t kTopK = 2;
  static constexpr BlobShape kShape{.hidden = kHidden, .intermediate = kIntermediate};

  void SetUp() override {
    device_memory_ = device->allocate(1 << 20, Memory::kDevice).value();
    mapped_memory_ = device->allocate(1 << 20, Memory::kMapped).value();
    route_.x = {take<Bf16>(kRows * kHidden), kRows, kHidden};
    route_.gate = {take<Bf16>(kExperts * kHidden), nullptr, kHidden, kExperts};
    route_.top_k = kTopK;
    route_.experts = {take<int32_t>(kRows * kTopK), kRows, kTopK};
    route_.weights = {take<float>(kRows * kTopK), kRows, kTopK};
    group_.experts = route_.experts;
    group_.num_experts = kExperts;
    group_.choices = kTopK;
    group_.offsets = take<int32_t>(kExperts + 1);
    group_.pairs = take<int32_t>(kRows * kTopK);
    group_.host_offsets = mapped_memory_.as<int32_t>();
    group_.host_pairs = mapped_memory_.as<int32_t>() + 64;
  }
  void join() {
    const auto event = device->make_event();
    stream->record(*event);
    ASSERT_TRUE(event->join().ok());
  }
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(device_memory_.data() + taken_);
    taken_ += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
    return piece;
  }

  std::unique_ptr<Device> device = open({.seed = 3});
  std::unique_ptr<Stream> stream = device->make_stream();
  Buffer device_memory_;
  Buffer mapped_memory_;
  int64_t taken_ = 0;
  Route route_;
  Group group_;
};

TEST_F(SimulatedLayer, RouterAndGroupsAreThere) {
  device->ops().route(route_, *stream);
  device->ops().group(group_, *stream);
  join();
  std::map<int32_t, std::vector<int32_t>> wanted;  // the pairs of each expert
  for (int32_t row = 0; row < kRows; ++row) {
    for (int32_t choice = 0; choice < kTopK; ++choice) {
      const int32_t expert = route_.experts.row(row)[choice];
      ASSERT_GE(expert, 0);
      ASSERT_LT(expert, kExperts);
      wanted[expert].push_back(row * kTopK + choice);
    }
    EXPECT_NE(route_.experts.row(row)[0], route_.experts.row(row)[1]);
  }
  EXPECT_EQ(group_.offsets[0], 0);
  EXPECT_EQ(group_.offsets[kExperts], kRows * kTopK);
  for (int32_t expert = 0; expert < kExperts; ++expert) {
    EXPECT_EQ(std::vector<int32_t>(group_.pairs + group_.offsets[expert], group_.pairs + group_.offsets[expert + 1]),
              wanted[expert]);
  }
  EXPECT_TRUE(std::equal(group_.offsets, group_.offsets + kExperts + 1, group_.host_offsets));
  EXPECT_TRUE(std::equal(group_.pairs, group_.pairs + kRows * kTopK, group_.host_pairs));
}

TEST_F(SimulatedLayer, ExpertsAreChargedByTheirRows) {
  device->ops().route(route_, *stream);
  device->ops().group(group_, *stream);
  join();
  const DeviceTotals before = device->totals().value();
  auto* table = reinterpret_cast<const std::byte**>(mapped_memory_.data() + (64 << 10));
  std::fill_n(table, kExperts, nullptr);
  for (const int32_t expert : {1, 4}) table[expert] = take<std::byte>(kShape.bytes());
  ExpertFfn ffn;
  ffn.x = route_.x;
  ffn.shape = kShape;
  ffn.blobs = {table, kExperts};
  ffn.offsets = group_.offsets;
  ffn.pairs = group_.pairs;
  ffn.pairs_max = kRows * kTopK;
  ffn.choices = kTopK;
  ffn.scratch = {take<Bf16>(kRows * kTopK * kIntermediate), kRows * kTopK, kIntermediate};
  ffn.y = {take<float>(kRows * kTopK * kHidden), kRows * kTopK, kHidden};
  device->ops().expert_ffn(ffn, *stream);
  join();
  double flops = 0.0;
  int64_t bytes = (kExperts + 1) * 4;
  for (const int32_t expert : {1, 4}) {
    const int64_t rows = group_.host_offsets[expert + 1] - group_.host_offsets[expert];
    ASSERT_GT(rows, 0) << "another seed, please";
    flops += 6.0 * kHidden * kIntermediate * static_cast<double>((rows + 15) / 16 * 16);
    bytes += kShape.bytes() + rows * (4 + kHidden * 2 + 2 * kIntermediate * 2 + kHidden * 4);
  }
  EXPECT_EQ(device->totals()->device_bytes - before.device_bytes, bytes);
  EXPECT_EQ(device->totals()->up_bytes - before.up_bytes, kExperts * 8);  // the table
  const double wanted = std::max({2.0, flops / 1e6, static_cast<double>(bytes) / 100'000});
  EXPECT_NEAR(device->totals()->kernels_us - before.kernels_us, wanted, kTiny);
}

TEST_F(SimulatedLayer, TheHostLanePassesTheHostsTime) {
  const auto* weights = reinterpret_cast<const Bf16*>(mapped_memory_.data());
  auto* floats = mapped_memory_.as<float>() + 100'000;
  const double before = device->now_us();
  // 2 * 40 * 200 * 500 FLOP at 100 GFLOP/s are 80 us; 200 kB at 20 GB/s are less.
  device->host_ops().linear(Matrix<const Bf16>(weights, 40, 200), {weights, nullptr, 200, 500}, false,
                            Matrix<float>(floats, 40, 500), device->host_stream());
  EXPECT_NEAR(device->now_us() - before, 80.0, kTiny);
  const auto begun = device->make_event();
  const auto done = device->make_event();
  device->host_stream().record(*begun);
  EXPECT_TRUE(begun->join().ok());
  device->host_stream().copy(floats, weights, 100'000);  // read and written
  device->host_stream().record(*done);
  EXPECT_NEAR(done->us_since(*begun), 10.0 + 0.5, kTiny);
  stream->wait(*done);
  join();
}

// What is enqueued between the pieces runs beside them.
TEST_F(SimulatedLayer, OpsOfTheHostLaneLetTheHostLookAround) {
  const auto* weights = reinterpret_cast<const Bf16*>(mapped_memory_.data());
  const Matrix<float> out(mapped_memory_.as<float>() + 100'000, 40, 500);
  const Matrix<const Bf16> x(weights, 40, 2000);
  const LinearWeights matrix{weights, nullptr, 2000, 500};
  const auto copied = device->make_event();
  auto* target = take<std::byte>(1'000'000);
  std::vector<double> ticks;
  bool arrived = false;
  const double before = device->now_us();
  device->on_host_work([&] {
    ticks.push_back(device->now_us() - before);
    if (ticks.size() == 1) {
      stream->copy(target, mapped_memory_.data(), 1'000'000);  // 100 us of the link
      stream->record(*copied);
    }
    arrived = copied->done();
  });
  device->host_ops().linear(x, matrix, false, out, device->host_stream());  // 800 us
  ASSERT_EQ(ticks.size(), 7U);
  EXPECT_NEAR(ticks[0], 100.0, kTiny);
  EXPECT_NEAR(ticks[1], 200.0 + 8.4 + 1.0 + 0.5, kTiny);
  EXPECT_TRUE(arrived);
  EXPECT_GT(device->now_us() - before, 800.0);
  device->on_host_work({});
  device->host_ops().linear(x, matrix, false, out, device->host_stream());
  EXPECT_EQ(ticks.size(), 7U);
}

TEST_F(SimulatedLayer, AttentionOfTheHostRunsInSlices) {
  constexpr int32_t kTokens = 10'000;
  const std::vector<int32_t> blocks(kTokens / 16 + 1);
  const AttentionSpan span{.row_begin = 0, .num_rows = 1, .num_cached = kTokens - 1, .blocks = blocks.data()};
  Attention args;
  args.num_heads = 8;
  args.kv = {mapped_memory_.as<Bf16>(), 16 * 2 * 2 * 32, 16, 2, 32};
  args.q = {mapped_memory_.as<Bf16>(), 1, 256};
  args.spans = {&span, 1};
  args.out = {mapped_memory_.as<Bf16>(), 1, 256};
  const auto attention = device->make_host_attention();
  EXPECT_TRUE(attention->done());
  const double before = device->now_us();
  attention->begin(args);
  int slices = 0;
  for (; !attention->done(); ++slices) attention->run(20.0);
  // KV: 10,000 * 2 * 2 * 32 * 2 bytes at 16 GB/s: 160 us; the FLOP, 4 * 10,000 * 8 * 32 at 50 GFLOP/s, 204.8.
  EXPECT_NEAR(device->now_us() - before, 204.8, 1e-3);
  EXPECT_EQ(slices, 11);
}

TEST_F(SimulatedLayer, LogitsAreSeeded) {
  const Matrix<float> logits(mapped_memory_.as<float>(), 4, 1000);
  const auto draw = [&](Device& on) {
    const auto lane = on.make_stream();
    const Buffer x = on.allocate(1 << 20, Memory::kDevice).value();
    on.ops().linear(Matrix<const Bf16>(x.as<Bf16>(), 4, 10), {x.as<Bf16>(), nullptr, 10, 1000}, false, logits, *lane);
    const auto event = on.make_event();
    lane->record(*event);
    EXPECT_TRUE(event->join().ok());
    std::vector<int64_t> tokens;
    for (int32_t row = 0; row < 4; ++row) {
      tokens.push_back(std::max_element(logits.row(row), logits.row(row) + 1000) - logits.row(row));
    }
    return tokens;
  };
  const std::vector<int64_t> tokens = draw(*device);
  EXPECT_GT(std::set<int64_t>(tokens.begin(), tokens.end()).size(), 1U);
  EXPECT_EQ(draw(*open({.seed = 3})), tokens);
  EXPECT_NE(draw(*open({.seed = 4})), tokens);
}

TEST(SimulatedDevice, TheSameSeedGivesTheSameTimes) {
  const auto run = [](uint64_t seed) {
    const auto device = open({.seed = seed}, "[noise]\njitter = 0.1\ndrift = 0.1\ndrift_period_s = 0.01\n");
    const auto compute = device->make_stream();
    const auto copies = device->make_stream();
    const Buffer memory = device->allocate(4 << 20, Memory::kDevice).value();
    const Buffer host = device->allocate(4 << 20, Memory::kMapped).value();
    std::vector<double> times;
    const auto event = device->make_event();
    for (int i = 0; i < 50; ++i) {
      copies->copy(memory.data(), host.data(), 100'000 + i);
      device->ops().linear(Matrix<const Bf16>(memory.as<Bf16>(), 16, 1000), {memory.as<Bf16>(), nullptr, 1000, 1000},
                           false, Matrix<float>(memory.as<float>(), 16, 1000), *compute);
      device->host_access(host.data(), 100'000, Access::kRead);
      copies->record(*event);
      compute->wait(*event);
      compute->record(*event);
      EXPECT_TRUE(event->join().ok());
      times.push_back(device->now_us());
    }
    return times;
  };
  EXPECT_EQ(run(1), run(1));
  EXPECT_NE(run(1), run(2));
}

}  // namespace
}  // namespace moed
