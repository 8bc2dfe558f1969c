#include "server/choice_text.h"

#include <algorithm>
#include <utility>

namespace moed {

TokenText token_text(const Tokenizer& tokenizer, const ScoredToken& token, bool logprobs) {
  TokenText text;
  text.token = token.token;
  text.bytes = tokenizer.token_bytes(token.token);
  if (!logprobs) return text;
  text.logprob = token.logprob;
  for (const TokenLogprob& other : token.top) {
    text.top.push_back({other.token, tokenizer.token_bytes(other.token), other.logprob});
  }
  return text;
}

ChoiceText::ChoiceText(const Tokenizer& tokenizer, int32_t choice, ChoiceTextOptions options,
                       std::span<const int32_t> prompt_tail)
    : tokenizer_(tokenizer),
      choice_(choice),
      options_(std::move(options)),
      detokenizer_(tokenizer, options_.skip_special_tokens, prompt_tail),
      matcher_(options_.stop) {}

StatusOr<bool> ChoiceText::push(const TokenEvent& event, std::vector<Delta>& deltas) {
  if (finished_) return false;
  Delta delta;
  delta.choice = choice_;
  bool stopped = false;
  if (event.has_token) {
    ++num_tokens_;
    unsent_ids_.push_back(event.token.token);
  }
  if (is_text(event)) {
    MOED_ASSIGN_OR_RETURN(stopped, add_text(event.token, delta));
  }
  if (stopped) {
    end(FinishReason::kStop, delta);
  } else if (event.finish != FinishReason::kNone) {
    MOED_RETURN_IF_ERROR(finish(event, delta));
  }
  delta.num_tokens = num_tokens_;
  // The first token shows that the answer has begun, even while its text is held.
  const bool begins = event.has_token && num_tokens_ == 1;
  if (begins || !delta.text.empty() || !delta.tokens.empty() || delta.finish != FinishReason::kNone) {
    delta.token_ids = std::exchange(unsent_ids_, {});
    deltas.push_back(std::move(delta));
  }
  return stopped && event.finish == FinishReason::kNone;
}

// The token that ended the choice is no text, unless it was asked for.
bool ChoiceText::is_text(const TokenEvent& event) const {
  return event.has_token && (event.stop_token < 0 || options_.include_stop);
}

StatusOr<bool> ChoiceText::add_text(const ScoredToken& token, Delta& delta) {
  MOED_ASSIGN_OR_RETURN(const std::string piece, detokenizer_.push(token.token));
  const int64_t begin = produced_bytes_;
  produced_bytes_ += static_cast<int64_t>(piece.size());
  // One without text yet, such as a part of a character, goes with the next text there is.
  held_.push_back({token_text(tokenizer_, token, options_.logprobs), begin, std::max(produced_bytes_, begin + 1)});
  if (num_tokens_ <= options_.min_tokens) {
    release(matcher_.pass(piece), delta);
    return false;
  }
  StopMatcher::Result found = matcher_.push(piece);
  const bool stopped = found.stop >= 0;
  if (stopped) delta.stop_text = matcher_.stop(found.stop);
  if (stopped && options_.include_stop) found.text += delta.stop_text;
  release(found.text, delta);
  return stopped;
}

Status ChoiceText::finish(const TokenEvent& event, Delta& delta) {
  MOED_ASSIGN_OR_RETURN(const std::string tail, detokenizer_.flush());
  release(matcher_.flush() + tail, delta);
  for (Held& held : held_) delta.tokens.push_back(std::move(held.token));
  held_.clear();
  delta.stop_token = event.stop_token;
  // Its score is wanted all the same: lm-eval drops the last one of a prompt and one token, whichever that is.
  const bool unseen = event.has_token && !is_text(event);
  if (unseen && options_.logprobs) delta.tokens.push_back(token_text(tokenizer_, event.token, true));
  end(event.finish, delta);
  return {};
}

void ChoiceText::release(std::string_view text, Delta& delta) {
  released_bytes_ += static_cast<int64_t>(text.size());
  delta.text += text;
  while (!held_.empty() && held_.front().end <= released_bytes_) {
    delta.tokens.push_back(std::move(held_.front().token));
    held_.pop_front();
  }
}

void ChoiceText::end(FinishReason reason, Delta& delta) {
  // A token of which some text was sent before the cut goes with it; those wholly behind the cut are not shown.
  while (!held_.empty() && held_.front().begin < released_bytes_) {
    delta.tokens.push_back(std::move(held_.front().token));
    held_.pop_front();
  }
  held_.clear();
  delta.finish = reason;
  finished_ = true;
}

}  // namespace moed
