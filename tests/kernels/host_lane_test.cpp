#include <gtest/gtest.h>

#include <string>

#include "tests/kernels/cases.h"

namespace moed {
namespace {

constexpr int32_t kRows = 8;
constexpr int32_t kCols = 16;
constexpr int64_t kBytes = int64_t{kRows} * kCols * int64_t{sizeof(float)};

std::unique_ptr<Device> open_emulated(const std::string& faults = {}) {
  DeviceOptions options{.num_threads = 1, .deterministic = true, .isa = "portable"};
  options.memory_gib = 0.25;
  options.faults = faults;
  return open_device("emulated", options).value();
}

Matrix<float> rows_of(const Buffer& buffer) { return Matrix<float>(buffer.as<float>(), kRows, kCols); }

// to += from
void add(Ops& ops, const Buffer& to, const Buffer& from, Stream& stream) {
  Combine args;
  args.y = rows_of(from);
  args.residual = rows_of(to);
  ops.combine(args, stream);
}

// One stream of the device, two mapped matrices and two in device memory.
class HostLaneTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(device_->host_ops().reserve(cases::limits_for(64)).ok());
    for (Buffer* buffer : {&a_, &b_}) *buffer = device_->allocate(kBytes, Memory::kMapped).value();
    for (Buffer* buffer : {&far_, &farther_}) *buffer = device_->allocate(kBytes, Memory::kDevice).value();
    for (int i = 0; i < kRows * kCols; ++i) b_.as<float>()[i] = 2.0F;
  }
  void on_host(const Buffer& to, const Buffer& from) { add(device_->host_ops(), to, from, device_->host_stream()); }
  void on_device(const Buffer& to, const Buffer& from) { add(device_->ops(), to, from, *stream_); }
  void join() {
    stream_->record(*event_);
    ASSERT_TRUE(event_->join().ok());
  }
  void TearDown() override { join(); }

  std::unique_ptr<Device> device_ = open_emulated();
  std::unique_ptr<Stream> stream_ = device_->make_stream();
  std::unique_ptr<Event> event_ = device_->make_event();
  Buffer a_, b_, far_, farther_;
};

using HostLaneDeathTest = HostLaneTest;

TEST_F(HostLaneTest, RunsAtOnceAndTheDeviceComesAfterIt) {
  on_host(a_, b_);
  EXPECT_EQ(a_.as<float>()[5], 2.0F);
  on_device(far_, a_);
  on_device(a_, far_);
  EXPECT_EQ(a_.as<float>()[5], 2.0F) << "the stream has not run";
  join();
  EXPECT_EQ(a_.as<float>()[5], 4.0F);
}

TEST_F(HostLaneTest, ItsEventsAreDoneAndStreamsMayWaitForThem) {
  const auto of_lane = device_->make_timed_event();
  on_host(a_, b_);
  device_->host_stream().record(*of_lane);
  EXPECT_TRUE(of_lane->done());
  EXPECT_TRUE(of_lane->join().ok());
  EXPECT_EQ(of_lane->us_since(*of_lane), 0.0);
  stream_->wait(*of_lane);
  on_device(far_, a_);
  join();
  device_->host_stream().wait(*event_);
  device_->host_stream().copy(b_.data(), a_.data(), kBytes);
  EXPECT_EQ(b_.as<float>()[7], 2.0F);
}

TEST_F(HostLaneDeathTest, RacesWithAStreamAreFound) {
  on_device(a_, far_);
  EXPECT_DEATH(on_host(b_, a_), "race: combine reads y on the host, combine writes residual on stream 1");
  EXPECT_DEATH(on_host(a_, b_), "race: combine reads residual on the host|combine writes residual on the host");
  EXPECT_DEATH(device_->host_stream().copy(b_.data(), a_.data(), 4), "race: copy reads source on the host");
  join();
  on_host(b_, a_);
  on_device(far_, b_);
  on_host(a_, b_);  // two readers
  EXPECT_DEATH(on_host(b_, a_), "race: combine writes residual on the host, combine reads y on stream 1");
}

