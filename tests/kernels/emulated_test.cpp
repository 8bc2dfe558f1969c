#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "tests/kernels/cases.h"
#include "tests/kernels/staged_ops.h"

namespace moed {
namespace {

std::unique_ptr<Device> open_emulated(uint64_t seed = 1, double memory_gib = 0.25) {
  DeviceOptions options{.num_threads = 1, .deterministic = true, .isa = "portable"};
  options.memory_gib = memory_gib;
  options.seed = seed;
  return open_device("emulated", options).value();
}

// Two streams, three device matrices [kRows, kCols] and what ops need beside them.
class EmulatedTest : public testing::Test {
 protected:
  static constexpr int32_t kRows = 8;
  static constexpr int32_t kCols = 16;
  static constexpr int64_t kBytes = int64_t{kRows} * kCols * int64_t{sizeof(float)};

  void SetUp() override {
    ASSERT_TRUE(device_->ops().reserve(cases::limits_for(64)).ok());
    for (Buffer* buffer : {&a_, &b_, &c_}) *buffer = device_->allocate(kBytes, Memory::kDevice).value();
    mapped_ = device_->allocate(kBytes, Memory::kMapped).value();
  }
  static Matrix<float> rows(const Buffer& buffer, int32_t begin = 0, int32_t count = kRows) {
    return Matrix<float>(buffer.as<float>(), kRows, kCols).slice(begin, count);
  }
  // to += from
  void add(Matrix<float> to, Matrix<float> from, Stream& stream) {
    Combine args;
    args.y = from;
    args.residual = to;
    device_->ops().combine(args, stream);
  }
  void fill(const Buffer& buffer, float value, Stream& stream) {
    const std::vector<float> source(kRows * kCols, value);
    stream.copy(buffer.data(), source.data(), kBytes);
    join(stream);
  }
  std::vector<float> read(const Buffer& buffer, Stream& stream) {
    std::vector<float> values(kRows * kCols);
    stream.copy(values.data(), buffer.data(), kBytes);
    join(stream);
    return values;
  }
  void join(Stream& stream) {
    const auto event = device_->make_event();
    stream.record(*event);
    ASSERT_TRUE(event->join().ok());
  }
  // The second stream goes on after what the first holds.
  void order() {
    stream_->record(*event_);
    other_->wait(*event_);
  }
  // Joins both when it goes, so that buffers may.
  void TearDown() override {
    join(*stream_);
    join(*other_);
  }

