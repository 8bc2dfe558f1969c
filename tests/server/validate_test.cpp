#include "server/validate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/text/tokenizer_fixture.h"

namespace moed {
namespace {

constexpr const char* kTemplate =
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

class ValidateTest : public ::testing::Test {
 protected:
  ValidateTest() {
    auto chat_template = ChatTemplate::from_source(kTemplate);
    EXPECT_TRUE(chat_template.ok());
    chat_template_ = std::move(*chat_template);
    context_.tokenizer = tokenizer_.get();
    context_.chat_template = chat_template_.get();
    context_.vocab_size = tokenizer_->vocab_size();
    context_.max_model_len = 200;
    context_.eos_token_ids = {3};
  }

  static GenerationParams chat(const std::string& messages) {
    GenerationParams params;
    params.chat = true;
    params.messages_json = messages;
    return params;
  }
  static GenerationParams completion(const std::string& prompt) {
    GenerationParams params;
    params.prompts = {{prompt, {}, false}};
    return params;
  }
  // The whole way: validate, then Request::make, as a door's request goes.
  Status check(const GenerationParams& params) {
    auto valid = validate(params, context_);
    if (!valid.ok()) return valid.status();
    for (RequestSpec& spec : valid->requests) {
      const auto request = Request::make(std::move(spec), request_limits(context_));
      if (!request.ok()) return request.status();
    }
    return Status();
  }
  void expect_refused(const GenerationParams& params, const std::string& param, const std::string& word) {
    const Status status = check(params);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << param;
    EXPECT_EQ(status.param(), param);
    EXPECT_NE(status.message().find(word), std::string::npos) << status.message();
  }

