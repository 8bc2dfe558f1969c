#include <gtest/gtest.h>

#include <array>
#include <random>
#include <vector>

#include "kernels/device.h"
#include "kernels/ops.h"

namespace moed {
namespace {

constexpr int kStreams = 3;
constexpr int kHostLane = kStreams;  // in place of a stream
constexpr int kBuffers = 6;
constexpr int kMapped = 3;  // of them, which the host lane uses
constexpr int kSteps = 40;
constexpr int32_t kRows = 3;
constexpr int32_t kCols = 5;
constexpr int64_t kBytes = int64_t{kRows} * kCols * int64_t{sizeof(float)};

// buffer[to] += or = buffer[from], on a stream or the host lane, after the steps in `waits` (events) and `joins` (the
// host).
struct Step {
  int stream = 0;
  int to = 0;
  int from = 0;
  bool adds = false;
  std::vector<int> waits;
  std::vector<int> joins;
};

bool conflict(const Step& a, const Step& b) { return a.to == b.to || a.to == b.from || a.from == b.to; }

// Steps in which each waits for what it conflicts with, but for one wait in `forgotten`; none is forgotten when it is
// 0.
std::vector<Step> random_steps(std::mt19937_64& random, int forgotten) {
  std::vector<Step> steps(kSteps);
  const auto below = [&](int limit) { return static_cast<int>(random() % limit); };
  for (int i = 0; i < kSteps; ++i) {
    Step& step = steps[i];
    step.stream = below(kStreams + 1);
    const int reach = step.stream == kHostLane ? kMapped : kBuffers;
    step.to = below(reach);
    step.from = (step.to + 1 + below(reach - 1)) % reach;
    step.adds = below(3) != 0;
    for (int j = 0; j < i; ++j) {
      if (steps[j].stream == step.stream || !conflict(steps[j], step)) continue;
      if (forgotten > 0 && below(forgotten) == 0) continue;
      (step.stream == kHostLane || below(8) == 0 ? step.joins : step.waits).push_back(j);
    }
  }
  return steps;
}

// By brute force: what comes before each step, along streams, events and joins.
bool all_ordered(const std::vector<Step>& steps) {
  std::array<std::array<bool, kSteps>, kSteps> before{};
  std::array<bool, kSteps> host{};
  for (int i = 0; i < kSteps; ++i) {
    const auto follow = [&](std::array<bool, kSteps>& who, int j) {
      who[j] = true;
      for (int k = 0; k < j; ++k) who[k] = who[k] || before[j][k];
    };
    for (const int j : steps[i].joins) follow(host, j);
    before[i] = host;
    for (int j = 0; j < i; ++j) {
      if (steps[j].stream == steps[i].stream) follow(before[i], j);
    }
    for (const int j : steps[i].waits) follow(before[i], j);
    for (int j = 0; j < i; ++j) {
      if (conflict(steps[j], steps[i]) && !before[i][j]) return false;
    }
    // What the host has done comes before all that follows.
    if (steps[i].stream == kHostLane) follow(host, i);
  }
  return true;
}

std::vector<std::vector<float>> first_values() {
  std::vector<std::vector<float>> values;
  for (int i = 0; i < kBuffers; ++i) values.emplace_back(kRows * kCols, 1.0F + 0.37F * static_cast<float>(i));
  return values;
}

std::vector<std::vector<float>> one_after_another(const std::vector<Step>& steps) {
  std::vector<std::vector<float>> values = first_values();
  for (const Step& step : steps) {
    for (int i = 0; i < kRows * kCols; ++i) {
      values[step.to][i] = (step.adds ? values[step.to][i] : 0.0F) + values[step.from][i];
    }
  }
  return values;
}

std::vector<std::vector<float>> on_the_device(const std::vector<Step>& steps, uint64_t seed) {
  DeviceOptions options{.num_threads = 1, .deterministic = true, .isa = "portable"};
  options.memory_gib = 0.01;
  options.seed = seed;
  const auto device = open_device("emulated", options).value();
  EXPECT_TRUE(device->ops().reserve({.rows = kRows, .hidden = kCols}).ok());
  std::vector<std::vector<float>> values = first_values();
  std::vector<std::unique_ptr<Stream>> streams;
  std::vector<std::unique_ptr<Event>> events;
  std::vector<Buffer> buffers;
  for (int i = 0; i < kStreams; ++i) streams.push_back(device->make_stream());
  for (int i = 0; i <= kSteps; ++i) events.push_back(device->make_event());
  for (int i = 0; i < kBuffers; ++i) {
    buffers.push_back(device->allocate(kBytes, i < kMapped ? Memory::kMapped : Memory::kDevice).value());
    streams[0]->copy(buffers[i].data(), values[i].data(), kBytes);
  }
  streams[0]->record(*events[kSteps]);
  EXPECT_TRUE(events[kSteps]->join().ok());
  const auto matrix = [&](int buffer) { return Matrix<float>(buffers[buffer].as<float>(), kRows, kCols); };
  for (int i = 0; i < kSteps; ++i) {
    const Step& step = steps[i];
    const bool on_host = step.stream == kHostLane;
    Stream& stream = on_host ? device->host_stream() : *streams[step.stream];
    for (const int j : step.joins) EXPECT_TRUE(events[j]->join().ok());
    for (const int j : step.waits) stream.wait(*events[j]);
    if (step.adds) {
      Combine args;
      args.y = matrix(step.from);
      args.residual = matrix(step.to);
      (on_host ? device->host_ops() : device->ops()).combine(args, stream);
    } else {
      stream.copy(buffers[step.to].data(), buffers[step.from].data(), kBytes);
    }
    stream.record(*events[i]);
  }
  for (const auto& event : events) EXPECT_TRUE(event->join().ok());
  for (int i = 0; i < kBuffers; ++i) streams[1]->copy(values[i].data(), buffers[i].data(), kBytes);
  streams[1]->record(*events[0]);
  EXPECT_TRUE(events[0]->join().ok());
  return values;
}

TEST(Races, OrderedWorkGivesWhatOneAfterAnotherGives) {
  std::mt19937_64 random(5);
  for (int round = 0; round < 60; ++round) {
    const std::vector<Step> steps = random_steps(random, 0);
    ASSERT_TRUE(all_ordered(steps));
    EXPECT_EQ(on_the_device(steps, random()), one_after_another(steps)) << "round " << round;
  }
}

// Some forgotten waits matter, others are made up for by what else is awaited: brute force says which.
TEST(RacesDeathTest, ForgottenWaitsAreFoundAndNothingElse) {
  std::mt19937_64 random(6);
  int num_races = 0;
  int num_ordered = 0;
  for (int round = 0; round < 60; ++round) {
    const std::vector<Step> steps = random_steps(random, 30);
    const uint64_t seed = random();
    if (all_ordered(steps)) {
      ++num_ordered;
      EXPECT_EQ(on_the_device(steps, seed), one_after_another(steps)) << "round " << round;
    } else {
      ++num_races;
      EXPECT_DEATH(on_the_device(steps, seed), "race: ") << "round " << round;
    }
  }
  EXPECT_GT(num_races, 10);
  EXPECT_GT(num_ordered, 10);
}

}  // namespace
}  // namespace moed
