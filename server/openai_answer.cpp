#include "server/openai_answer.h"

#include <algorithm>
#include <cstdio>

#include "text/utf8.h"

namespace moed {

namespace {

constexpr float kLogprobMin = -9999.0F;  // stands for minus infinity, which JSON does not know

float wire_logprob(float logprob) { return std::max(logprob, kLogprobMin); }

int64_t num_characters(const std::string& bytes) {
  return std::count_if(bytes.begin(), bytes.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80U; });
}

// As text that says which token it is, where the bytes are a part of a character.
std::string token_name(const std::string& bytes) {
  if (is_valid_utf8(bytes)) return bytes;
  std::string name = "bytes:";
  for (const char c : bytes) {
    char spelled[8];
    std::snprintf(spelled, sizeof spelled, "\\x%02x", static_cast<unsigned>(static_cast<unsigned char>(c)));
    name += spelled;
  }
  return name;
}

WireJson bytes_json(const std::string& bytes) {
  WireJson out = WireJson::array();
  for (const char c : bytes) out.push_back(static_cast<unsigned char>(c));
  return out;
}

WireJson finish_json(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    default:
      return nullptr;
  }
}

// vLLM's stop_reason: what ended the choice when it was a stop string or a stop token of the request.
WireJson stop_reason_json(const std::string& stop_text, int32_t stop_token, const OpenAiCall& call) {
  if (!stop_text.empty()) return stop_text;
  const std::vector<int64_t>& ids = call.params.stop_token_ids;
  if (stop_token >= 0 && std::find(ids.begin(), ids.end(), stop_token) != ids.end()) return stop_token;
  return nullptr;
}

WireJson scored(const std::string& bytes, float logprob) {
  WireJson out = WireJson::object();
  out["token"] = bytes;
  out["logprob"] = wire_logprob(logprob);
  out["bytes"] = bytes_json(bytes);
  return out;
}

WireJson chat_logprobs(const std::vector<TokenText>& tokens, int64_t num_top) {
  WireJson content = WireJson::array();
  for (const TokenText& token : tokens) {
    WireJson entry = scored(token.bytes, token.logprob.value_or(kLogprobMin));
    WireJson top = WireJson::array();
    for (size_t i = 0; i < token.top.size() && static_cast<int64_t>(i) < num_top; ++i) {
      top.push_back(scored(token.top[i].bytes, token.top[i].logprob));
    }
    entry["top_logprobs"] = std::move(top);
    content.push_back(std::move(entry));
  }
  WireJson out = WireJson::object();
  out["content"] = std::move(content);
  out["refusal"] = nullptr;
  return out;
}

// vLLM's prompt_logprobs: null for the first token, then an object of token ids.
WireJson prompt_logprobs(const std::vector<TokenText>& tokens, int64_t num_top) {
  WireJson out = WireJson::array();
  for (const TokenText& token : tokens) {
    if (!token.logprob) {
      out.push_back(nullptr);
      continue;
    }
    WireJson entry = WireJson::object();
    const auto add = [&entry](int32_t id, const std::string& bytes, float logprob, const WireJson& rank) {
      WireJson& item = entry[std::to_string(id)];
      item["logprob"] = wire_logprob(logprob);
      item["rank"] = rank;
      item["decoded_token"] = bytes;
    };
    add(token.token, token.bytes, *token.logprob, nullptr);
    for (size_t i = 0; i < token.top.size() && static_cast<int64_t>(i) < num_top; ++i) {
      add(token.top[i].token, token.top[i].bytes, token.top[i].logprob, i + 1);
    }
    out.push_back(std::move(entry));
  }
  return out;
}

WireJson usage_json(const Usage& usage) {
  WireJson out = WireJson::object();
  out["prompt_tokens"] = usage.prompt_tokens;
  out["completion_tokens"] = usage.completion_tokens;
  out["total_tokens"] = usage.prompt_tokens + usage.completion_tokens;
  out["prompt_tokens_details"]["cached_tokens"] = usage.cached_tokens;
  return out;
}

WireJson answer_json(const AnswerHead& head, const char* object, WireJson choices) {
  WireJson out = WireJson::object();
  out["id"] = head.id;
  out["object"] = object;
  out["created"] = head.created_s;
  out["model"] = head.model;
  out["choices"] = std::move(choices);
  return out;
}

}  // namespace

void CompletionLogprobs::add(const std::vector<TokenText>& tokens) {
  for (const TokenText& token : tokens) {
    const std::string name = token_name(token.bytes);
    tokens_.push_back(name);
    offsets_.push_back(offset_);
    offset_ += num_characters(token.bytes);
    if (!token.logprob) {  // a prompt's first token
      logprobs_.push_back(nullptr);
      top_.push_back(nullptr);
      continue;
    }
    logprobs_.push_back(wire_logprob(*token.logprob));
    WireJson top = WireJson::object();
    for (size_t i = 0; i < token.top.size() && static_cast<int64_t>(i) < num_top_; ++i) {
      // Two tokens may read alike: the better one stays.
      const std::string text = token_name(token.top[i].bytes);
      if (!top.contains(text)) top[text] = wire_logprob(token.top[i].logprob);
    }
    top[name] = wire_logprob(*token.logprob);
    top_.push_back(std::move(top));
  }
}