  std::unique_ptr<Tokenizer> tokenizer_ = load_tokenizer(byte_level_tokenizer());
  std::unique_ptr<ChatTemplate> chat_template_;
  ValidationContext context_;
};

TEST_F(ValidateTest, ChatTakesTheRestOfTheContext) {
  const auto valid = validate(chat(R"([{"role":"user","content":"hi"}])"), context_);
  ASSERT_TRUE(valid.ok()) << valid.status().message();
  const auto text = tokenizer_->decode(valid->requests[0].prompt, false);
  EXPECT_EQ(*text, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(valid->requests[0].max_tokens, 200 - static_cast<int32_t>(valid->requests[0].prompt.size()));
}

TEST_F(ValidateTest, CompletionsTakeSixteenOrWhatIsLeft) {
  EXPECT_EQ(validate(completion("abc"), context_)->requests[0].max_tokens, 16);
  EXPECT_EQ(validate(completion(std::string(195, 'x')), context_)->requests[0].max_tokens, 5);
}

TEST_F(ValidateTest, DefaultsComeFromTheModel) {
  context_.defaults.temperature = 0.25;
  context_.defaults.top_k = 7;
  context_.defaults.top_p = 0.75;
  context_.defaults.min_p = 0.125;
  context_.defaults.repetition_penalty = 1.5;
  GenerationParams params = completion("a");
  auto valid = validate(params, context_);
  EXPECT_FLOAT_EQ(valid->requests[0].sampling.temperature, 0.25F);
  EXPECT_EQ(valid->requests[0].sampling.top_k, 7);
  EXPECT_FLOAT_EQ(valid->requests[0].sampling.top_p, 0.75F);
  EXPECT_FLOAT_EQ(valid->requests[0].sampling.min_p, 0.125F);
  EXPECT_FLOAT_EQ(valid->requests[0].sampling.repetition_penalty, 1.5F);
  params.temperature = 0.0;
  params.top_k = 0;
  params.top_p = 0.5;
  params.min_p = 0.0;
  params.repetition_penalty = 1.0;
  valid = validate(params, context_);
  EXPECT_FLOAT_EQ(valid->requests[0].sampling.temperature, 0.0F);
  EXPECT_EQ(valid->requests[0].sampling.top_k, 0);
  EXPECT_FLOAT_EQ(valid->requests[0].sampling.top_p, 0.5F);
  EXPECT_FLOAT_EQ(valid->requests[0].sampling.min_p, 0.0F);
  EXPECT_FLOAT_EQ(valid->requests[0].sampling.repetition_penalty, 1.0F);
}

TEST_F(ValidateTest, FieldsReachTheRequest) {
  context_.scheduler.scheduling_policy = "priority";
  GenerationParams params = completion("abc");
  params.n = 3;
  params.priority = -5;
  params.seed = -1;
  params.min_tokens = 2;
  params.max_tokens = 9;
  params.ignore_eos = true;
  params.skip_special_tokens = false;
  params.include_stop_str_in_output = true;
  params.stop = {"x", "yz"};
  params.stop_token_ids = {7, 8};
  params.presence_penalty = 0.5;
  params.frequency_penalty = -0.5;
  params.logit_bias = {{5, -100.0}};
  params.allowed_token_ids = std::vector<int64_t>{4, 6};
  const auto valid = validate(params, context_);
  ASSERT_TRUE(valid.ok()) << valid.status().message();
  const RequestSpec& request = valid->requests[0];
  EXPECT_EQ(request.n, 3);
  EXPECT_EQ(request.priority, -5);
  EXPECT_EQ(request.max_tokens, 9);
  EXPECT_TRUE(request.ignore_eos);
  EXPECT_EQ(request.stop_token_ids, (std::vector<int32_t>{7, 8}));
  EXPECT_EQ(request.eos_token_ids, (std::vector<int32_t>{3}));
  EXPECT_EQ(request.sampling.seed, UINT64_MAX);
  EXPECT_EQ(request.sampling.min_tokens, 2);
  EXPECT_FLOAT_EQ(request.sampling.presence_penalty, 0.5F);
  EXPECT_FLOAT_EQ(request.sampling.frequency_penalty, -0.5F);
  EXPECT_EQ(request.sampling.logit_bias, (std::vector<std::pair<int32_t, float>>{{5, -100.0F}}));
  EXPECT_EQ(request.sampling.allowed_token_ids, (std::vector<int32_t>{4, 6}));
  EXPECT_EQ(valid->text.stop, (std::vector<std::string>{"x", "yz"}));
  EXPECT_TRUE(valid->text.include_stop);
  EXPECT_FALSE(valid->text.skip_special_tokens);
}

// The fixture's template, and one that shows what it is given.
TEST_F(ValidateTest, HowAChatBeginsAndEndsIsTheCallersChoice) {
  const auto text = [&](const GenerationParams& params) {
    const auto valid = validate(params, context_);
    EXPECT_TRUE(valid.ok()) << valid.status().message();
    return valid.ok() ? *tokenizer_->decode(valid->requests[0].prompt, false) : "";
  };
  GenerationParams params = chat(R"([{"role":"user","content":"q"},{"role":"assistant","content":"I th"}])");
  params.add_generation_prompt = false;
  const std::string closed = text(params);
  EXPECT_TRUE(closed.ends_with("I th<|im_end|>\n")) << closed;
  params.continue_final_message = true;
  const std::string open = text(params);
  EXPECT_TRUE(open.ends_with("assistant\nI th")) << open;
  params.add_generation_prompt = true;
  expect_refused(params, "continue_final_message", "add_generation_prompt");

  auto shows = ChatTemplate::from_source("{{ mood }}:{{ messages[0].content }}");
  ASSERT_TRUE(shows.ok()) << shows.status().message();
  context_.chat_template = shows->get();
  params = chat(R"([{"role":"user","content":"hi"}])");
  params.template_kwargs_json = R"({"mood":"glad"})";
  EXPECT_EQ(text(params), "glad:hi");
}

// Templates write their own special tokens: the tokenizer adds its BOS to completions alone, unless told otherwise.
TEST_F(ValidateTest, SpecialTokensAreAddedToCompletionsAlone) {
  const auto tokenizer = load_tokenizer(byte_fallback_tokenizer());
  context_.tokenizer = tokenizer.get();
  context_.vocab_size = tokenizer->vocab_size();
  const int32_t bos = *tokenizer->token_to_id("<s>");
  const auto first = [&](GenerationParams params, std::optional<bool> add) {
    params.add_special_tokens = add;
    const auto valid = validate(params, context_);
    EXPECT_TRUE(valid.ok()) << valid.status().message();
    return valid.ok() ? valid->requests[0].prompt.front() : -1;
  };
  const GenerationParams talk = chat(R"([{"role":"user","content":"hi"}])");
  EXPECT_EQ(first(completion("hi"), std::nullopt), bos);
  EXPECT_NE(first(completion("hi"), false), bos);
  EXPECT_NE(first(talk, std::nullopt), bos);
  EXPECT_EQ(first(talk, true), bos);
}

TEST_F(ValidateTest, ContentPartsAreJoinedAndOthersRefused) {
  const auto valid = validate(
      chat(R"([{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}])"), context_);
  ASSERT_TRUE(valid.ok()) << valid.status().message();
  EXPECT_NE(tokenizer_->decode(valid->requests[0].prompt, false)->find("user\na\nb<"), std::string::npos);
  expect_refused(chat(R"([{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}])"),
                 "messages[0].content[0]", "text");
}

TEST_F(ValidateTest, DeveloperBecomesSystem) {
  const auto valid = validate(chat(R"([{"role":"developer","content":"d"}])"), context_);
  ASSERT_TRUE(valid.ok());
  EXPECT_NE(tokenizer_->decode(valid->requests[0].prompt, false)->find("system\nd"), std::string::npos);
  auto knows = ChatTemplate::from_source(
      "{% for m in messages %}{{ 'dev' if m.role == 'developer' else m.role }}:{{ m.content }};{% endfor %}");
  ASSERT_TRUE(knows.ok());
  context_.chat_template = knows->get();
  const auto kept = validate(chat(R"([{"role":"developer","content":"d"}])"), context_);
  ASSERT_TRUE(kept.ok()) << kept.status().message();
  EXPECT_EQ(*tokenizer_->decode(kept->requests[0].prompt, false), "dev:d;");
}

TEST_F(ValidateTest, BadMessages) {
  expect_refused(chat("[]"), "messages", "empty");
  expect_refused(chat("{}"), "messages", "array");
  expect_refused(chat(R"([{"content":"x"}])"), "messages[0].role", "string");
  expect_refused(chat(R"([{"role":"user"}])"), "messages[0].content", "missing");
  expect_refused(chat(R"([{"role":"user","content":"x","name":5}])"), "messages[0].name", "string");
  expect_refused(chat(R"([{"role":"user","content":5}])"), "messages[0].content", "string");
  expect_refused(chat(R"([{"role":"user","content":"x"}, 3])"), "messages[1]", "object");
}

TEST_F(ValidateTest, ContextOverflowNamesTheLimit) {
  GenerationParams params = completion("abc");
  params.max_tokens = 198;
  const Status status = check(params);
  EXPECT_EQ(status.detail(), "context_length_exceeded");
  EXPECT_EQ(status.message().rfind("This model's maximum context length is 200 tokens", 0), 0U) << status.message();
  params.max_tokens = 197;
  EXPECT_TRUE(check(params).ok());
  // Refused before the tokenizer sees it.
  const Status huge = check(completion(std::string(1 << 20, 'x')));
  EXPECT_EQ(huge.detail(), "context_length_exceeded");
}

TEST_F(ValidateTest, RangesNameTheField) {
  const auto with = [](auto set) {
    GenerationParams params = completion("a");
    set(params);
    return params;
  };
  expect_refused(with([](auto& p) { p.temperature = -0.1; }), "temperature", "temperature");
  expect_refused(with([](auto& p) { p.temperature = std::nan(""); }), "temperature", "temperature");
  expect_refused(with([](auto& p) { p.top_p = 0.0; }), "top_p", "top_p");
  expect_refused(with([](auto& p) { p.top_p = 1.5; }), "top_p", "top_p");
  expect_refused(with([](auto& p) { p.min_p = 2.0; }), "min_p", "min_p");
  expect_refused(with([](auto& p) { p.presence_penalty = 3.0; }), "presence_penalty", "presence_penalty");
  expect_refused(with([](auto& p) { p.frequency_penalty = -3.0; }), "frequency_penalty", "frequency_penalty");
  expect_refused(with([](auto& p) { p.repetition_penalty = 0.0; }), "repetition_penalty", "repetition_penalty");
  expect_refused(with([](auto& p) { p.n = 0; }), "n", "between 1 and 64");
  expect_refused(with([](auto& p) { p.n = 65; }), "n", "between 1 and 64");
  expect_refused(with([](auto& p) { p.top_k = -2; }), "top_k", "top_k");
  expect_refused(with([](auto& p) { p.max_tokens = 0; }), "max_tokens", "max_tokens");
  expect_refused(with([](auto& p) { p.logprobs = 21; }), "logprobs", "20");
  expect_refused(with([](auto& p) { p.stop = {""}; }), "stop", "empty");
  expect_refused(with([](auto& p) { p.stop.assign(17, "x"); }), "stop", "16");
  expect_refused(with([](auto& p) { p.logit_bias = {{1 << 30, 1.0}}; }), "logit_bias", "logit_bias");
  expect_refused(with([](auto& p) { p.logit_bias = {{1, 101.0}}; }), "logit_bias", "100");
  expect_refused(with([](auto& p) { p.allowed_token_ids = std::vector<int64_t>{}; }), "allowed_token_ids", "empty");
  expect_refused(with([](auto& p) { p.prompts = {{"", {1, 100000}, true}}; }), "prompt", "100000");
  expect_refused(with([](auto& p) { p.prompts = {{"", {}, true}}; }), "prompt", "no tokens");
  expect_refused(with([](auto& p) { p.prompts.clear(); }), "prompt", "empty");
}

// The tokenizer has a token for each byte and some merges; "hello" is one of them, " hello" is not.
TEST_F(ValidateTest, BadWordsAreTokenisedAloneAndBehindASpace) {
  GenerationParams params = completion("a");
  params.bad_words = {"  ab"};
  const auto valid = validate(params, context_);
  ASSERT_TRUE(valid.ok()) << valid.status().message();
  std::vector<std::string> texts;
  for (const auto& word : valid->requests[0].sampling.bad_words) {
    ASSERT_FALSE(word.empty());
    texts.push_back(*tokenizer_->decode(word, false));
  }
  EXPECT_EQ(texts, (std::vector<std::string>{"ab"})) << "a space before it is a token of its own: banned already";
  params.bad_words = {"a", " "};
  expect_refused(params, "bad_words", "empty");
  params.bad_words.assign(65, "x");
  expect_refused(params, "bad_words", "64 (limits.bad_words_max)");
  params.bad_words = {std::string(1025, 'x')};
  expect_refused(params, "bad_words", "1024 (limits.stop_bytes_max)");
  params.bad_words.clear();
  params.stop_token_ids.assign(65, 1);
  expect_refused(params, "stop_token_ids", "64");
  context_.limits.stop_token_ids_max = 65;
  EXPECT_TRUE(check(params).ok());
}

// What every prompt and every choice of a call carries is held once, however often the client spelled it.
TEST_F(ValidateTest, ListsAreHeldOnceACall) {
  GenerationParams params = completion("a");
  params.prompts.resize(3, {"a", {}, false});
  params.allowed_token_ids = std::vector<int64_t>(100'000, 5);
  params.allowed_token_ids->push_back(4);
  params.logit_bias = {{5, 1.0}};
  params.bad_words = {"b"};
  params.min_tokens = 1;
  const auto valid = validate(params, context_);
  ASSERT_TRUE(valid.ok()) << valid.status().message();
  ASSERT_EQ(valid->requests.size(), 3U);
  const SamplingParams& first = valid->requests[0].sampling;
  EXPECT_EQ(first.allowed_token_ids, (std::vector<int32_t>{4, 5}));
  for (const RequestSpec& spec : valid->requests) {
    const SamplingParams copy = Request::make(spec, request_limits(context_))->spec().sampling;
    EXPECT_EQ(copy.allowed_token_ids.begin(), first.allowed_token_ids.begin()) << "the same memory";
    EXPECT_EQ(copy.logit_bias.begin(), first.logit_bias.begin());
    EXPECT_EQ(copy.bad_words.begin(), first.bad_words.begin());
  }
}

// Refused by validate() itself: behind it each prompt has its copy.
TEST_F(ValidateTest, LongListsAreRefusedBeforeTheyAreCopied) {
  GenerationParams params = completion("a");
  params.stop_token_ids.assign(65, 1);
  EXPECT_EQ(validate(params, context_).status().message(),
            "stop_token_ids holds 65 entries, the limit is 64 (limits.stop_token_ids_max)");
  params.stop_token_ids.clear();
  params.logit_bias.assign(1025, {1, 1.0});
  EXPECT_EQ(validate(params, context_).status().param(), "logit_bias");
}

TEST_F(ValidateTest, EachLimitIsItsSetting) {
  const auto with = [](auto set) {
    GenerationParams params = completion("a");
    set(params);
    return params;
  };
  Settings::Limits& limits = context_.limits;
  limits.prompts_max = 2;
  expect_refused(with([](auto& p) { p.prompts.resize(3, {"a", {}, false}); }), "prompt", "limits.prompts_max");
  limits.prompt_tokens_max = 5;
  expect_refused(completion("abcdef"), "prompt", "limits.prompt_tokens_max");
  limits.new_tokens_max = 7;
  expect_refused(with([](auto& p) { p.max_tokens = 8; }), "max_tokens", "7");
  EXPECT_EQ(validate(with([](auto&) {}), context_)->requests[0].max_tokens, 7);
  limits.stop_bytes_max = 3;
  expect_refused(with([](auto& p) { p.stop = {"abcd"}; }), "stop", "limits.stop_bytes_max");
  limits.logit_bias_max = 1;
  expect_refused(with([](auto& p) { p.logit_bias = {{1, 1.0}, {2, 1.0}}; }), "logit_bias", "1");
  limits.top_logprobs_max = 2;
  expect_refused(with([](auto& p) { p.prompt_logprobs = 3; }), "prompt_logprobs", "2");
  limits.n_max = 2;
  expect_refused(with([](auto& p) { p.n = 3; }), "n", "2");
}

TEST_F(ValidateTest, NobodyGoesFirstWhereThePolicyIsFcfs) {
  GenerationParams params = completion("a");
  params.priority = -1;
  expect_refused(params, "priority", "priority scheduling is not enabled (scheduler.scheduling_policy)");
  params.priority = 0;
  EXPECT_TRUE(check(params).ok());
}

TEST_F(ValidateTest, ABatchThatTheQueueCannotHoldIsNotToldToTryAgain) {
  GenerationParams params = completion("abc");
  params.prompts.resize(5, {"abc", {}, false});
  params.n = 2;
  context_.scheduler.queue_max = 5;
  context_.scheduler.queue_tokens_max = 30;
  EXPECT_TRUE(check(params).ok());
  context_.scheduler.queue_tokens_max = 29;
  expect_refused(params, "prompt", "29 (scheduler.queue_tokens_max)");
  context_.scheduler.queue_max = 4;
  expect_refused(params, "prompt", "4 (scheduler.queue_max)");
  params.prompts.resize(1);
  EXPECT_TRUE(check(params).ok()) << "one prompt is taken by an idle queue whatever its length";
}

// 2 prompts of 3 tokens and 4 new ones, 3 choices, each token with 2 alternatives: 2 * 7 * 3 * 3.
TEST_F(ValidateTest, ScoresOfAnAnswerAreBounded) {
  GenerationParams params = completion("abc");
  params.prompts.resize(2, {"abc", {}, false});
  params.n = 3;
  params.max_tokens = 4;
  params.logprobs = 2;
  params.echo = true;
  context_.limits.scores_max = 126;
  EXPECT_TRUE(check(params).ok());
  context_.limits.scores_max = 125;
  expect_refused(params, "logprobs", "126 log-probabilities");
  expect_refused(params, "logprobs", "125 (limits.scores_max)");
  params.echo = false;
  EXPECT_TRUE(check(params).ok()) << "72: the prompts are not scored";
  params.prompt_logprobs = 2;
  expect_refused(params, "prompt_logprobs", "126");
  params.prompt_logprobs.reset();
  params.logprobs.reset();
  context_.limits.scores_max = 1;
  EXPECT_TRUE(check(params).ok());

  // Where the length is left open, it gives way.
  params = chat(R"([{"role":"user","content":"hi"}])");
  params.logprobs = 4;
  params.n = 2;
  context_.limits.scores_max = 100;
  EXPECT_EQ(validate(params, context_)->requests[0].max_tokens, 10);
  EXPECT_TRUE(check(params).ok());
}

// The template would print arguments as the JSON text that they came as, and the model would answer something else.
TEST_F(ValidateTest, ToolHistoryIsRefusedByName) {
  const auto refused = [&](const std::string& messages, const std::string& param) {
    const Status status = check(chat(messages));
    EXPECT_EQ(status.code(), StatusCode::kUnimplemented) << messages;
    EXPECT_EQ(status.param(), param);
    EXPECT_EQ(status.detail(), "unsupported_parameter");
    EXPECT_NE(status.message().find("not supported yet"), std::string::npos) << status.message();
  };
  const std::string user = R"([{"role":"user","content":"hi"},)";
  refused(user + R"({"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function",
      "function":{"name":"f","arguments":"{}"}}]}])",
          "messages[1].tool_calls");
  refused(user + R"({"role":"assistant","content":null,"function_call":{"name":"f","arguments":"{}"}}])",
          "messages[1].function_call");
  refused(user + R"({"role":"tool","tool_call_id":"1","content":"4"}])", "messages[1].role");
  refused(user + R"({"role":"function","name":"f","content":"4"}])", "messages[1].role");
  refused(user + R"({"role":"user","tool_call_id":"1","content":"4"}])", "messages[1].tool_call_id");
  EXPECT_TRUE(check(chat(user + R"({"role":"assistant","content":"a","tool_calls":[],"function_call":null}])")).ok());
}

