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
  Client(ServingLoop& loop, RequestId id, std::vector<int32_t> prompt, int32_t max_tokens, int32_t n = 1,
         size_t events_max = 100000) {
    stream_ = std::make_shared<RequestStream>(
        events_max, [signal = signal_] { signal->notify(); }, [&loop] { loop.signal(); });
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
    std::unique_lock lock(signal_->mutex);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (events_.size() < count && failure_.ok()) {
      RequestStream::News news = stream_->take();
      for (TokenEvent& event : news.events) events_.push_back(std::move(event));
      failure_ = news.failure;
      if (events_.size() >= count || !failure_.ok()) break;
      if (!signal_->woken && signal_->wake.wait_until(lock, deadline) == std::cv_status::timeout) break;
      signal_->woken = false;
    }
    return events_;
  }
  // Those that have come in so far.
  std::vector<TokenEvent> take_more() {
    const std::lock_guard lock(signal_->mutex);
    for (TokenEvent& event : stream_->take().events) events_.push_back(std::move(event));
    return events_;
  }
  const Status& failure() const { return failure_; }
  RequestStream& stream() { return *stream_; }

 private:
  // Outlives the client: the serving thread may wake it once more.
  struct Signal {
    void notify() {
      {
        std::lock_guard lock(mutex);
        woken = true;
      }
      wake.notify_all();
    }
    std::mutex mutex;
    std::condition_variable wake;
    bool woken = false;
  };
  std::shared_ptr<Signal> signal_ = std::make_shared<Signal>();
  std::shared_ptr<RequestStream> stream_;
  std::vector<TokenEvent> events_;
  Status failure_;
};