WireJson CompletionLogprobs::take() {
  WireJson out = WireJson::object();
  out["tokens"] = std::exchange(tokens_, WireJson::array());
  out["token_logprobs"] = std::exchange(logprobs_, WireJson::array());
  out["top_logprobs"] = std::exchange(top_, WireJson::array());
  out["text_offset"] = std::exchange(offsets_, WireJson::array());
  return out;
}

void PlainAnswer::add(const Delta& delta) {
  Choice& choice = choices_[delta.choice];
  if (delta.has_prompt) {
    if (call_.params.echo) choice.text = delta.prompt_text;
    choice.prompt_tokens = delta.prompt_tokens;
    choice.prompt_token_ids = delta.prompt_token_ids;
  }
  choice.text += delta.text;
  choice.tokens.insert(choice.tokens.end(), delta.tokens.begin(), delta.tokens.end());
  choice.token_ids.insert(choice.token_ids.end(), delta.token_ids.begin(), delta.token_ids.end());
  if (delta.finish != FinishReason::kNone) {
    choice.finish = delta.finish;
    choice.stop_text = delta.stop_text;
    choice.stop_token = delta.stop_token;
  }
}

WireJson PlainAnswer::chat_choice(int32_t index, const Choice& choice) const {
  WireJson out = WireJson::object();
  out["index"] = index;
  out["message"]["role"] = "assistant";
  out["message"]["content"] = choice.text;
  out["message"]["refusal"] = nullptr;
  out["logprobs"] = call_.params.logprobs ? chat_logprobs(choice.tokens, *call_.params.logprobs) : WireJson();
  out["finish_reason"] = finish_json(choice.finish);
  out["stop_reason"] = stop_reason_json(choice.stop_text, choice.stop_token, call_);
  if (call_.params.return_token_ids) out["token_ids"] = choice.token_ids;
  return out;
}

WireJson PlainAnswer::completion_choice(int32_t index, const Choice& choice) const {
  WireJson out = WireJson::object();
  out["index"] = index;
  out["text"] = choice.text;
  out["logprobs"] = nullptr;
  if (call_.params.logprobs) {
    CompletionLogprobs logprobs(*call_.params.logprobs);
    if (call_.params.echo) logprobs.add(choice.prompt_tokens);
    logprobs.add(choice.tokens);
    out["logprobs"] = logprobs.take();
  }
  out["finish_reason"] = finish_json(choice.finish);
  out["stop_reason"] = stop_reason_json(choice.stop_text, choice.stop_token, call_);
  if (call_.params.prompt_logprobs) {
    out["prompt_logprobs"] = prompt_logprobs(choice.prompt_tokens, *call_.params.prompt_logprobs);
  }
  if (call_.params.return_token_ids) {
    out["prompt_token_ids"] = choice.prompt_token_ids;
    out["token_ids"] = choice.token_ids;
  }
  return out;
}

std::string PlainAnswer::json(const Usage& usage, int32_t num_choices) const {
  const bool chat = call_.params.chat;
  const Choice none;
  WireJson choices = WireJson::array();
  for (int32_t i = 0; i < num_choices; ++i) {
    const auto found = choices_.find(i);
    const Choice& choice = found == choices_.end() ? none : found->second;
    choices.push_back(chat ? chat_choice(i, choice) : completion_choice(i, choice));
  }
  WireJson out = answer_json(head_, chat ? "chat.completion" : "text_completion", std::move(choices));
  out["usage"] = usage_json(usage);
  if (chat && call_.params.prompt_logprobs && !choices_.empty()) {
    out["prompt_logprobs"] = prompt_logprobs(choices_.begin()->second.prompt_tokens, *call_.params.prompt_logprobs);
  }
  if (chat && call_.params.return_token_ids && !choices_.empty()) {
    out["prompt_token_ids"] = choices_.begin()->second.prompt_token_ids;
  }
  return dump_json(out);
}

StreamAnswer::Choice& StreamAnswer::choice(int32_t index) {
  return choices_.try_emplace(index, Choice{false, CompletionLogprobs(call_.params.logprobs.value_or(0)), {}, {}})
      .first->second;
}

void StreamAnswer::event(WireJson choices, const WireJson& usage, std::string& out,
                         const std::vector<int32_t>* prompt_ids) const {
  WireJson json =
      answer_json(head_, call_.params.chat ? "chat.completion.chunk" : "text_completion", std::move(choices));
  if (prompt_ids != nullptr) json["prompt_token_ids"] = *prompt_ids;
  if (call_.include_usage || call_.continuous_usage) json["usage"] = usage;
  out += "data: ";
  out += dump_json(json);
  out += "\n\n";
}