TEST_F(ValidateTest, ErrorsNameTheFieldAsTheDoorDoes) {
  GenerationParams params = completion("abc");
  params.max_tokens_field = "max_completion_tokens";
  params.max_tokens = 198;
  expect_refused(params, "max_completion_tokens", "context length");
  params.max_tokens = 0;
  expect_refused(params, "max_completion_tokens", "max_completion_tokens must be");
  params = chat(R"([{"role":"user","content":"hi"}])");
  params.logprobs = 99;
  expect_refused(params, "logprobs", "logprobs must be");
  params.logprobs_field = "top_logprobs";
  expect_refused(params, "top_logprobs", "top_logprobs must be");
}

TEST_F(ValidateTest, ContentListsReachTemplatesThatTakeThem) {
  auto lists = ChatTemplate::from_source(
      "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}");
  ASSERT_TRUE(lists.ok()) << lists.status().message();
  context_.chat_template = lists->get();
  ASSERT_TRUE((*lists)->takes_content_lists());
  const auto valid = validate(
      chat(R"([{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}])"), context_);
  ASSERT_TRUE(valid.ok()) << valid.status().message();
  EXPECT_EQ(*tokenizer_->decode(valid->requests[0].prompt, false), "[a][b]");
}

TEST_F(ValidateTest, NameAndNullContentReachTheTemplate) {
  auto shows = ChatTemplate::from_source(
      "{% for m in messages %}{{ m.name }}:{{ 'null' if m.content is none else m.content }};{% endfor %}");
  ASSERT_TRUE(shows.ok());
  context_.chat_template = shows->get();
  const auto valid =
      validate(chat(R"([{"role":"user","name":"Ann","content":"x"},{"role":"assistant","name":"Bob","content":null}])"),
               context_);
  ASSERT_TRUE(valid.ok()) << valid.status().message();
  EXPECT_EQ(*tokenizer_->decode(valid->requests[0].prompt, false), "Ann:x;Bob:null;");
}

