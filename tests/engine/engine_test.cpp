#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <string_view>
#include <thread>

#include "engine/kv_pool.h"
#include "engine/lane_estimate.h"
#include "plan/memory_budget.h"
#include "tests/engine/engine_box.h"
#include "tests/engine/late_device.h"

namespace moed {
namespace {

EngineConfig small_config() {
  return {.rows_max = 40, .sequences_max = 4, .max_model_len = 96, .kv_blocks = 16, .block_tokens = 16};
}

// A box of the first tiny model and two sequences that sample greedily.
class EngineTest : public ::testing::TestWithParam<const char*> {
 protected:
  EngineTest()
      : model_(parse_tiny(tiny_models()[0])),
        box_(model_, *dummy_weights(model_, 1), opened(GetParam(), {.num_threads = 1, .deterministic = true}),
             small_config()) {
    for (int32_t i = 0; i < 20; ++i) tokens_.push_back(i * 7 % model_.config.vocab_size);
    sampling_.temperature = 0.0F;
    sampling_.num_logprobs = 2;
  }
  StepSequence sequence(SequenceId id, std::span<const int32_t> blocks) {
    StepSequence sequence;
    sequence.tokens = tokens_;
    sequence.id = id;
    sequence.num_prompt = static_cast<int32_t>(tokens_.size());
    sequence.num_new = sequence.num_prompt;
    sequence.blocks = blocks;
    sequence.sampling = &sampling_;
    return sequence;
  }
  static StepSequence on_device(StepSequence sequence) {
    sequence.pool = Pool::kDevice;
    return sequence;
  }
  StepOutput run(Pass pass) {
    while (box_.engine().advance(pass)) {
    }
    return box_.engine().finish(std::move(pass));
  }

