#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/shared_vector.h"
#include "base/status.h"
#include "scheduler/scheduler.h"
#include "server/service.h"
#include "server/stop_matcher.h"
#include "text/tokenizer.h"

namespace moed {

struct ChoiceTextOptions {
  SharedVector<std::string> stop;
  bool include_stop = false;  // the stop string, or the stop token's text, stays in the answer
  bool skip_special_tokens = true;
  int32_t min_tokens = 0;  // no stop string counts that ends in the first so many tokens
  bool logprobs = false;   // deltas carry logprobs
};

TokenText token_text(const Tokenizer& tokenizer, const ScoredToken& token, bool logprobs);

// Turns one choice's token events into deltas: incremental text, stop strings, and each token travelling with its text.
// Door's thread only.
class ChoiceText {
 public:
  ChoiceText(const Tokenizer& tokenizer, int32_t choice, ChoiceTextOptions options,
             std::span<const int32_t> prompt_tail);

  // Adds what the event makes certain to `deltas` (at most one delta; one without text for a first token whose text is
  // held). Events after the end are ignored.
  // Returns true when a stop string ended the choice here: the scheduler does not know yet.
  StatusOr<bool> push(const TokenEvent& event, std::vector<Delta>& deltas);

  bool finished() const { return finished_; }
  int32_t num_tokens() const { return num_tokens_; }

 private:
  struct Held {
    TokenText token;
    int64_t begin = 0;  // where its text begins in the answer, bytes
    int64_t end = 0;    // at least one byte behind that
  };
  bool is_text(const TokenEvent& event) const;
  // True: a stop string ended the choice.
  StatusOr<bool> add_text(const ScoredToken& token, Delta& delta);
  // What is held goes out, as the scheduler ended the choice.
  Status finish(const TokenEvent& event, Delta& delta);
  void release(std::string_view text, Delta& delta);
  void end(FinishReason reason, Delta& delta);

  const Tokenizer& tokenizer_;
  const int32_t choice_;
  const ChoiceTextOptions options_;
  Detokenizer detokenizer_;
  StopMatcher matcher_;
  std::deque<Held> held_;
  std::vector<int32_t> unsent_ids_;
  int64_t produced_bytes_ = 0;
  int64_t released_bytes_ = 0;
  int32_t num_tokens_ = 0;
  bool finished_ = false;
};

}  // namespace moed