  std::unique_ptr<Device> device_ = open_emulated();
  std::unique_ptr<Stream> stream_ = device_->make_stream();
  std::unique_ptr<Stream> other_ = device_->make_stream();
  std::unique_ptr<Event> event_ = device_->make_timed_event();
  Buffer a_, b_, c_, mapped_;
};

using EmulatedDeathTest = EmulatedTest;

TEST(EmulatedDevice, SaysWhatItIsAndIsNoHost) {
  const auto device = open_emulated();
  EXPECT_FALSE(device->is_host());
  EXPECT_EQ(device->description().find("emulated: 0.25 GiB, cpu: "), 0U) << device->description();
}

TEST(EmulatedDevice, OddAmountsOfMemoryAreRefused) {
  for (const double gib : {-1.0, 1e9}) {
    const auto device = open_device("emulated", {.num_threads = 1, .memory_gib = gib});
    ASSERT_FALSE(device.ok());
    EXPECT_EQ(device.status().param(), "device_memory_gib");
  }
}

TEST(EmulatedDevice, MemoryEndsWithTheArithmetic) {
  const auto device = open_emulated(1, 0.25);
  std::vector<Buffer> buffers;
  buffers.push_back(device->allocate(int64_t{160} << 20, Memory::kDevice).value());
  const auto more = device->allocate(int64_t{128} << 20, Memory::kDevice);
  ASSERT_FALSE(more.ok());
  EXPECT_EQ(more.status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(more.status().message().find("134217728 bytes (0.125 GiB): 0.156 GiB of 0.250 GiB"), std::string::npos)
      << more.status().message();
  EXPECT_TRUE(device->allocate(int64_t{128} << 20, Memory::kPinned).ok()) << "pinned memory is the host's";
  buffers.clear();
  EXPECT_TRUE(device->allocate(int64_t{200} << 20, Memory::kDevice).ok());
  EXPECT_FALSE(device->allocate(-1, Memory::kDevice).ok());
  EXPECT_EQ(device->allocate(0, Memory::kDevice).value().data(), nullptr);
}

TEST_F(EmulatedDeathTest, HostDereferenceFaults) {
  EXPECT_DEATH(static_cast<volatile char*>(static_cast<void*>(a_.data()))[3] = 1, "");
  EXPECT_DEATH(printf("%d", static_cast<volatile char*>(static_cast<void*>(a_.data()))[3]), "");
}

TEST_F(EmulatedTest, BuffersBeginZeroed) {
  EXPECT_EQ(read(a_, *stream_), std::vector<float>(kRows * kCols));
  fill(a_, 3.0F, *stream_);
  EXPECT_EQ(read(a_, *stream_), std::vector<float>(kRows * kCols, 3.0F));
}

TEST_F(EmulatedTest, NothingRunsBeforeSomebodyWaits) {
  const float source = 5.0F;
  stream_->copy(mapped_.data(), &source, sizeof(source));
  EXPECT_EQ(*mapped_.as<float>(), 0.0F);
  join(*stream_);
  EXPECT_EQ(*mapped_.as<float>(), 5.0F);
}

TEST_F(EmulatedTest, PollingComesToAnEnd) {
  for (int i = 0; i < 5; ++i) add(rows(a_), rows(b_), *stream_);
  stream_->record(*event_);
  EXPECT_FALSE(event_->done());
  int polls = 1;
  while (!event_->done()) ++polls;
  EXPECT_GT(polls, 2);
}

TEST_F(EmulatedTest, EventsOrderStreams) {
  fill(a_, 1.0F, *stream_);
  fill(c_, 2.0F, *stream_);
  add(rows(b_), rows(a_), *stream_);
  order();
  add(rows(c_), rows(b_), *other_);
  EXPECT_EQ(read(c_, *other_), std::vector<float>(kRows * kCols, 3.0F));
}

TEST_F(EmulatedTest, AnEventStandsForWhatWasThereWhenItWasAwaited) {
  add(rows(b_), rows(a_), *stream_);
  order();
  add(rows(c_), rows(b_), *other_);
  add(rows(a_), rows(mapped_), *stream_);
  stream_->record(*event_);  // recorded anew; the other stream's wait is for the first
  EXPECT_TRUE(event_->join().ok());
  EXPECT_GE(event_->us_since(*event_), 0.0);
}

TEST_F(EmulatedTest, SeedsChooseTheOrderOfStreams) {
  std::vector<std::string> orders;
  for (uint64_t seed = 0; seed < 16; ++seed) {
    const auto device = open_emulated(seed);
    const auto first = device->make_stream();
    const auto second = device->make_stream();
    const auto ends = device->make_event();
    char log[8] = {};
    for (int i = 0; i < 4; ++i) {
      first->copy(log + i, "a", 1);
      second->copy(log + 4 + i, "b", 1);
    }
    first->record(*ends);
    EXPECT_TRUE(ends->join().ok());
    orders.emplace_back(log, sizeof(log));
    EXPECT_EQ(orders.back().substr(0, 4), "aaaa");
  }
  std::sort(orders.begin(), orders.end());
  EXPECT_GT(std::unique(orders.begin(), orders.end()) - orders.begin(), 2);
}

TEST_F(EmulatedDeathTest, AReadThatNothingOrdersAfterTheWrite) {
  add(rows(b_), rows(a_), *stream_);
  EXPECT_DEATH(add(rows(c_), rows(b_), *other_),
               "race: combine reads y on stream 2, combine writes residual on stream 1.*device buffer 1 .512 bytes.");
}

TEST_F(EmulatedDeathTest, AWriteThatNothingOrdersAfterTheRead) {
  add(rows(b_), rows(a_), *stream_);
  const std::vector<float> source(kRows * kCols);
  EXPECT_DEATH(other_->copy(a_.data(), source.data(), kBytes),
               "race: copy writes target on stream 2, combine reads y on stream 1.*device buffer 0");
}

TEST_F(EmulatedDeathTest, TwoWritesThatNothingOrders) {
  stream_->copy(a_.data(), b_.data(), kBytes);
  EXPECT_DEATH(other_->copy(a_.data() + kBytes - 4, c_.data(), 4),
               "race: copy writes target on stream 2, copy writes target on stream 1.*bytes .508, 512.");
}

TEST_F(EmulatedDeathTest, AnEventOrdersOnlyWhatStoodBeforeIt) {
  add(rows(b_), rows(a_), *stream_);
  order();
  add(rows(a_), rows(mapped_), *stream_);
  add(rows(c_), rows(b_), *other_);
  EXPECT_DEATH(add(rows(c_), rows(a_), *other_), "combine reads y on stream 2, combine writes residual on stream 1");
}

TEST_F(EmulatedDeathTest, OrderGoesThroughAThirdStreamAndTheHost) {
  const auto third = device_->make_stream();
  const auto passed_on = device_->make_event();
  add(rows(b_), rows(a_), *stream_);
  EXPECT_DEATH(add(rows(c_), rows(b_), *third), "race");
  order();
  other_->record(*passed_on);
  third->wait(*passed_on);
  add(rows(c_), rows(b_), *third);
  EXPECT_DEATH(add(rows(mapped_), rows(c_), *stream_), "race");
  join(*third);
  add(rows(mapped_), rows(c_), *stream_);
  join(*stream_);
}

TEST_F(EmulatedTest, NeighboursAndReadersNeedNoOrder) {
  add(rows(b_, 0, 4), rows(a_, 0, 4), *stream_);
  add(rows(b_, 4, 4), rows(a_, 2, 4), *other_);
  join(*other_);
  add(rows(b_, 4, 4), rows(a_), *stream_);
  join(*stream_);
}

TEST_F(EmulatedDeathTest, HostCodeMustHaveWaited) {
  add(rows(mapped_), rows(a_), *stream_);
  EXPECT_DEATH(device_->host_access(mapped_.data(), 4, Access::kRead),
               "host code reads memory on the host, combine writes residual on stream 1");
  join(*stream_);
  device_->host_access(mapped_.data(), 4, Access::kUpdate);
  add(rows(b_), rows(mapped_), *stream_);
  device_->host_access(mapped_.data(), 4, Access::kRead);
  EXPECT_DEATH(device_->host_access(mapped_.data(), 4, Access::kWrite), "combine reads y on stream 1");
  EXPECT_DEATH(device_->host_access(b_.data(), 4, Access::kRead), "host code touches device memory");
}

TEST_F(EmulatedDeathTest, MemoryThatIsNotThere) {
  Buffer freed = device_->allocate(kBytes, Memory::kDevice).value();
  const Matrix<float> gone = rows(freed);
  freed = Buffer();
  EXPECT_DEATH(add(rows(a_), gone, *stream_), "combine: y is device memory that was never allocated or was freed");
  EXPECT_DEATH(stream_->copy(gone.data, a_.data(), 4), "copy: target is device memory");
  EXPECT_DEATH(stream_->copy(a_.data() + (int64_t{1} << 26), b_.data(), 4), "copy: target is device memory");
  EXPECT_DEATH(stream_->copy(a_.data() + 4, b_.data(), kBytes), "copy: target runs over the end of device buffer 0");
  EXPECT_DEATH(add(rows(mapped_), {nullptr, kRows, kCols}, *stream_), "combine: y is null");
}

// Copies reach all of the host's memory, kernels what is mapped or pinned.
TEST_F(EmulatedDeathTest, HostMemoryOutOfKernelsReach) {
  std::vector<float> host(2 * kRows * kCols);
  const Matrix<float> first{host.data(), kRows, kCols};
  auto* data = reinterpret_cast<std::byte*>(host.data());
  stream_->copy(a_.data(), data, kBytes);
  constexpr const char* kWhy = "combine: y lies in host memory that is neither mapped nor pinned";
  EXPECT_DEATH(add(rows(a_), first, *stream_), kWhy);
  ASSERT_TRUE(device_->pin(data, kBytes).ok());
  add(rows(a_), first, *stream_);
  EXPECT_DEATH(add(rows(a_), {host.data() + kCols, kRows, kCols}, *stream_), kWhy);  // the last row is not pinned
  join(*stream_);
  device_->unpin(data);
  EXPECT_DEATH(add(rows(a_), first, *stream_), kWhy);
  const Buffer pinned = device_->allocate(kBytes, Memory::kPinned).value();
  EXPECT_DEATH(add(rows(a_), rows(pinned), *stream_), kWhy);
}

TEST_F(EmulatedDeathTest, ABufferFreedInUse) {
  Buffer buffer = device_->allocate(kBytes, Memory::kDevice).value();
  add(rows(buffer), rows(a_), *stream_);
  EXPECT_DEATH(buffer = Buffer(), "race: release writes memory on the host, combine writes residual on stream 1");
  join(*stream_);
}

TEST_F(EmulatedDeathTest, EventsThatCannotTell) {
  EXPECT_DEATH(stream_->wait(*event_), "wait: the event was never recorded");
  EXPECT_DEATH(static_cast<void>(event_->join()), "join: the event was never recorded");
  EXPECT_DEATH(static_cast<void>(event_->done()), "done: the event was never recorded");
  const auto untimed = device_->make_event();
  stream_->record(*untimed);
  EXPECT_TRUE(untimed->join().ok());
  EXPECT_DEATH(static_cast<void>(untimed->us_since(*untimed)), "us_since of an event without a time");
}

TEST_F(EmulatedDeathTest, TablesStayUntilTheHostHasWaited) {
  const Buffer weight = device_->allocate(kCols * 4, Memory::kMapped).value();
  auto* picked = mapped_.as<int32_t>();
  picked[0] = 1;
  picked[1] = 5;
  const auto normalise = [&](std::span<const int32_t> table) {
    device_->ops().rms_norm(rows(a_), table, weight.as<float>(), 1e-5F, {b_.as<Bf16>(), 2, kCols}, *stream_);
  };
  normalise({picked, 2});
  EXPECT_DEATH(
      {
        picked[1] = 6;
        join(*stream_);
      },
      "rms_norm: its table of rows was changed before the host had waited for the op on stream 1");
  // It has run, yet nothing has told the host so.
  add(rows(c_), rows(b_), *stream_);
  stream_->record(*event_);
  while (!event_->done()) EXPECT_EQ(picked[1], 5);
  picked[1] = 6;
  const int32_t on_the_stack[] = {1, 2};
  EXPECT_DEATH(normalise(on_the_stack), "rms_norm: its table of rows is not in mapped memory");
}

// Slots of one block may be written by one stream while another reads others.
TEST_F(EmulatedDeathTest, KvIsWatchedSlotBySlot) {
  constexpr int32_t kDim = 4;
  KvLayer kv{nullptr, 2 * 2 * 16 * kDim, 16, 2, kDim};
  const Buffer cache = device_->allocate(3 * kv.block_stride * int64_t{sizeof(Bf16)}, Memory::kDevice).value();
  kv.base = cache.as<Bf16>();
  auto* tables = mapped_.as<std::byte>();
  auto* positions = reinterpret_cast<int32_t*>(tables);
  auto* slots = reinterpret_cast<int64_t*>(tables + 64);
  auto* spans = reinterpret_cast<AttentionSpan*>(tables + 128);
  auto* blocks = reinterpret_cast<int32_t*>(tables + 256);
  blocks[0] = 2;
  spans[0] = {0, 1, 6, blocks};  // reads slots 32 to 38
  const auto attend = [&](Stream& stream) {
    Attention args;
    args.q = Matrix<const Bf16>(a_.as<Bf16>(), 1, 4 * kDim);
    args.num_heads = 4;
    args.kv = kv;
    args.spans = {spans, 1};
    args.scale = 0.5F;
    args.out = Matrix<Bf16>(b_.as<Bf16>(), 1, 4 * kDim);
    device_->ops().attention(args, stream);
  };
  const auto append = [&](int64_t slot) {
    slots[0] = slot;
    RopeAppend args;
    args.qkv = Matrix<const float>(c_.as<float>(), 1, 8 * kDim);
    args.num_heads = 4;
    args.cos_sin = a_.as<float>();
    args.positions = {positions, 1};
    args.slots = {slots, 1};
    args.kv = kv;
    args.q = Matrix<Bf16>(c_.as<Bf16>() + 256, 1, 4 * kDim).slice(0, 1);
    device_->ops().rope_append(args, *other_);
  };
  const Buffer room = device_->allocate(4096, Memory::kDevice).value();
  c_ = Buffer();
  c_ = device_->allocate(4096, Memory::kDevice).value();
  attend(*stream_);
  append(39);
  join(*other_);
  append(31);
  join(*other_);
  EXPECT_DEATH(append(38), "race: rope_append writes kv on stream 2, attention reads kv on stream 1");
  EXPECT_DEATH(append(32), "race: rope_append writes kv on stream 2, attention reads kv on stream 1");
  EXPECT_DEATH(append(48), "rope_append: kv");
  join(*stream_);
  append(38);
  join(*other_);
}

// The same bits as the host device, whatever the seed lets run first.
TEST(EmulatedDevice, ResultsAreTheHostsBitForBit) {
  const auto host = open_device("cpu", {.num_threads = 2, .deterministic = true}).value();
  const auto host_stream = host->make_stream();
  ASSERT_TRUE(host->ops().reserve(cases::limits_for(64)).ok());
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    const auto device = open_device("emulated", {.num_threads = 2, .deterministic = true, .seed = seed}).value();
    const auto stream = device->make_stream();
    StagedOps staged(*device);
    ASSERT_TRUE(staged.reserve(cases::limits_for(64)).ok());
    cases::Random random(static_cast<uint32_t>(seed));
    const std::vector<Bf16> x = random.bf16s(33 * 64);
    const std::vector<Bf16> w = random.bf16s(64 * 192);
    const cases::PagedKv kv = cases::make_kv({4, 2, 16, {{300, 1}, {0, 32}}}, 2);
    const AttentionSpan spans[] = {{0, 1, 300, kv.blocks[0].data()}, {1, 32, 0, kv.blocks[1].data()}};
    std::vector<float> y[2];
    std::vector<Bf16> attended[2];
    for (const bool emulated : {false, true}) {
      Ops& ops = emulated ? static_cast<Ops&>(staged) : host->ops();
      Stream& where = emulated ? *stream : *host_stream;
      y[emulated].resize(33 * 192);
      attended[emulated].resize(33 * 64);
      ops.linear({x.data(), 33, 64}, {w.data(), nullptr, 64, 192}, false, {y[emulated].data(), 33, 192}, where);
      Attention args;
      args.q = Matrix<const Bf16>(x.data(), 33, 64);
      args.num_heads = 4;
      args.kv = kv.layer;
      args.spans = spans;
      args.scale = 0.25F;
      args.out = Matrix<Bf16>(attended[emulated].data(), 33, 64);
      ops.attention(args, where);
    }
    EXPECT_EQ(std::memcmp(y[0].data(), y[1].data(), y[0].size() * sizeof(float)), 0);
    EXPECT_EQ(std::memcmp(attended[0].data(), attended[1].data(), attended[0].size() * sizeof(Bf16)), 0);
  }
}

}  // namespace
}  // namespace moed