  Model model_;
  EngineBox box_;
  std::vector<int32_t> tokens_;
  SamplingParams sampling_;
  const std::vector<int32_t> blocks_ab_ = {0, 1};
  const std::vector<int32_t> blocks_cd_ = {2, 3};
  const std::vector<int32_t> blocks_ef_ = {4, 5};
};

TEST_P(EngineTest, OutputsStandInTheOrderOfBeginWithoutTheDropped) {
  const StepSequence sequences[] = {sequence(7, blocks_ab_), sequence(3, blocks_cd_)};
  Pass pass = box_.engine().begin(sequences, box_.plan(2));
  const StepOutput both = run(std::move(pass));
  ASSERT_EQ(both.sequences.size(), 2U);
  EXPECT_EQ(both.sequences[0].id, 7);
  EXPECT_EQ(both.sequences[1].id, 3);
  EXPECT_EQ(both.sequences[0].sampled->logprob, both.sequences[1].sampled->logprob);

  pass = box_.engine().begin(sequences, box_.plan(2));
  EXPECT_TRUE(box_.engine().advance(pass));
  box_.engine().drop(pass, 7);
  box_.engine().drop(pass, 12345);
  const StepOutput one = run(std::move(pass));
  ASSERT_EQ(one.sequences.size(), 1U);
  EXPECT_EQ(one.sequences[0].id, 3);
  EXPECT_EQ(one.sequences[0].sampled->token, both.sequences[1].sampled->token);
  EXPECT_EQ(one.sequences[0].sampled->logprob, both.sequences[1].sampled->logprob);
}

TEST_P(EngineTest, APassWithoutSequencesHasNothingMoreToDo) {
  const StepSequence one = sequence(7, blocks_ab_);
  Pass pass = box_.engine().begin({&one, 1}, box_.plan(1));
  EXPECT_TRUE(box_.engine().advance(pass));
  box_.engine().drop(pass, 7);
  EXPECT_FALSE(box_.engine().advance(pass));
  EXPECT_TRUE(box_.engine().finish(std::move(pass)).sequences.empty());
}

TEST_P(EngineTest, DroppingAfterTheLastLayerTakesTheAnswerAway) {
  const StepSequence sequences[] = {sequence(7, blocks_ab_), sequence(3, blocks_cd_)};
  Pass pass = box_.engine().begin(sequences, box_.plan(1));
  while (box_.engine().advance(pass)) {
  }
  box_.engine().drop(pass, 3);
  const StepOutput output = box_.engine().finish(std::move(pass));
  ASSERT_EQ(output.sequences.size(), 1U);
  EXPECT_EQ(output.sequences[0].id, 7);
}

TEST_P(EngineTest, TwoPassesLiveAndAnAbandonedOneGivesItsPlaceBack) {
  const StepSequence a = sequence(1, blocks_ab_);
  const StepSequence b = sequence(2, blocks_cd_);
  const StepSequence c = sequence(3, blocks_ef_);
  Pass first = box_.engine().begin({&a, 1}, box_.plan(1));
  Pass second = box_.engine().begin({&b, 1}, box_.plan(1));
  EXPECT_DEATH(box_.engine().begin({&c, 1}, box_.plan(1)), "more than 2 passes");
  second = Pass();
  Pass third = box_.engine().begin({&c, 1}, box_.plan(1));
  EXPECT_EQ(run(std::move(first)).sequences[0].sampled->token, run(std::move(third)).sequences[0].sampled->token);
}

TEST_P(EngineTest, ACopiedBlockServesAsItsOriginal) {
  const StepSequence whole = sequence(1, blocks_ab_);
  const ScoredToken wanted = *run(box_.engine().begin({&whole, 1}, box_.plan(1))).sequences[0].sampled;
  box_.engine().copy_block(Pool::kHost, 0, 9);
  box_.engine().copy_block(Pool::kHost, 1, 4);
  const std::vector<int32_t> copies = {9, 4};
  StepSequence last = sequence(2, copies);
  last.num_cached = static_cast<int32_t>(tokens_.size()) - 1;
  last.num_new = 1;
  const ScoredToken got = *run(box_.engine().begin({&last, 1}, box_.plan(1))).sequences[0].sampled;
  EXPECT_EQ(got.token, wanted.token);
  EXPECT_EQ(got.logprob, wanted.logprob);
  EXPECT_DEATH(box_.engine().copy_block(Pool::kHost, 0, 16), "16");
}

TEST_P(EngineTest, PoolsOfTheDeviceAreApart) {
  const std::string device = GetParam();
  EngineConfig config = small_config();
  config.device_kv_blocks = 12;
  if (device == "cpu") {
    EXPECT_DEATH(EngineBox(model_, *dummy_weights(model_, 1), opened(device, {}), config), "device_kv_blocks is 12");
    const StepSequence one = on_device(sequence(1, blocks_ab_));
    EXPECT_DEATH(box_.engine().begin({&one, 1}, box_.plan(1)), "in a pool this engine has not");
    EXPECT_DEATH(box_.engine().copy_block(Pool::kDevice, 0, 1), "no KV pool on the device");
    return;
  }
  EngineBox box(model_, *dummy_weights(model_, 1), opened(device, {.num_threads = 1, .deterministic = true}), config);
  const auto run_in = [&](Pass pass) {
    while (box.engine().advance(pass)) {
    }
    return *box.engine().finish(std::move(pass)).sequences[0].sampled;
  };
  const StepSequence whole = on_device(sequence(1, blocks_ab_));
  const ScoredToken wanted = run_in(box.engine().begin({&whole, 1}, box.plan(1)));
  // The same blocks of the other pool hold something else.
  for (int32_t i = 0; i < 20; ++i) tokens_[i] = (tokens_[i] + 5) % model_.config.vocab_size;
  const StepSequence other = sequence(2, blocks_ab_);
  EXPECT_NE(run_in(box.engine().begin({&other, 1}, box.plan(1))).logprob, wanted.logprob);
  for (int32_t i = 0; i < 20; ++i) tokens_[i] = i * 7 % model_.config.vocab_size;
  box.engine().copy_block(Pool::kDevice, 0, 9);
  box.engine().copy_block(Pool::kDevice, 1, 4);
  const std::vector<int32_t> copies = {9, 4};
  StepSequence last = on_device(sequence(3, copies));
  last.num_cached = 19;
  last.num_new = 1;
  const ScoredToken got = run_in(box.engine().begin({&last, 1}, box.plan(1)));
  EXPECT_EQ(got.token, wanted.token);
  EXPECT_EQ(got.logprob, wanted.logprob);
  const std::vector<int32_t> outside = {0, 12};
  const StepSequence broken = on_device(sequence(4, outside));
  EXPECT_DEATH(box.engine().begin({&broken, 1}, box.plan(1)), "KV block 12");
}

TEST_P(EngineTest, EndsWithWorkStillEnqueued) {
  EngineBox box(model_, *dummy_weights(model_, 1), opened(GetParam(), {.num_threads = 1}), small_config());
  box.engine().copy_block(Pool::kHost, 0, 9);
}

TEST_P(EngineTest, PromptScoresStopBeforeGeneratedTokens) {
  StepSequence all = sequence(1, blocks_ab_);
  all.num_prompt = 12;
  all.prompt_logprobs = true;
  all.num_prompt_top = 3;
  const SequenceOutput output = run(box_.engine().begin({&all, 1}, box_.plan(1))).sequences[0];
  ASSERT_EQ(output.prompt_scores.size(), 11U);
  for (size_t i = 0; i < 11; ++i) {
    EXPECT_EQ(output.prompt_scores[i].token, tokens_[i + 1]);
    EXPECT_EQ(output.prompt_scores[i].top.size(), 3U);
    EXPECT_LE(output.prompt_scores[i].logprob, output.prompt_scores[i].top[0].logprob);
  }
}

TEST_P(EngineTest, TimesAddUp) {
  const StepSequence one = sequence(1, blocks_ab_);
  const StepTimes times = run(box_.engine().begin({&one, 1}, box_.plan(1))).times;
  for (const double us : {times.attention_us, times.experts_us, times.dense_us, times.sample_us}) EXPECT_GT(us, 0.0);
  EXPECT_NEAR(times.total_us, times.attention_us + times.experts_us + times.dense_us + times.sample_us,
              1e-6 * times.total_us);
}

// Beside the host events cost: there one pass in seven has its lanes measured. Whichever has, all sums come out.
TEST_P(EngineTest, LanesAreMeasuredInSomePassesAndCountForAll) {
  const StepSequence one = sequence(1, blocks_ab_);
  LaneEstimate estimate;
  double total_us = 0.0;
  double lanes_us = 0.0;
  for (int pass = 0; pass < 15; ++pass) {
    SCOPED_TRACE(pass);
    const StepTimes times = run(box_.engine().begin({&one, 1}, box_.plan(1))).times;
    EXPECT_EQ(times.lanes_measured, std::string_view(GetParam()) == "cpu" || pass % 7 == 0);
    EXPECT_GT(times.total_us, 0.0);
    EXPECT_EQ(times.experts_us > 0.0, times.lanes_measured);
    const StepTimes sums = estimate.of(times);
    EXPECT_EQ(sums.total_us, times.total_us);
    total_us += sums.total_us;
    lanes_us += sums.attention_us + sums.experts_us + sums.dense_us + sums.sample_us;
  }
  EXPECT_NEAR(lanes_us, total_us, 1e-6 * total_us);
}

TEST_P(EngineTest, BrokenSequencesEndTheProcess) {
  const auto begin = [&](const StepSequence& broken) { box_.engine().begin({&broken, 1}, box_.plan(1)); };
  const std::vector<int32_t> outside = {0, 16};
  const std::vector<int32_t> few = {0};
  EXPECT_DEATH(begin(sequence(1, outside)), "KV block 16");
  EXPECT_DEATH(begin(sequence(1, few)), "needs 2 KV blocks and has 1");
  StepSequence early = sequence(1, blocks_ab_);
  early.num_new = 5;
  EXPECT_DEATH(begin(early), "samples before its last token");
  tokens_[3] = model_.config.vocab_size;
  EXPECT_DEATH(begin(sequence(1, blocks_ab_)), "holds token");
  const StepSequence valid = sequence(1, blocks_ab_);
  EXPECT_DEATH(box_.engine().begin({&valid, 1}, box_.plan(7)), "split");
  // Neither engine has a ring: what the host may not do has no place.
  StepPlan plan = box_.plan(1);
  plan.costs = {.copy_us = 1.0, .device_row_us = 1.0, .host_base_us = INFINITY, .host_row_us = INFINITY};
  EXPECT_DEATH(box_.engine().begin({&valid, 1}, plan), "layer 0, expert 0 would have no place");
}

// The host device, whose lanes are measured in so many passes as if events cost: its clock is the wall's, and work runs
// when it is enqueued.
class CostlyEvents final : public Device {
 public:
  explicit CostlyEvents(std::unique_ptr<Device> device) : device_(std::move(device)) {}
  std::string_view description() const override { return device_->description(); }
  bool is_host() const override { return true; }
  bool events_are_free() const override { return false; }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override { return device_->allocate(bytes, memory); }
  std::unique_ptr<Stream> make_stream() override { return device_->make_stream(); }
  std::unique_ptr<Event> make_event() override { return device_->make_event(); }
  Ops& ops() override { return device_->ops(); }
  Ops& host_ops() override { return device_->host_ops(); }
  Stream& host_stream() override { return device_->host_stream(); }
  std::unique_ptr<HostAttention> make_host_attention() override { return device_->make_host_attention(); }
  int num_host_threads() const override { return device_->num_host_threads(); }
  void run_host(int64_t count, FunctionRef<void(int64_t, int)> fn) override { device_->run_host(count, fn); }

