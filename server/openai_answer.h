#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "server/openai.h"
#include "server/openai_json.h"
#include "server/service.h"

namespace moed {

// What all pieces of one answer carry.
struct AnswerHead {
  std::string id;  // "chatcmpl-..." or "cmpl-..."
  int64_t created_s = 0;
  std::string model;
};

// Completion log-probabilities of one choice; offsets count Unicode characters and go on from piece to piece. A token
// that is not UTF-8 by itself is spelled "bytes:\xe2\x82", as OpenAI spells it: keys of JSON must differ.
class CompletionLogprobs {
 public:
  // `num_top`: alternatives beside the chosen token.
  explicit CompletionLogprobs(int64_t num_top) : num_top_(num_top) {}
  void add(const std::vector<TokenText>& tokens);
  // The object {tokens, token_logprobs, top_logprobs, text_offset} of what was added since the last call.
  WireJson take();

 private:
  int64_t num_top_;
  int64_t offset_ = 0;
  WireJson tokens_ = WireJson::array(), logprobs_ = WireJson::array(), top_ = WireJson::array(),
           offsets_ = WireJson::array();
};

// Deltas into the one JSON answer of a call that does not stream. Pure.
class PlainAnswer {
 public:
  PlainAnswer(const OpenAiCall& call, AnswerHead head) : call_(call), head_(std::move(head)) {}
  void add(const Delta& delta);
  // `num_choices`: those that never had a delta are there, too.
  std::string json(const Usage& usage, int32_t num_choices) const;

 private:
  struct Choice {
    std::string text;
    std::vector<TokenText> tokens;
    SharedVector<TokenText> prompt_tokens;
    std::vector<int32_t> token_ids, prompt_token_ids;
    FinishReason finish = FinishReason::kNone;
    std::string stop_text;
    int32_t stop_token = -1;
  };
  WireJson chat_choice(int32_t index, const Choice& choice) const;
  WireJson completion_choice(int32_t index, const Choice& choice) const;

  const OpenAiCall& call_;
  AnswerHead head_;
  std::map<int32_t, Choice> choices_;
};

// Deltas into server-sent events: at most one with text for each delta, none for held text. Pure.
class StreamAnswer {
 public:
  StreamAnswer(const OpenAiCall& call, AnswerHead head) : call_(call), head_(std::move(head)) {}
  void add(const Delta& delta, const Usage& usage, std::string& out);
  // The usage event when asked for, and [DONE].
  void end(const Usage& usage, std::string& out);

 private:
  void add_chat(const Delta& delta, const WireJson& usage, std::string& out);
  void add_completion(const Delta& delta, const WireJson& usage, std::string& out);
  // `prompt_ids`: beside the choices, as chats have them; may be null.
  void event(WireJson choices, const WireJson& usage, std::string& out,
             const std::vector<int32_t>* prompt_ids = nullptr) const;

  struct Choice {
    bool begun = false;
    CompletionLogprobs logprobs;
    std::vector<int32_t> unsent_ids, prompt_ids;  // with return_token_ids: for the choice's next event
  };
  Choice& choice(int32_t index);

  const OpenAiCall& call_;
  AnswerHead head_;
  std::map<int32_t, Choice> choices_;
};

}  // namespace moed