TEST_F(HostLaneDeathTest, DeviceMemoryIsOutOfReach) {
  EXPECT_DEATH(on_host(a_, far_), "combine: y lies in device memory, out of the host lane's reach");
  EXPECT_DEATH(on_host(far_, a_), "combine: residual lies in device memory");
  EXPECT_DEATH(device_->host_stream().copy(far_.data(), a_.data(), 4), "copy: target lies in device memory");
  EXPECT_DEATH(device_->host_stream().copy(a_.data(), far_.data(), 4), "copy: source lies in device memory");
  ExpertFfn ffn;
  const std::byte* const blobs[] = {nullptr, far_.data()};
  ffn.shape = {BlobFormat::kBf16, 4, 4};
  ffn.blobs = blobs;
  EXPECT_DEATH(device_->host_ops().expert_ffn(ffn, device_->host_stream()), "expert_ffn: blob lies in device memory");
}

TEST_F(HostLaneDeathTest, LanesDoNotMix) {
  EXPECT_DEATH(add(device_->ops(), a_, b_, device_->host_stream()), "an op of the device on the stream of the host");
  EXPECT_DEATH(add(device_->host_ops(), a_, b_, *stream_), "an op of the host lane on a stream of the device");
  on_device(a_, b_);
  stream_->record(*event_);
  EXPECT_DEATH(device_->host_stream().wait(*event_), "waits for an event that the host has not joined");
}

// The device reads blobs through a table in mapped memory that stays as it is.
TEST_F(HostLaneDeathTest, TablesOfBlobsAreWatched) {
  const Buffer tables = device_->allocate(4096, Memory::kMapped).value();
  const Buffer memory = device_->allocate(8192, Memory::kDevice).value();
  auto* blobs = tables.as<const std::byte*>();
  auto* offsets = reinterpret_cast<int32_t*>(tables.data() + 64);
  auto* pairs = reinterpret_cast<int32_t*>(tables.data() + 128);
  offsets[1] = offsets[2] = 1;
  blobs[1] = memory.data();
  ExpertFfn ffn;
  ffn.shape = {BlobFormat::kBf16, kCols, 4};
  ffn.x = Matrix<const Bf16>(far_.as<Bf16>(), 1, kCols);
  ffn.blobs = {blobs, 2};
  ffn.offsets = offsets;
  ffn.pairs = pairs;
  ffn.pairs_max = 1;
  ffn.scratch = Matrix<Bf16>(reinterpret_cast<Bf16*>(memory.data() + 4096), 1, 4);
  ffn.y = Matrix<float>(farther_.as<float>(), 1, kCols);
  device_->ops().expert_ffn(ffn, *stream_);
  EXPECT_DEATH(
      {
        blobs[0] = memory.data();
        join();
      },
      "expert_ffn: its table of blobs was changed");
  const auto other = device_->make_stream();
  EXPECT_DEATH(other->copy(memory.data() + ffn.shape.bytes() - 4, a_.data(), 4),
               "race: copy writes target on stream 2, expert_ffn reads blob on stream 1");
  other->copy(memory.data() + ffn.shape.bytes(), a_.data(), 4);
  const std::byte* const on_the_stack[] = {nullptr, memory.data()};
  ffn.blobs = on_the_stack;
  EXPECT_DEATH(device_->ops().expert_ffn(ffn, *stream_), "its table of blobs is not in mapped memory");
  stream_->record(*event_);
  other->wait(*event_);
  other->record(*event_);
  EXPECT_TRUE(event_->join().ok());
}

TEST_F(HostLaneDeathTest, AttentionInSlicesIsWatchedFromBeginToEnd) {
  KvLayer kv{nullptr, 2 * 16 * 4, 16, 1, 4};
  const Buffer cache = device_->allocate(40 * kv.block_stride * int64_t{sizeof(Bf16)}, Memory::kPinned).value();
  kv.base = cache.as<Bf16>();
  std::vector<int32_t> blocks(40);
  for (int i = 0; i < 40; ++i) blocks[i] = i;
  const AttentionSpan span{0, 1, 600, blocks.data()};
  Attention args;
  args.q = Matrix<const Bf16>(a_.as<Bf16>(), 1, 4);
  args.num_heads = 1;
  args.kv = kv;
  args.spans = {&span, 1};
  args.scale = 0.5F;
  args.out = Matrix<Bf16>(b_.as<Bf16>(), 1, 4);
  const auto attention = device_->make_host_attention();
  on_device(a_, far_);
  EXPECT_DEATH(attention->begin(args), "race: attention reads q on the host");
  join();
  attention->begin(args);
  stream_->copy(cache.data(), far_.data(), 4);
  EXPECT_DEATH(attention->run(0.0), "race: attention reads kv on the host, copy writes target on stream 1");
  join();
  blocks[37] = 1;
  EXPECT_DEATH(attention->run(0.0), "attention: its table of blocks was changed before .* on the host lane");
  blocks[37] = 37;
  while (!attention->done()) attention->run(0.0);
  args.q.data = far_.as<Bf16>();
  EXPECT_DEATH(attention->begin(args), "attention: q lies in device memory");
}