TEST_F(ValidateTest, EchoMayAskForNothingNew) {
  GenerationParams params = completion("abc");
  params.echo = true;
  params.max_tokens = 0;
  params.logprobs = 2;
  const auto valid = validate(params, context_);
  ASSERT_TRUE(valid.ok()) << valid.status().message();
  EXPECT_TRUE(valid->prompt_scores);
  EXPECT_EQ(valid->prompt_texts[0], "abc");
}

TEST_F(ValidateTest, TruncationKeepsTheEnd) {
  GenerationParams params = completion("abcdef");
  params.truncate_prompt_tokens = 2;
  auto valid = validate(params, context_);
  EXPECT_EQ(*tokenizer_->decode(valid->requests[0].prompt, false), "ef");
  // -1: what fits beside the tokens asked for.
  params = completion(std::string(500, 'x'));
  params.truncate_prompt_tokens = -1;
  params.max_tokens = 30;
  EXPECT_EQ(validate(params, context_)->requests[0].prompt.size(), 170U);
  params.max_tokens.reset();
  EXPECT_EQ(validate(params, context_)->requests[0].prompt.size(), 184U);
  params.max_tokens = 200;
  expect_refused(params, "max_tokens", "context length");
  // Text that is too long for the context is no reason to refuse what is cut anyway.
  params = completion(std::string(1 << 20, 'x') + "yz");
  params.truncate_prompt_tokens = 3;
  params.echo = true;
  valid = validate(params, context_);
  ASSERT_TRUE(valid.ok()) << valid.status().message();
  EXPECT_EQ(*tokenizer_->decode(valid->requests[0].prompt, false), "xyz");
  EXPECT_EQ(valid->prompt_texts[0], "xyz") << "echo shows the prompt that was used";
}