 private:
  void release(std::byte*, int64_t, Memory) override { FAIL() << "a buffer belongs to the device that made it"; }
  const std::unique_ptr<Device> device_;
};

// Whether its lanes are measured or not.
TEST(StepClock, APassThatRestsTakesNoTime) {
  constexpr double kSleepUs = 400e3;  // more than passes of so small a model take
  const Model model = parse_tiny(tiny_models()[0]);
  EngineBox box(model, *dummy_weights(model, 1), std::make_unique<CostlyEvents>(opened("cpu", {.num_threads = 1})),
                small_config());
  const std::vector<int32_t> tokens(20, 1);
  const std::vector<std::vector<int32_t>> blocks = {{0, 1}, {2, 3}};
  const auto begin = [&](SequenceId id) {
    StepSequence made;
    made.tokens = tokens;
    made.id = id;
    made.num_prompt = made.num_new = static_cast<int32_t>(tokens.size());
    made.blocks = blocks[id];
    return box.engine().begin({&made, 1}, box.plan(1));
  };
  const auto finish = [&](Pass pass) {
    while (box.engine().advance(pass)) {
    }
    return box.engine().finish(std::move(pass)).times;
  };
  for (int round = 0; round < 3; ++round) {
    SCOPED_TRACE(round);
    Pass first = begin(0);
    box.engine().advance(first);
    if (round == 2) std::this_thread::sleep_for(std::chrono::duration<double, std::micro>(kSleepUs));
    Pass second = begin(1);
    std::this_thread::sleep_for(std::chrono::duration<double, std::micro>(kSleepUs));
    const StepTimes of_second = finish(std::move(second));
    const StepTimes of_first = finish(std::move(first));
    // Until another pass begins the time is the first one's.
    EXPECT_LT(of_first.total_us, round == 2 ? 2 * kSleepUs : kSleepUs);
    EXPECT_GT(of_first.total_us, round == 2 ? kSleepUs : 0.0);
    EXPECT_GE(of_second.total_us, kSleepUs);
    EXPECT_EQ(of_first.lanes_measured, round == 0);
    EXPECT_FALSE(of_second.lanes_measured);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, EngineTest, ::testing::Values("cpu", "emulated"),
                         [](const auto& param) { return std::string(param.param); });

// Counts what an engine takes.
class CountingDevice : public Device {
 public:
  explicit CountingDevice(Device& device) : device_(device) {}
  std::string_view description() const override { return device_.description(); }
  bool is_host() const override { return device_.is_host(); }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override {
    taken_bytes += bytes;
    if (taken_bytes > limit_bytes)
      return Status(StatusCode::kResourceExhausted, "no " + std::to_string(bytes) + " bytes");
    return device_.allocate(bytes, memory);
  }
  std::unique_ptr<Stream> make_stream() override { return device_.make_stream(); }
  std::unique_ptr<Event> make_event() override { return device_.make_event(); }
  std::unique_ptr<Event> make_timed_event() override { return device_.make_timed_event(); }
  Ops& ops() override { return device_.ops(); }
  Ops& host_ops() override { return device_.host_ops(); }
  Stream& host_stream() override { return device_.host_stream(); }
  std::unique_ptr<HostAttention> make_host_attention() override { return device_.make_host_attention(); }
  int64_t taken_bytes = 0;
  int64_t limit_bytes = int64_t{1} << 40;

 private:
  void release(std::byte*, int64_t, Memory) override { FAIL() << "a buffer belongs to the device that made it"; }
  Device& device_;
};

TEST(EngineMemory, ActivationBytesAreWhatIsTakenAndWithinTheBudget) {
  for (const TinyModel& tiny : tiny_models()) {
    const Model model = parse_tiny(tiny);
    const auto source = dummy_weights(model, 1);
    const auto weights = DenseWeights::load(model, *source, [](int64_t) {});
    const auto experts = ExpertStore::load(model, *source, [](int64_t) {});
    ASSERT_TRUE(weights.ok() && experts.ok());
    for (const int32_t rows : {1, 40, 300}) {
      EngineConfig config = small_config();
      config.rows_max = rows;
      const int64_t kv_bytes = config.kv_blocks * config.block_tokens * model.config.kv_bytes_per_token();
      for (const bool enough : {true, false}) {
        const auto device = open_device("cpu", {.num_threads = 1});
        ASSERT_TRUE(device.ok());
        CountingDevice counting(*device.value());
        if (!enough) counting.limit_bytes = engine_activation_bytes(model.config, config) + kv_bytes - 1;
        const auto engine = make_engine(model, *weights, *experts, counting, config);
        EXPECT_EQ(engine.ok(), enough);
        if (!enough) {
          EXPECT_EQ(engine.status().code(), StatusCode::kResourceExhausted);
        }
        EXPECT_EQ(counting.taken_bytes, engine_activation_bytes(model.config, config) + kv_bytes)
            << tiny.name << ", rows " << rows;
      }
      BudgetLimits limits;
      limits.kv_gib = 1.0;
      limits.max_model_len = config.max_model_len;
      limits.pass_rows_max = config.rows_max;
      limits.sequences_max = config.sequences_max;
      limits.block_tokens = config.block_tokens;
      MachineMemory machine;
      machine.host_free_bytes = int64_t{1} << 40;
      const auto budget = memory_budget(model.config, limits, machine);
      ASSERT_TRUE(budget.ok()) << budget.status().message();
      EXPECT_GE(budget->activation_bytes, engine_activation_bytes(model.config, config)) << tiny.name;
      EXPECT_LE(budget->activation_bytes, 3 * engine_activation_bytes(model.config, config) + (1 << 20)) << tiny.name;
    }
  }
}

TEST(EngineMemory, BadConfigsNameTheField) {
  const Model model = parse_tiny(tiny_models()[0]);
  const auto source = dummy_weights(model, 1);
  const auto weights = DenseWeights::load(model, *source, [](int64_t) {});
  const auto experts = ExpertStore::load(model, *source, [](int64_t) {});
  const auto device = open_device("cpu", {.num_threads = 1});
  ASSERT_TRUE(weights.ok() && experts.ok() && device.ok());
  const auto message = [&](auto change) {
    EngineConfig config = small_config();
    change(config);
    const auto engine = make_engine(model, *weights, *experts, *device.value(), config);
    return engine.ok() ? std::string() : engine.status().message();
  };
  EXPECT_NE(message([](EngineConfig& config) { config.rows_max = 0; }).find("rows_max is 0"), std::string::npos);
  EXPECT_NE(message([](EngineConfig& config) { config.max_model_len = 257; }).find("257; the model's limit is 256"),
            std::string::npos);
  EXPECT_NE(message([](EngineConfig& config) { config.kv_blocks = int64_t{1} << 40; }).find("kv_blocks"),
            std::string::npos);
  EXPECT_NE(message([](EngineConfig& config) { config.block_tokens = -1; }).find("block_tokens"), std::string::npos);
  EXPECT_NE(message([](EngineConfig& config) { config.staging_blocks = -2; }).find("staging_blocks is -2"),
            std::string::npos);
  EXPECT_NE(
      message([](EngineConfig& config) { config.ring.num_slots = 4; }).find("ring.num_slots is 4; the host device"),
      std::string::npos);
}

class StreamWithoutCopies final : public Stream {
 public:
  void copy(void*, const void*, int64_t) override { ADD_FAILURE() << "a copy between places of the same memory"; }
  void record(Event&) override {}
  void wait(const Event&) override {}
};

TEST(KvPool, ABlockIsCopiedByKernels) {
  const Model model = parse_tiny(tiny_models()[0]);
  const auto host = open_device("cpu", {.num_threads = 1}).value();
  const auto pool = KvPool::make(model.config, {3, 16, model.config.num_layers, Memory::kMapped}, *host);
  ASSERT_TRUE(pool.ok());
  for (int32_t layer = 0; layer < model.config.num_layers; ++layer) {
    Bf16* block = pool->layer(layer).k(2, 0);
    std::fill_n(block, pool->layer(layer).block_stride, Bf16(static_cast<float>(layer + 1)));
  }
  StreamWithoutCopies stream;
  pool->copy_block(2, 0, host->ops(), stream);
  for (int32_t layer = 0; layer < model.config.num_layers; ++layer) {
    const KvLayer view = pool->layer(layer);
    EXPECT_EQ(std::memcmp(view.k(0, 0), view.k(2, 0), static_cast<size_t>(pool->block_bytes())), 0);
    EXPECT_EQ(view.k(1, 0)->bits, 0);
  }
  const KvPoolConfig huge{1, 1 << 30, 1, Memory::kMapped};
  EXPECT_NE(KvPool::make(model.config, huge, *host).status().message().find("block_tokens"), std::string::npos);
}

TEST(KvPool, BlocksOfAllLayersAreApart) {
  const Model model = parse_tiny(tiny_models()[0]);
  const auto host = open_device("cpu", {.num_threads = 1});
  ASSERT_TRUE(host.ok());
  const auto pool = KvPool::make(model.config, {5, 16, model.config.num_layers, Memory::kMapped}, *host.value());
  ASSERT_TRUE(pool.ok());
  const AttentionConfig& attention = model.config.attention;
  const auto each = [&](auto visit) {
    uint16_t number = 0;
    for (int32_t layer = 0; layer < model.config.num_layers; ++layer) {
      const KvLayer view = pool->layer(layer);
      for (int32_t block = 0; block < 5; ++block) {
        for (int32_t head = 0; head < attention.num_kv_heads; ++head) {
          for (int32_t i = 0; i < 16 * attention.head_dim; ++i) {
            visit(view.k(block, head)[i], number++);
            visit(view.v(block, head)[i], number++);
          }
        }
      }
    }
  };
  each([](Bf16& at, uint16_t number) { at.bits = number; });
  int num_wrong = 0;
  each([&](const Bf16& at, uint16_t number) { num_wrong += at.bits != number ? 1 : 0; });
  EXPECT_EQ(num_wrong, 0);
  const KvLayer last = pool->layer(model.config.num_layers - 1);
  const auto elements = static_cast<size_t>(last.block_stride);
  const std::vector<Bf16> before(last.k(4, 0), last.k(4, 0) + elements);
  // In its turn: after what was enqueued before it, even where nothing of that has run.
  const auto device = late_device(open_device("cpu", {.num_threads = 1}).value());
  const auto stream = device->make_stream();
  const std::vector<Bf16> first(last.k(0, 0), last.k(0, 0) + elements);
  stream->copy(last.k(4, 0), first.data(), static_cast<int64_t>(elements * sizeof(Bf16)));
  pool->copy_block(4, 1, device->ops(), *stream);
  pool->copy_block(2, 4, device->ops(), *stream);
  EXPECT_EQ(std::memcmp(last.k(4, 0), before.data(), elements * sizeof(Bf16)), 0);
  const auto copied = device->make_event();
  stream->record(*copied);
  ASSERT_TRUE(copied->join().ok());
  EXPECT_EQ(std::memcmp(last.k(1, 0), first.data(), elements * sizeof(Bf16)), 0);
  EXPECT_EQ(std::memcmp(last.k(4, 0), last.k(2, 0), elements * sizeof(Bf16)), 0);
}

}  // namespace
}  // namespace moed