void StreamAnswer::add(const Delta& delta, const Usage& usage, std::string& out) {
  WireJson running;
  if (call_.continuous_usage) {
    running = usage_json({.prompt_tokens = usage.prompt_tokens,
                          .cached_tokens = usage.cached_tokens,
                          .completion_tokens = delta.num_tokens});
  }
  if (call_.params.chat) return add_chat(delta, running, out);
  add_completion(delta, running, out);
}

void StreamAnswer::add_chat(const Delta& delta, const WireJson& usage, std::string& out) {
  Choice& state = choice(delta.choice);
  const bool with_ids = call_.params.return_token_ids;
  const auto choice_json = [&](WireJson content, WireJson logprobs, WireJson finish) {
    WireJson json = WireJson::object();
    json["index"] = delta.choice;
    json["delta"] = std::move(content);
    json["logprobs"] = std::move(logprobs);
    json["finish_reason"] = std::move(finish);
    return json;
  };
  const bool has_scores = call_.params.logprobs.has_value() && !delta.tokens.empty();
  if (!state.begun) {  // with the first token, even while its text is held
    state.begun = true;
    WireJson first = WireJson::object();
    first["role"] = "assistant";
    first["content"] = "";
    event(WireJson::array({choice_json(std::move(first), nullptr, nullptr)}), usage, out,
          with_ids ? &delta.prompt_token_ids : nullptr);
  }
  state.unsent_ids.insert(state.unsent_ids.end(), delta.token_ids.begin(), delta.token_ids.end());
  const bool has_end = delta.finish != FinishReason::kNone;
  const auto scores = [&] { return has_scores ? chat_logprobs(delta.tokens, *call_.params.logprobs) : WireJson(); };
  // Scores without text, of the token that ended the choice, go with its end.
  const bool has_content = !delta.text.empty() || (has_scores && !has_end);
  if (has_content) {
    WireJson content = WireJson::object();
    content["content"] = delta.text;
    WireJson json = choice_json(std::move(content), scores(), nullptr);
    if (with_ids) json["token_ids"] = std::exchange(state.unsent_ids, {});
    event(WireJson::array({std::move(json)}), usage, out);
  }
  if (!has_end) return;
  WireJson json = choice_json(WireJson::object(), has_content ? WireJson() : scores(), finish_json(delta.finish));
  WireJson stop = stop_reason_json(delta.stop_text, delta.stop_token, call_);
  if (!stop.is_null()) json["stop_reason"] = std::move(stop);
  if (with_ids) json["token_ids"] = std::exchange(state.unsent_ids, {});
  event(WireJson::array({std::move(json)}), usage, out);
}

void StreamAnswer::add_completion(const Delta& delta, const WireJson& usage, std::string& out) {
  Choice& state = choice(delta.choice);
  const bool echo = delta.has_prompt && call_.params.echo;
  const bool has_scores =
      call_.params.logprobs.has_value() && !(delta.tokens.empty() && !(echo && !delta.prompt_tokens.empty()));
  const bool has_end = delta.finish != FinishReason::kNone;
  const std::string text = echo ? delta.prompt_text + delta.text : delta.text;
  const bool with_ids = call_.params.return_token_ids;
  if (with_ids && delta.has_prompt) state.prompt_ids = delta.prompt_token_ids;
  state.unsent_ids.insert(state.unsent_ids.end(), delta.token_ids.begin(), delta.token_ids.end());
  if (text.empty() && !has_scores && !has_end) return;
  WireJson choice_json = WireJson::object();
  choice_json["index"] = delta.choice;
  choice_json["text"] = text;
  choice_json["logprobs"] = nullptr;
  if (has_scores) {
    if (echo) state.logprobs.add(delta.prompt_tokens);
    state.logprobs.add(delta.tokens);
    choice_json["logprobs"] = state.logprobs.take();
  }
  choice_json["finish_reason"] = finish_json(delta.finish);
  choice_json["stop_reason"] = has_end ? stop_reason_json(delta.stop_text, delta.stop_token, call_) : WireJson();
  if (with_ids) {
    if (!state.prompt_ids.empty()) choice_json["prompt_token_ids"] = std::exchange(state.prompt_ids, {});
    choice_json["token_ids"] = std::exchange(state.unsent_ids, {});
  }
  WireJson choices = WireJson::array();
  choices.push_back(std::move(choice_json));
  event(std::move(choices), usage, out);
}

void StreamAnswer::end(const Usage& usage, std::string& out) {
  if (call_.include_usage) event(WireJson::array(), usage_json(usage), out);
  out += "data: [DONE]\n\n";
}

}  // namespace moed