class ServingLoopTest : public ::testing::Test {
 protected:
  void begin(int64_t num_blocks, int64_t layer_us, int64_t row_us = 0, StepModel prior = StepModel(100.0, 1.0, 0.0),
             ServingConfig serving = {}) {
    FakeEngineConfig engine;
    engine.num_layers = 4;
    engine.num_blocks = num_blocks;
    engine.vocab_size = kVocab;
    engine.layer_us = layer_us;
    engine.row_us = row_us;
    engine.breaks_on = breaks_on_;
    engine_ = std::make_unique<FakeEngine>(engine);
    SchedulerConfig config;
    config.num_blocks = num_blocks;
    scheduler_ = std::make_unique<Scheduler>(config);
    model_.num_layers = 4;
    model_.layers.assign(4, LayerKind::kDense);
    loop_ = std::make_unique<ServingLoop>(*engine_, *scheduler_, model_, prior, metrics_, serving);
    loop_->start();
    stopped_ = false;
  }
  void stop() {
    if (loop_ == nullptr || stopped_) return;
    stopped_ = true;
    loop_->stop(Status(StatusCode::kUnavailable, "the server is shutting down"));
    EXPECT_EQ(loop_->num_open(), 0);
    EXPECT_EQ(engine_->num_alive(), 0);
    EXPECT_EQ(scheduler_->stats().blocks_used(), 0);
    scheduler_->check_invariants();
  }
  void TearDown() override { stop(); }
  void wait_idle() {
    for (int i = 0; i < 1000 && loop_->num_open() > 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    EXPECT_EQ(loop_->num_open(), 0);
    // The last pass's numbers are published at its end.
    for (int i = 0; i < 1000 && loop_->stats().blocks_used() > 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    EXPECT_EQ(loop_->stats().num_running, 0);
    EXPECT_EQ(loop_->stats().blocks_used(), 0);
  }
  static std::vector<int32_t> prompt(int32_t length, int32_t first) {
    std::vector<int32_t> tokens(length);
    for (int32_t i = 0; i < length; ++i) tokens[i] = (first + i * 7) % kVocab;
    return tokens;
  }

  ModelConfig model_;
  ServerMetrics metrics_{"test"};
  int32_t breaks_on_ = -1;
  std::unique_ptr<FakeEngine> engine_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<ServingLoop> loop_;
  bool stopped_ = false;
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
  begin(1024, 400'000);
  Client client(*loop_, 1, prompt(400, 1), 100);
  for (int i = 0; i < 1000 && loop_->stats().blocks_used() == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const int64_t before = now_us();
  client.stream().cancel();
  wait_idle();
  // A layer is under way, the next must not be: the pass has four.
  EXPECT_LT(now_us() - before, 800'000);
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

TEST_F(ServingLoopTest, ABrokenAnswerFailsItsRequestAlone) {
  breaks_on_ = 5;
  begin(1024, 0);
  std::vector<int32_t> tokens = prompt(30, 1);
  tokens[20] = breaks_on_;
  Client broken(*loop_, 1, tokens, 10);
  broken.wait_for(1);
  EXPECT_EQ(broken.failure().code(), StatusCode::kInternal);
  EXPECT_NE(broken.failure().message().find("NaN"), std::string::npos) << broken.failure().message();
  std::replace(tokens.begin(), tokens.end(), breaks_on_, breaks_on_ + 1);
  Client whole(*loop_, 2, tokens, 1);
  EXPECT_EQ(whole.wait_for(1).size(), 1U) << whole.failure().message();
  wait_idle();
  EXPECT_NE(metrics_.text().find("finished_reason=\"error\""), std::string::npos);
}

// What /live is told by: fresh while there is nothing to do, stale while a layer does not come back.
TEST_F(ServingLoopTest, TheHeartbeatStandsStillWithTheEngine) {
  constexpr int64_t kLayerUs = 800'000;
  begin(64, kLayerUs);
  const auto oldest_us = [&](int64_t milliseconds) {
    int64_t oldest = 0;
    for (int64_t i = 0; i < milliseconds / 5; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      oldest = std::max(oldest, now_us() - loop_->heartbeat_us());
    }
    return oldest;
  };
  const int64_t idle_us = oldest_us(500);
  EXPECT_LT(idle_us, kLayerUs / 2);
  {
    const Client client(*loop_, 1, prompt(8, 1), 1);
    EXPECT_GT(oldest_us(1000), kLayerUs / 2);
  }
  wait_idle();
  EXPECT_LT(oldest_us(300), kLayerUs / 2);
}

TEST_F(ServingLoopTest, StopFailsWhatStillRuns) {
  begin(1024, 5'000);
  Client client(*loop_, 1, prompt(10, 1), 4000);
  client.wait_for(1);
  stop();
  client.wait_for(100'000);
  EXPECT_EQ(client.failure().code(), StatusCode::kUnavailable);
  Client late(*loop_, 2, prompt(10, 1), 10);
  EXPECT_EQ(late.failure().code(), StatusCode::kUnavailable);
  EXPECT_NE(metrics_.text().find("finished_reason=\"abort\"} 1"), std::string::npos);
}

TEST_F(ServingLoopTest, StopWaitsForALayerNotForAPass) {
  for (const int32_t length : {10, 400}) {  // an interactive and a bulk pass of 4 layers
    begin(1024, 400'000);
    Client client(*loop_, 1, prompt(length, 1), 10);
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    const int64_t before = now_us();
    stop();
    EXPECT_LT(now_us() - before, 1'200'000);
  }
}

TEST_F(ServingLoopTest, NothingThatWasSubmittedIsLostToAStop) {
  for (int round = 0; round < 30; ++round) {
    begin(1024, 0);
    std::vector<std::thread> doors;
    std::atomic<int> num_ended{0};
    for (int door = 0; door < 4; ++door) {
      doors.emplace_back([&, door] {
        for (RequestId i = 1;; ++i) {
          Client client(*loop_, i * 4 + door, prompt(10, door), 1);
          client.wait_for(1);
          if (!client.failure().ok()) break;
        }
        ++num_ended;
      });
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    loop_->stop(Status(StatusCode::kUnavailable, "the server is shutting down"));
    for (std::thread& door : doors) door.join();
    EXPECT_EQ(num_ended, 4);
    EXPECT_EQ(loop_->num_open(), 0);
    stopped_ = true;
    loop_.reset();
  }
}

// Without the rest between its layers the long prompt would hold the answer up for all of its 80 ms.
TEST_F(ServingLoopTest, AnAnswerGoesOnBetweenTheLayersOfALongPrompt) {
  // Rows cost, the sweep does not: no pass is shared.
  begin(1024, 20'000, 0, StepModel(1.0, 200.0, 0.0));
  Client answer(*loop_, 1, prompt(10, 1), 4000);
  const size_t before = answer.wait_for(1).size();
  Client long_prompt(*loop_, 2, prompt(400, 2), 1);
  ASSERT_EQ(long_prompt.wait_for(1).size(), 1U);
  EXPECT_GE(answer.take_more().size(), before + 3);
}

TEST_F(ServingLoopTest, PassesCutShortTeachNothing) {
  // What the engine reports is what this model predicts, for passes that keep all of their rows.
  const StepModel prior(0.0, 4 * 200.0, 0.0);
  begin(1024, 0, 200, prior);
  Client first(*loop_, 1, prompt(400, 1), 1);
  Client stays(*loop_, 2, prompt(200, 2), 1);
  Client leaves(*loop_, 3, prompt(200, 3), 1);
  ASSERT_EQ(first.wait_for(1).size(), 1U);
  std::this_thread::sleep_for(std::chrono::milliseconds(30));  // of the 320 of the pass of the other two
  leaves.stream().cancel();
  ASSERT_EQ(stays.wait_for(1).size(), 1U);
  stop();
  EXPECT_NEAR(loop_->step_model().row_us(), prior.row_us(), 1e-6);
}

// Two prompts of 50 and 10 tokens and one of 40: the halves of a pass of all three attend to 1275 and 875 tokens at
// best.
TEST_F(ServingLoopTest, PassesArePlannedByThePolicyAndSplitByAttention) {
  ServingConfig serving;
  serving.planning.policy =
      &*std::find_if(policies().begin(), policies().end(), [](const Policy& policy) { return policy.all_resident; });
  serving.planning.halves = 2;
  begin(1024, 20'000, 0, StepModel(100.0, 1.0, 0.0), serving);
  Client first(*loop_, 1, prompt(8, 1), 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(10));  // the pass of the first is under way
  Client a(*loop_, 2, prompt(50, 2), 1);
  Client b(*loop_, 3, prompt(10, 3), 1);
  Client c(*loop_, 4, prompt(40, 4), 1);
  ASSERT_EQ(a.wait_for(1).size(), 1U);
  ASSERT_EQ(c.wait_for(1).size(), 1U);
  stop();
  ASSERT_EQ(engine_->plans().size(), 2U);
  for (const StepPlan& plan : engine_->plans()) {
    EXPECT_EQ(plan.layers, std::vector<LayerMode>(4, LayerMode::kWhole));
    EXPECT_FALSE(plan.costs.host_allowed());
    EXPECT_EQ(plan.split, 1);  // of one sequence, and of three
  }
}

// Not as a full queue does: to try again would not help.
TEST_F(ServingLoopTest, AClientThatDoesNotReadIsToldSo) {
  begin(1024, 0);
  Client client(*loop_, 1, prompt(4, 1), 100, 1, /*events_max=*/10);
  for (int i = 0; i < 1000 && loop_->num_open() > 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const RequestStream::News news = client.stream().take();
  EXPECT_EQ(news.events.size(), 10U);
  EXPECT_EQ(news.failure.code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(news.failure.detail(), "client_too_slow");
}

TEST_F(ServingLoopTest, ThereIsNoTimeToAFirstTokenWhereThereIsNone) {
  begin(1024, 0);
  Client none(*loop_, 1, prompt(4, 1), 0);
  none.wait_for(1);
  wait_idle();
  EXPECT_NE(metrics_.text().find("vllm:time_to_first_token_seconds_count{engine=\"0\",model_name=\"test\"} 0"),
            std::string::npos);
  EXPECT_NE(metrics_.text().find("vllm:prompt_tokens_total{engine=\"0\",model_name=\"test\"} 4"), std::string::npos);
  Client one(*loop_, 2, prompt(4, 1), 1);
  one.wait_for(1);
  wait_idle();
  EXPECT_NE(metrics_.text().find("vllm:time_to_first_token_seconds_count{engine=\"0\",model_name=\"test\"} 1"),
            std::string::npos);
}

TEST_F(ServingLoopTest, ARequestPastItsTimeFails) {
  ServingConfig serving;
  serving.request_seconds = 0.3;
  begin(1024, 2'000, 0, StepModel(100.0, 1.0, 0.0), serving);
  Client brief(*loop_, 1, prompt(10, 1), 2);
  Client client(*loop_, 2, prompt(10, 2), 4000);
  EXPECT_EQ(brief.wait_for(2).size(), 2U);
  EXPECT_TRUE(brief.failure().ok());
  const int64_t before = now_us();
  client.wait_for(4000);
  EXPECT_EQ(client.failure().code(), StatusCode::kDeadlineExceeded);
  EXPECT_NE(client.failure().message().find("0.3 s (limits.request_seconds)"), std::string::npos);
  EXPECT_LT(now_us() - before, 3'000'000);
  wait_idle();
}

}  // namespace
}  // namespace moed
