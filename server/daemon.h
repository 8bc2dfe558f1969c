#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>

#include "base/thread_annotations.h"
#include "server/api_keys.h"
#include "server/backend.h"
#include "server/service.h"
#include "server/serving_loop.h"
#include "server/settings.h"
#include "server/text_pool.h"
#include "server/validate.h"

namespace moed {

// The daemon behind both doors. Made empty, so that the doors can open at once; load() fills it on the main thread;
// requests are refused as unavailable until it is done, and again from drain() on.
class Daemon final : public Service {
 public:
  Daemon(Settings settings, ApiKeys keys);
  ~Daemon() override;

  // Main thread, once. Errors are one line for the operator.
  Status load(const BackendFactory& factory);
  // Refuses new requests; returns when all that were let in have ended, or `seconds` have passed.
  void drain(double seconds);
  // Fails what still runs and ends the serving thread. After it only the destructor may be called by main; doors may
  // still poll.
  void stop();

  std::shared_ptr<Generation> start(GenerationParams params, std::function<void()> wake) override;
  void tokenize(TokenizeParams params, std::function<void(StatusOr<TokenizeResult>)> done) override;
  void detokenize(std::string model, std::vector<int64_t> tokens,
                  std::function<void(StatusOr<std::string>)> done) override;
  Health health() const override;
  ModelInfo model() const override;
  Loads loads() const override;
  Status check_model(const std::string& name) const override;
  std::string info_json() const override;
  std::string metrics_text() const override;
  bool authorized(std::string_view presented) const override;

 private:
  // What load() makes; constant afterwards but for what synchronises itself.
  struct Loaded {
    Model model;
    std::unique_ptr<Tokenizer> tokenizer;
    std::unique_ptr<ChatTemplate> chat_template;
    ValidationContext context;
    std::unique_ptr<Backend> backend;
    std::unique_ptr<Scheduler> scheduler;
    std::unique_ptr<ServingLoop> loop;
  };
  Status load_text(Loaded& loaded) const;
  Status unavailable() const;

  const Settings settings_;
  const ApiKeys keys_;
  std::vector<std::string> names_;
  const int64_t created_s_;
  ServerMetrics metrics_;
  std::atomic<ServerState> state_{ServerState::kLoading};
  std::atomic<int64_t> loaded_bytes_{0};
  std::atomic<int64_t> total_bytes_{0};
  std::atomic<RequestId> next_request_{1};
  std::atomic<int64_t> num_preparing_{0};  // calls let in that the serving loop does not know yet
  std::unique_ptr<Loaded> storage_;        // main thread
  std::atomic<Loaded*> loaded_{nullptr};   // set once, when load() is done
  bool stopped_ = false;                   // main thread
  std::unique_ptr<TextPool> text_pool_;    // dies before what its tasks use
};

}  // namespace moed