// The template would run out of memory on some of these, and be switched off after a few.
TEST_F(ValidateTest, LargeChatsAreRefusedUntemplated) {
  const std::string small = R"([{"role":"user","content":"hi"}])";
  std::string objects = R"({"x":[{})";
  for (int i = 0; i < 1'000'000; ++i) objects += ",{}";
  objects += "]}";
  GenerationParams with_kwargs = chat(small);
  with_kwargs.template_kwargs_json = objects;
  const GenerationParams with_messages = chat("[" + objects + "]");
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(check(with_kwargs).detail(), "context_length_exceeded");
    EXPECT_EQ(check(with_messages).detail(), "context_length_exceeded");
    TokenizeParams params;
    params.chat = true;
    params.messages_json = small;
    params.template_kwargs_json = objects;
    EXPECT_EQ(tokenize_text(params, context_).status().detail(), "context_length_exceeded");
  }
  // Truncation lifts this bound; the template's own holds.
  with_kwargs.truncate_prompt_tokens = 10;
  for (int i = 0; i < 6; ++i) expect_refused(with_kwargs, "", "too large for the chat template");
  EXPECT_TRUE(check(chat(small)).ok());
}

TEST_F(ValidateTest, TokenizeIsBoundedByTheContext) {
  TokenizeParams params;
  params.text = "abc";
  EXPECT_EQ(tokenize_text(params, context_)->tokens.size(), 3U);
  params.text = std::string(1 << 20, 'x');
  EXPECT_EQ(tokenize_text(params, context_).status().detail(), "context_length_exceeded");
}

TEST_F(ValidateTest, DefaultsOfTheModelAreClamped) {
  GenerationDefaults defaults;
  EXPECT_EQ(clamp_defaults(defaults), "");
  defaults.temperature = 3.5;
  context_.defaults = defaults;
  EXPECT_FALSE(check(completion("a")).ok());
  defaults.top_p = 0.0;
  defaults.min_p = 1.5;
  defaults.repetition_penalty = 0.0;
  EXPECT_EQ(clamp_defaults(defaults),
            "generation_config.json: what requests may not ask for is no default: temperature 3.5 becomes 2, top_p 0 "
            "becomes 1e-06, min_p 1.5 becomes 1, repetition_penalty 0 becomes 0.01");
  context_.defaults = defaults;
  EXPECT_TRUE(check(completion("a")).ok());
  EXPECT_EQ(clamp_defaults(defaults), "");
  defaults.top_p = 1.5;
  defaults.repetition_penalty = 101.0;
  clamp_defaults(defaults);
  context_.defaults = defaults;
  EXPECT_TRUE(check(completion("a")).ok());
}

}  // namespace
}  // namespace moed