TEST_F(HostLaneDeathTest, PinsAreRemembered) {
  std::vector<std::byte> memory(4096);
  EXPECT_TRUE(device_->pin(memory.data(), 1024).ok());
  EXPECT_TRUE(device_->pin(memory.data() + 2048, 1024).ok());
  EXPECT_TRUE(device_->pin(memory.data() + 1024, 1024).ok());
  for (const int begin : {0, 1, 2047, 3071}) {
    EXPECT_DEATH(static_cast<void>(device_->pin(memory.data() + begin, 8)), "pinned already") << begin;
  }
  EXPECT_DEATH(device_->unpin(memory.data() + 1), "nothing that begins there was pinned");
  device_->unpin(memory.data());
  EXPECT_DEATH(device_->unpin(memory.data()), "nothing that begins there was pinned");
  EXPECT_TRUE(device_->pin(memory.data(), 8).ok());
}

TEST(Device, KnowsItsMemoryAndTheTime) {
  EXPECT_EQ(open_emulated()->memory_bytes(), int64_t{1} << 28);
  const auto host = open_device("cpu", {.num_threads = 1}).value();
  EXPECT_EQ(host->memory_bytes(), 0);
  EXPECT_EQ(&host->host_ops(), &host->ops());
  const double before = host->now_us();
  EXPECT_GE(host->now_us(), before);
  EXPECT_GT(before, 0.0);
}

class Faulty {
 public:
  explicit Faulty(const std::string& faults) : device_(open_emulated(faults)) {
    EXPECT_TRUE(device_->ops().reserve(cases::limits_for(64)).ok());
    to_ = device_->allocate(kBytes, Memory::kDevice).value();
    from_ = device_->allocate(kBytes, Memory::kMapped).value();
    out_ = device_->allocate(kBytes, Memory::kMapped).value();
  }
  // One copy and one op, and what the host then hears.
  Status round() {
    from_.as<float>()[0] = 1.0F;
    add(device_->ops(), to_, from_, *stream_);
    stream_->copy(out_.data(), to_.data(), kBytes);
    stream_->record(*event_);
    return event_->join();
  }
  float out() const { return out_.as<float>()[0]; }

 private:
  const std::unique_ptr<Device> device_;
  const std::unique_ptr<Stream> stream_ = device_->make_stream();
  const std::unique_ptr<Event> event_ = device_->make_event();
  Buffer to_, from_, out_;
};

TEST(Faults, SurfaceAtTheNextJoinAndNothingRunsAfter) {
  const std::pair<const char*, const char*> all[] = {{"copy:3", "copy of 512 bytes failed"},
                                                     {"launch:3", "launch of combine failed"},
                                                     {"memory:99,lost:5", "device lost: at combine"},
                                                     {"lost:6", "device lost: at a copy of 512 bytes"}};
  for (const auto& [faults, message] : all) {
    SCOPED_TRACE(faults);
    Faulty device(faults);
    for (int round = 1; round <= 2; ++round) {
      ASSERT_TRUE(device.round().ok());
      EXPECT_EQ(device.out(), static_cast<float>(round));
    }
    for (int round = 0; round < 3; ++round) {
      const Status status = device.round();
      EXPECT_EQ(status.code(), StatusCode::kInternal);
      EXPECT_EQ(status.message(), message);
      EXPECT_EQ(device.out(), 2.0F);
    }
  }
}

TEST(Faults, AllocationsFail) {
  const auto device = open_emulated("memory:2");
  EXPECT_TRUE(device->allocate(8, Memory::kDevice).ok());
  EXPECT_EQ(device->allocate(8, Memory::kMapped).status().code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(device->allocate(8, Memory::kDevice).ok());
}

TEST(Faults, NonsenseIsRefused) {
  for (const char* faults : {"copy", "copy:", "copy:0", "copy:-1", "copy:1x", "fire:3", ":4", "copy:1,,lost:2"}) {
    const auto device = open_device("emulated", {.num_threads = 1, .faults = faults});
    ASSERT_FALSE(device.ok()) << faults;
    EXPECT_EQ(device.status().param(), "faults");
  }
  EXPECT_FALSE(open_device("cpu", {.num_threads = 1, .faults = "copy:1"}).ok());
}

}  // namespace
}  // namespace moed
