#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/thread_annotations.h"
#include "server/choice_text.h"
#include "server/request_stream.h"
#include "server/service.h"
#include "server/serving_loop.h"
#include "server/validate.h"

namespace moed {

// One call under way: prepared on the text pool, run by the serving loop, polled by its door. The tokenizer and the
// loop outlive it.
class GenerationImpl final : public Generation {
 public:
  GenerationImpl(int64_t arrival_us, const Tokenizer* tokenizer, ServingLoop* loop, std::function<void()> wake);
  ~GenerationImpl() override;

  // Text pool, at most one of them, once. run() queues one request a prompt; first_id, first_id + 1, ... are theirs;
  // events_max: a choice, that the door may leave unread.
  void refuse(Status status) MOED_EXCLUDES(mutex_);
  void run(ValidGeneration valid, const RequestLimits& limits, RequestId first_id, size_t events_max)
      MOED_EXCLUDES(mutex_);
  // The part of run() that queues nothing: who calls it feeds the streams, one a prompt.
  void attach(ValidGeneration valid, const std::vector<std::shared_ptr<RequestStream>>& streams) MOED_EXCLUDES(mutex_);
  bool cancelled() const { return cancelled_.load(std::memory_order_acquire); }

  Update poll() override;
  Usage usage() const override { return usage_; }
  int32_t num_choices() const override { return static_cast<int32_t>(choices_.size()); }
  void cancel() override MOED_EXCLUDES(mutex_);

 private:
  // What the text pool hands to the door.
  struct Prepared {
    ValidGeneration valid;
    std::vector<std::shared_ptr<RequestStream>> streams;
  };
  void take_over(Prepared prepared);
  void await_prepared(Update& update) MOED_EXCLUDES(mutex_);
  void await_accepted(Update& update);
  Status take_events(size_t prompt, Update& update);
  Status push_event(size_t prompt, const TokenEvent& event, std::vector<Delta>& deltas);
  void keep_prompt_scores(size_t prompt, const std::vector<ScoredToken>& scores);
  void add_prompt(size_t prompt, Delta& delta);
  bool has_open_choice(size_t prompt) const;
  void fail(Status status, Phase phase, Update& update);

  const int64_t arrival_us_;
  const Tokenizer* const tokenizer_;
  ServingLoop* const loop_;
  const std::function<void()> wake_;
  std::atomic<bool> cancelled_{false};

  Mutex mutex_;
  std::unique_ptr<Prepared> prepared_ MOED_GUARDED_BY(mutex_);
  Status refusal_ MOED_GUARDED_BY(mutex_);
  // The streams to tell of a cancel: of prepared_, or of the door's own copy.
  std::vector<std::shared_ptr<RequestStream>> cancel_streams_ MOED_GUARDED_BY(mutex_);

  // Door's thread only.
  Phase phase_ = Phase::kPreparing;
  ValidGeneration valid_;
  std::vector<std::shared_ptr<RequestStream>> streams_;  // a prompt
  std::vector<ChoiceText> choices_;                      // prompt * n + choice
  std::vector<bool> begun_;                              // a choice
  std::vector<SharedVector<TokenText>> prompt_tokens_;   // a prompt, when scores are returned
  int32_t open_choices_ = 0;
  Usage usage_;
};

}  // namespace moed
