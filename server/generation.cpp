#include "server/generation.h"

#include <algorithm>
#include <utility>

namespace moed {
namespace {

// Enough for tokenizers that look back for the space before the answer's first word.
constexpr size_t kPromptTailTokens = 8;

}  // namespace

GenerationImpl::GenerationImpl(int64_t arrival_us, const Tokenizer* tokenizer, ServingLoop* loop,
                               std::function<void()> wake)
    : arrival_us_(arrival_us), tokenizer_(tokenizer), loop_(loop), wake_(std::move(wake)) {}

GenerationImpl::~GenerationImpl() {
  if (phase_ == Phase::kPreparing || phase_ == Phase::kRunning) cancel();
}

void GenerationImpl::refuse(Status status) {
  {
    MutexLock lock(mutex_);
    refusal_ = std::move(status);
  }
  wake_();
}

void GenerationImpl::run(ValidGeneration valid, const RequestLimits& limits, RequestId first_id, size_t events_max) {
  std::vector<Request> requests;
  for (size_t i = 0; i < valid.requests.size(); ++i) {
    valid.requests[i].id = first_id + static_cast<RequestId>(i);
    valid.requests[i].arrival_us = arrival_us_;
    auto request = Request::make(valid.requests[i], limits);
    if (!request.ok()) return refuse(request.status());
    requests.push_back(std::move(*request));
  }
  std::vector<std::shared_ptr<RequestStream>> streams;
  for (size_t i = 0; i < requests.size(); ++i) {
    const size_t num_choices = static_cast<size_t>(requests[i].spec().n);
    streams.push_back(
        std::make_shared<RequestStream>(events_max * num_choices, wake_, [loop = loop_] { loop->signal(); }));
  }
  attach(std::move(valid), streams);
  for (size_t i = 0; i < requests.size(); ++i) {
    if (Status status = loop_->submit({std::move(requests[i]), streams[i]}); !status.ok()) streams[i]->fail(status);
  }
  wake_();
}

void GenerationImpl::attach(ValidGeneration valid, const std::vector<std::shared_ptr<RequestStream>>& streams) {
  auto prepared = std::make_unique<Prepared>();
  prepared->valid = std::move(valid);
  prepared->streams = streams;
  {
    MutexLock lock(mutex_);
    prepared_ = std::move(prepared);
    cancel_streams_ = streams;
  }
  // A cancel that came while the streams were not there yet.
  if (!cancelled()) return;
  for (const auto& stream : streams) stream->cancel();
}

void GenerationImpl::cancel() {
  if (cancelled_.exchange(true)) return;
  std::vector<std::shared_ptr<RequestStream>> streams;
  {
    MutexLock lock(mutex_);
    streams = cancel_streams_;
  }
  for (const auto& stream : streams) stream->cancel();
}

void GenerationImpl::take_over(Prepared prepared) {
  valid_ = std::move(prepared.valid);
  streams_ = std::move(prepared.streams);
  prompt_tokens_.resize(streams_.size());
  for (const RequestSpec& spec : valid_.requests) {
    usage_.prompt_tokens += static_cast<int64_t>(spec.prompt.size());
    const size_t tail = std::min(spec.prompt.size(), kPromptTailTokens);
    for (int32_t i = 0; i < spec.n; ++i) {
      choices_.emplace_back(*tokenizer_, static_cast<int32_t>(choices_.size()), valid_.text,
                            std::span(spec.prompt).last(tail));
    }
  }
  begun_.resize(choices_.size());
  open_choices_ = num_choices();
}

Generation::Update GenerationImpl::poll() {
  Update update;
  const bool was_preparing = phase_ == Phase::kPreparing;
  if (phase_ == Phase::kPreparing && streams_.empty()) await_prepared(update);
  if (phase_ == Phase::kPreparing && !streams_.empty()) await_accepted(update);
  if (phase_ == Phase::kRunning) {
    for (size_t prompt = 0; prompt < streams_.size(); ++prompt) {
      if (Status status = take_events(prompt, update); !status.ok()) {
        const bool nothing_sent = was_preparing && update.deltas.empty();
        fail(std::move(status), nothing_sent ? Phase::kRefused : Phase::kFailed, update);
        break;
      }
    }
  }
  if (phase_ == Phase::kRunning && open_choices_ == 0) phase_ = Phase::kDone;
  update.phase = phase_;
  return update;
}

void GenerationImpl::await_prepared(Update& update) {
  std::unique_ptr<Prepared> prepared;
  {
    MutexLock lock(mutex_);
    prepared = std::move(prepared_);
    update.status = refusal_;
  }
  if (!update.status.ok()) phase_ = Phase::kRefused;
  if (prepared != nullptr) take_over(std::move(*prepared));
}

// Doors show nothing before all prompts are accepted: until then events stay in their streams.
void GenerationImpl::await_accepted(Update& update) {
  bool all_accepted = true;
  Status failure;
  for (const auto& stream : streams_) {
    RequestStream::Standing standing = stream->standing();
    all_accepted = all_accepted && standing.accepted;
    if (failure.ok()) failure = std::move(standing.failure);
  }
  if (all_accepted) {
    phase_ = Phase::kRunning;
  } else if (!failure.ok()) {
    fail(std::move(failure), Phase::kRefused, update);
  }
}

Status GenerationImpl::take_events(size_t prompt, Update& update) {
  RequestStream::News news = streams_[prompt]->take();
  for (const TokenEvent& event : news.events) MOED_RETURN_IF_ERROR(push_event(prompt, event, update.deltas));
  // A failure after the answer's end, which a stop string may bring before the serving thread hears of it, is none.
  return has_open_choice(prompt) ? news.failure : Status();
}

bool GenerationImpl::has_open_choice(size_t prompt) const {
  const auto n = valid_.requests[prompt].n;
  const auto first = choices_.begin() + static_cast<std::ptrdiff_t>(prompt) * n;
  return std::any_of(first, first + n, [](const ChoiceText& choice) { return !choice.finished(); });
}

Status GenerationImpl::push_event(size_t prompt, const TokenEvent& event, std::vector<Delta>& deltas) {
  const size_t choice = prompt * valid_.requests[prompt].n + event.choice;
  ChoiceText& text = choices_[choice];
  if (text.finished()) return Status();
  // The prompt's scores come once a request, and are shown with each of its choices.
  if (!event.prompt_scores.empty()) keep_prompt_scores(prompt, event.prompt_scores);
  const size_t before = deltas.size();
  const int32_t tokens_before = text.num_tokens();
  MOED_ASSIGN_OR_RETURN(const bool stopped, text.push(event, deltas));
  if (stopped) streams_[prompt]->end_choice(event.choice);
  usage_.completion_tokens += text.num_tokens() - tokens_before;
  if (!begun_[choice]) {
    begun_[choice] = true;
    if (event.choice == 0) usage_.cached_tokens += event.num_cached_tokens;
    if (valid_.echo || valid_.prompt_scores || valid_.prompt_ids) {
      if (deltas.size() == before) {
        deltas.emplace_back();
        deltas.back().choice = static_cast<int32_t>(choice);
        deltas.back().num_tokens = text.num_tokens();
      }
      add_prompt(prompt, deltas.back());
    }
  }
  if (text.finished()) --open_choices_;
  return Status();
}

void GenerationImpl::keep_prompt_scores(size_t prompt, const std::vector<ScoredToken>& scores) {
  ScoredToken first;
  first.token = valid_.requests[prompt].prompt.front();
  std::vector<TokenText> tokens = {token_text(*tokenizer_, first, false)};
  for (const ScoredToken& token : scores) tokens.push_back(token_text(*tokenizer_, token, true));
  prompt_tokens_[prompt] = std::move(tokens);
}

void GenerationImpl::add_prompt(size_t prompt, Delta& delta) {
  delta.has_prompt = true;
  delta.prompt_text = valid_.prompt_texts[prompt];
  if (valid_.prompt_ids) delta.prompt_token_ids = valid_.requests[prompt].prompt;
  if (!valid_.prompt_scores) return;
  if (prompt_tokens_[prompt].empty()) keep_prompt_scores(prompt, {});  // a prompt of one token has none
  delta.prompt_tokens = prompt_tokens_[prompt];
}

void GenerationImpl::fail(Status status, Phase phase, Update& update) {
  phase_ = phase;
  cancel();
  update.status = std::move(status);
}

}  // namespace moed
