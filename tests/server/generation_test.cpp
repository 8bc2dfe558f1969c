#include "server/generation.h"

#include <gtest/gtest.h>

#include "tests/text/tokenizer_fixture.h"

namespace moed {
namespace {

using Phase = Generation::Phase;

// Two prompts of one choice each; the test plays the serving thread. Ids 0..255 of the tokenizer are the bytes.
class GenerationTest : public ::testing::Test {
 protected:
  void attach(ChoiceTextOptions text = {}) {
    ValidGeneration valid;
    valid.requests.resize(2);
    for (RequestSpec& spec : valid.requests) spec.prompt = {'P'};
    valid.text = std::move(text);
    for (size_t i = 0; i < 2; ++i) {
      streams_.push_back(std::make_shared<RequestStream>(
          100, [] {}, [] {}));
    }
    generation_.attach(std::move(valid), streams_);
  }
  static TokenEvent event(char letter, FinishReason finish = FinishReason::kNone) {
    TokenEvent event;
    event.token.token = letter;
    event.finish = finish;
    return event;
  }
  // The text of each choice over some polls.
  void add(const Generation::Update& update) {
    for (const Delta& delta : update.deltas) texts_.at(delta.choice) += delta.text;
  }

  std::unique_ptr<Tokenizer> tokenizer_ = load_tokenizer(byte_level_tokenizer());
  GenerationImpl generation_{1, tokenizer_.get(), nullptr, [] {}};
  std::vector<std::shared_ptr<RequestStream>> streams_;
  std::vector<std::string> texts_{"", ""};
};

TEST_F(GenerationTest, TokensThatComeBeforeTheLastPromptIsAcceptedWaitForIt) {
  EXPECT_EQ(generation_.poll().phase, Phase::kPreparing);
  attach();
  streams_[0]->accept();
  ASSERT_TRUE(streams_[0]->deliver(event('a')));
  // A door looks at nothing but the phase of such an update.
  EXPECT_EQ(generation_.poll().phase, Phase::kPreparing);
  ASSERT_TRUE(streams_[0]->deliver(event('b', FinishReason::kLength)));
  EXPECT_EQ(generation_.poll().phase, Phase::kPreparing);
  streams_[1]->accept();
  Generation::Update update = generation_.poll();
  EXPECT_EQ(update.phase, Phase::kRunning);
  add(update);
  ASSERT_TRUE(streams_[1]->deliver(event('c', FinishReason::kLength)));
  update = generation_.poll();
  EXPECT_EQ(update.phase, Phase::kDone);
  add(update);
  EXPECT_EQ(texts_, (std::vector<std::string>{"ab", "c"}));
  EXPECT_EQ(generation_.usage().completion_tokens, 3);
}

TEST_F(GenerationTest, APromptThatIsNotAcceptedRefusesTheWholeCall) {
  attach();
  streams_[0]->accept();
  ASSERT_TRUE(streams_[0]->deliver(event('a')));
  streams_[1]->fail(Status(StatusCode::kResourceExhausted, "the queue is full"));
  const Generation::Update update = generation_.poll();
  EXPECT_EQ(update.phase, Phase::kRefused);
  EXPECT_EQ(update.status.code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(update.deltas.empty());
  EXPECT_TRUE(streams_[0]->cancelled());
}

TEST_F(GenerationTest, AFailureBehindTheEndOfAnAnswerIsNone) {
  ChoiceTextOptions text;
  text.stop = {"b"};
  attach(std::move(text));
  for (const auto& stream : streams_) stream->accept();
  for (const auto& stream : streams_) ASSERT_TRUE(stream->deliver(event('a')));
  // Nobody but the door knows that the stop string ends the answer.
  ASSERT_TRUE(streams_[0]->deliver(event('b')));
  streams_[0]->fail(Status(StatusCode::kUnavailable, "the server is shutting down"));
  EXPECT_EQ(generation_.poll().phase, Phase::kRunning);
  ASSERT_TRUE(streams_[1]->deliver(event('b')));
  EXPECT_EQ(generation_.poll().phase, Phase::kDone);
}

// A long prompt's scores are large: each choice shows them, none has a copy.
TEST_F(GenerationTest, ChoicesShareTheirPromptsScores) {
  ValidGeneration valid;
  valid.requests.resize(1);
  valid.requests[0].prompt = {'P', 'q'};
  valid.requests[0].n = 2;
  valid.prompt_texts = {"Pq"};
  valid.echo = true;
  valid.prompt_scores = true;
  streams_.push_back(std::make_shared<RequestStream>(
      100, [] {}, [] {}));
  generation_.attach(std::move(valid), streams_);
  streams_[0]->accept();
  TokenEvent first = event('a', FinishReason::kLength);
  first.prompt_scores = {{.token = 'q', .logprob = -1.5F, .top = {}}};
  TokenEvent second = event('b', FinishReason::kLength);
  second.choice = 1;
  ASSERT_TRUE(streams_[0]->deliver(first));
  ASSERT_TRUE(streams_[0]->deliver(second));
  const Generation::Update update = generation_.poll();
  ASSERT_EQ(update.deltas.size(), 2U);
  for (const Delta& delta : update.deltas) {
    ASSERT_EQ(delta.prompt_tokens.size(), 2U);
    EXPECT_FALSE(delta.prompt_tokens[0].logprob.has_value());
    EXPECT_FLOAT_EQ(*delta.prompt_tokens[1].logprob, -1.5F);
    EXPECT_EQ(delta.prompt_tokens.begin(), update.deltas[0].prompt_tokens.begin()) << "the same memory";
  }
}

TEST_F(GenerationTest, AFailureInMidAnswerComesBehindItsText) {
  attach();
  for (const auto& stream : streams_) stream->accept();
  ASSERT_TRUE(streams_[0]->deliver(event('a')));
  streams_[0]->fail(Status(StatusCode::kUnavailable, "the server is shutting down"));
  const Generation::Update update = generation_.poll();
  EXPECT_EQ(update.phase, Phase::kFailed);
  EXPECT_EQ(update.status.code(), StatusCode::kUnavailable);
  ASSERT_EQ(update.deltas.size(), 1U);
  EXPECT_EQ(update.deltas.front().text, "a");
  EXPECT_TRUE(streams_[1]->cancelled());
}

}  // namespace
}  // namespace moed
