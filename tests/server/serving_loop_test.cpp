#include "server/serving_loop.h"

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <mutex>

#include "base/clock.h"
#include "tests/support/fake_engine.h"

namespace moed {
namespace {

constexpr int32_t kVocab = 512;

RequestLimits limits() {
  RequestLimits limits;
  limits.vocab_size = kVocab;
  limits.max_model_len = 4096;
  limits.n_max = 8;
  limits.new_tokens_max = 4096;
  limits.logprobs_max = 20;
  limits.logit_bias_max = 16;
  return limits;
}

// One request and what came of it.
class Client {
 public:
  Client(ServingLoop& loop, RequestId id, std::vector<int32_t> prompt, int32_t max_tokens, int32_t n = 1) {
    stream_ = std::make_shared<RequestStream>(
        100000, [this] { notify(); }, [&loop] { loop.signal(); });
    RequestSpec spec;
    spec.id = id;
    spec.prompt = std::move(prompt);
    spec.max_tokens = max_tokens;
    spec.n = n;
    spec.sampling.temperature = 0.0F;
    spec.arrival_us = now_us();
    auto request = Request::make(std::move(spec), limits());
    EXPECT_TRUE(request.ok()) << request.status().message();
    const Status status = loop.submit({std::move(*request), stream_});
    if (!status.ok()) failure_ = status;
  }
  ~Client() { stream_->cancel(); }

  // Events until `count` have come in all, the request failed, or ten seconds have passed.
  std::vector<TokenEvent> wait_for(size_t count) {
    std::unique_lock lock(mutex_);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (events_.size() < count && failure_.ok()) {
      RequestStream::News news = stream_->take();
      for (TokenEvent& event : news.events) events_.push_back(std::move(event));
      failure_ = news.failure;
      if (events_.size() >= count || !failure_.ok()) break;
      if (!woken_ && wake_.wait_until(lock, deadline) == std::cv_status::timeout) break;
      woken_ = false;
    }
    return events_;
  }
  const Status& failure() const { return failure_; }
  RequestStream& stream() { return *stream_; }

 private:
  void notify() {
    {
      std::lock_guard lock(mutex_);
      woken_ = true;
    }
    wake_.notify_all();
  }
  std::shared_ptr<RequestStream> stream_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool woken_ = false;
  std::vector<TokenEvent> events_;
  Status failure_;
};

class ServingLoopTest : public ::testing::Test {
 protected:
  void begin(int64_t num_blocks, int64_t layer_us) {
    FakeEngineConfig engine;
    engine.num_layers = 4;
    engine.num_blocks = num_blocks;
    engine.vocab_size = kVocab;
    engine.layer_us = layer_us;
    engine_ = std::make_unique<FakeEngine>(engine);
    SchedulerConfig config;
    config.num_blocks = num_blocks;
    scheduler_ = std::make_unique<Scheduler>(config);
    model_.num_layers = 4;
    model_.layers.assign(4, LayerKind::kDense);
    loop_ = std::make_unique<ServingLoop>(*engine_, *scheduler_, model_, StepModel(100.0, 1.0, 0.0), metrics_,
                                          ServingConfig());
    loop_->start();
  }
  void TearDown() override {
    if (loop_ != nullptr) loop_->stop(Status(StatusCode::kUnavailable, "the server is shutting down"));
    if (scheduler_ != nullptr) scheduler_->check_invariants();
  }
  void wait_idle() {
    for (int i = 0; i < 1000 && loop_->num_open() > 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    EXPECT_EQ(loop_->num_open(), 0);
    // The last pass's numbers are published at its end.
    for (int i = 0; i < 1000 && loop_->stats().blocks_used > 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    EXPECT_EQ(loop_->stats().num_running, 0);
    EXPECT_EQ(loop_->stats().blocks_used, 0);
  }
  static std::vector<int32_t> prompt(int32_t length, int32_t first) {
    std::vector<int32_t> tokens(length);
    for (int32_t i = 0; i < length; ++i) tokens[i] = (first + i * 7) % kVocab;
    return tokens;
  }

  ModelConfig model_;
  ServerMetrics metrics_{"test"};
  std::unique_ptr<FakeEngine> engine_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<ServingLoop> loop_;
};

TEST_F(ServingLoopTest, EachAnswerIsTheOneTheEngineGivesAlone) {
  begin(1024, 0);
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 16; ++i) clients.push_back(std::make_unique<Client>(*loop_, i + 1, prompt(5 + 40 * i, i), 20));
  for (int i = 0; i < 16; ++i) {
    std::vector<int32_t> tokens = prompt(5 + 40 * i, i);
    const auto events = clients[i]->wait_for(20);
    ASSERT_EQ(events.size(), 20U) << clients[i]->failure().message();
    for (const TokenEvent& event : events) {
      ASSERT_EQ(event.token.token, fake_next_token(tokens, 0, kVocab));
      tokens.push_back(event.token.token);
    }
    EXPECT_EQ(events.back().finish, FinishReason::kLength);
  }
  wait_idle();
}

TEST_F(ServingLoopTest, ChoicesOfOneRequestEndOneByOne) {
  begin(1024, 0);
  Client client(*loop_, 1, prompt(40, 3), 1000, 3);
  client.wait_for(10);
  client.stream().end_choice(1);
  const size_t seen = client.wait_for(60).size();
  EXPECT_GE(seen, 60U);
  client.stream().end_choice(0);
  client.stream().end_choice(2);
  wait_idle();
}

TEST_F(ServingLoopTest, ACancelFreesItsBlocksWithinALayerOfABulkPass) {
  begin(1024, 20'000);
  Client client(*loop_, 1, prompt(400, 1), 100);
  for (int i = 0; i < 1000 && loop_->stats().blocks_used == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const int64_t before = now_us();
  client.stream().cancel();
  wait_idle();
  // A layer of 20 ms is under way, the next must not be; generous for a busy machine.
  EXPECT_LT(now_us() - before, 2'000'000);
  EXPECT_NE(metrics_.text().find("finished_reason=\"abort\""), std::string::npos);
}

TEST_F(ServingLoopTest, ADeadDoorIsNoticedWhereverItsRequestIs) {
  begin(64, 500);
  for (int round = 0; round < 40; ++round) {
    Client queued(*loop_, 3 * round + 1, prompt(700, round), 50);
    Client running(*loop_, 3 * round + 2, prompt(20, round), 500);
    Client left(*loop_, 3 * round + 3, prompt(90, round), 100, 2);
    std::this_thread::sleep_for(std::chrono::milliseconds(round % 8));
  }
  wait_idle();
}

TEST_F(ServingLoopTest, StopFailsWhatStillRuns) {
  begin(1024, 5'000);
  Client client(*loop_, 1, prompt(10, 1), 4000);
  client.wait_for(1);
  loop_->stop(Status(StatusCode::kUnavailable, "the server is shutting down"));
  client.wait_for(100'000);
  EXPECT_EQ(client.failure().code(), StatusCode::kUnavailable);
  Client late(*loop_, 2, prompt(10, 1), 10);
  EXPECT_EQ(late.failure().code(), StatusCode::kUnavailable);
  loop_.reset();
  scheduler_.reset();
}

}  // namespace
}  // namespace moed
