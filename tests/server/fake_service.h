#pragma once

#include <atomic>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "server/service.h"

namespace moed {

// A Service whose answers are known: each choice says "Hello wonderful world" in three tokens, a millisecond apart,
// from a thread of its own. `max_tokens` other than unset shortens or lengthens it (the words repeat). Model names:
// "fake" and "org/fake".
class FakeService : public Service {
 public:
  std::atomic<int> alive{0}, cancelled{0}, started{0};
  std::string key;      // empty: none needed
  Status refusal;       // start() refuses with it
  int fail_after = -1;  // tokens after which generations fail
  int token_us = 1000;
  Health health_value{.state = ServerState::kReady};

  GenerationParams last_params() const {
    const std::lock_guard lock(mutex_);
    return last_;
  }

  std::shared_ptr<Generation> start(GenerationParams params, std::function<void()> wake) override {
    ++started;
    {
      const std::lock_guard lock(mutex_);
      last_ = params;
    }
    return std::make_shared<FakeGeneration>(*this, std::move(params), std::move(wake));
  }
  void tokenize(TokenizeParams params, std::function<void(StatusOr<TokenizeResult>)> done) override {
    if (params.text == "bad") return done(invalid_argument("prompt is bad", "prompt"));
    done(TokenizeResult{.tokens = {1, 2, static_cast<int32_t>(params.text.size())}, .max_model_len = 128});
  }
  void detokenize(std::string, std::vector<int64_t> tokens, std::function<void(StatusOr<std::string>)> done) override {
    done(std::to_string(tokens.size()) + " tokens");
  }
  Health health() const override { return health_value; }
  ModelInfo model() const override {
    return {.names = {"fake", "org/fake"}, .root = "fake-folder", .max_model_len = 128, .created_s = 1700000000};
  }
  Loads loads() const override { return {.running = alive, .waiting = 2, .kv_usage = 0.25}; }
  Status check_model(const std::string& name) const override {
    if (name.empty() || name == "fake" || name == "org/fake") return Status();
    return Status(StatusCode::kNotFound, "there is no such model; this server has: fake, org/fake", "model",
                  "model_not_found");
  }
  std::string info_json() const override { return "{\"build\":\"test\"}"; }
  std::string metrics_text() const override { return "# HELP x y\n"; }
  bool authorized(std::string_view presented) const override { return key.empty() || presented == key; }

 private:
  class FakeGeneration : public Generation {
   public:
    FakeGeneration(FakeService& owner, GenerationParams params, std::function<void()> wake)
        : owner_(owner), params_(std::move(params)), wake_(std::move(wake)) {
      ++owner_.alive;
      thread_ = std::thread([this] { run(); });
    }
    ~FakeGeneration() override {
      stop_ = true;
      thread_.join();
      if (!finished_) ++owner_.cancelled;
      --owner_.alive;
    }
    Update poll() override {
      const std::lock_guard lock(mutex_);
      Update out;
      out.phase = phase_;
      out.status = status_;
      out.deltas.swap(deltas_);
      return out;
    }
    Usage usage() const override {
      const std::lock_guard lock(mutex_);
      return {.prompt_tokens = 7, .cached_tokens = 3, .completion_tokens = num_tokens_};
    }
    int32_t num_choices() const override {
      return static_cast<int32_t>(params_.n * std::max<int64_t>(1, static_cast<int64_t>(params_.prompts.size())));
    }
    void cancel() override { stop_ = true; }

   private:
    TokenText token(int i) const {
      static const char* const kWords[] = {"Hello", " wonderful", " world"};
      TokenText out{.token = 10 + i % 3, .bytes = kWords[i % 3]};
      if (params_.logprobs) {
        out.logprob = -0.5F;
        out.top = {{out.token, out.bytes, -0.5F}, {99, "\xe2\x82", -2.0F}, {98, "!", -INFINITY}};
      }
      return out;
    }
    void run() {
      if (!owner_.refusal.ok()) return set(Phase::kRefused, owner_.refusal);
      set(Phase::kRunning, Status());
      const int count = static_cast<int>(params_.max_tokens.value_or(3));
      for (int i = 0; i < count && !stop_; ++i) {
        std::this_thread::sleep_for(std::chrono::microseconds(owner_.token_us));
        if (i == owner_.fail_after) {
          return set(Phase::kFailed, Status(StatusCode::kUnavailable, "the server is draining"));
        }
        const std::lock_guard lock(mutex_);
        for (int32_t choice = 0; choice < num_choices(); ++choice) {
          Delta delta{.choice = choice,
                      .text = token(i).bytes,
                      .tokens = {token(i)},
                      .token_ids = {10 + i % 3},
                      .num_tokens = i + 1};
          if (i == 0 && params_.return_token_ids) {
            delta.has_prompt = true;
            delta.prompt_token_ids = {1, 2};
          }
          if (i == 0 && params_.echo) {
            delta.has_prompt = true;
            delta.prompt_text = "Say:";
            delta.prompt_tokens = {{.token = 1, .bytes = "Say"}, {.token = 2, .bytes = ":", .logprob = -1.0F}};
          }
          if (i + 1 == count) delta.finish = params_.max_tokens ? FinishReason::kLength : FinishReason::kStop;
          deltas_.push_back(std::move(delta));
          ++num_tokens_;
        }
        if (i + 1 == count) phase_ = Phase::kDone;
        finished_ = phase_ == Phase::kDone;
        wake_();
      }
    }
    void set(Phase phase, Status status) {
      {
        const std::lock_guard lock(mutex_);
        phase_ = phase;
        status_ = std::move(status);
        finished_ = phase != Phase::kRunning;
      }
      wake_();
    }

    FakeService& owner_;
    const GenerationParams params_;
    const std::function<void()> wake_;
    mutable std::mutex mutex_;
    Phase phase_ = Phase::kPreparing;
    Status status_;
    std::vector<Delta> deltas_;
    int64_t num_tokens_ = 0;
    std::atomic<bool> stop_{false}, finished_{false};
    std::thread thread_;
  };

  mutable std::mutex mutex_;
  GenerationParams last_;
};

}  // namespace moed
