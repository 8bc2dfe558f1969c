#include "server/choice_text.h"

#include <gtest/gtest.h>

#include "tests/text/tokenizer_fixture.h"

namespace moed {
namespace {

// Ids 0..255 of this tokenizer are the bytes.
class ChoiceTextTest : public ::testing::Test {
 protected:
  std::unique_ptr<Tokenizer> tokenizer_ = load_tokenizer(byte_level_tokenizer());

  static TokenEvent event_of(int32_t token, FinishReason finish = FinishReason::kNone) {
    TokenEvent event;
    event.token.token = token;
    event.token.logprob = -0.5F;
    event.finish = finish;
    return event;
  }

  struct Answer {
    std::string text;
    std::string token_bytes;  // of the tokens that travelled with it
    FinishReason finish = FinishReason::kNone;
    int32_t num_tokens = 0;
    std::string stop_text;
    bool asked_to_stop = false;
    size_t deltas = 0;
  };

  // Feeds the bytes of `bytes` one token each, the last with `finish`.
  Answer run(const std::string& bytes, ChoiceTextOptions options, FinishReason finish = FinishReason::kLength) {
    ChoiceText choice(*tokenizer_, 0, std::move(options), {});
    Answer answer;
    for (size_t i = 0; i < bytes.size() && !choice.finished(); ++i) {
      std::vector<Delta> deltas;
      const bool last = i + 1 == bytes.size();
      auto stopped = choice.push(event_of(static_cast<uint8_t>(bytes[i]), last ? finish : FinishReason::kNone), deltas);
      EXPECT_TRUE(stopped.ok());
      answer.asked_to_stop = *stopped;
      EXPECT_LE(deltas.size(), 1U);
      for (const Delta& delta : deltas) {
        ++answer.deltas;
        answer.text += delta.text;
        for (const TokenText& token : delta.tokens) answer.token_bytes += token.bytes;
        answer.finish = delta.finish;
        answer.num_tokens = delta.num_tokens;
        answer.stop_text = delta.stop_text;
      }
    }
    return answer;
  }
};

TEST_F(ChoiceTextTest, PassesTextThrough) {
  const Answer answer = run("hello", {});
  EXPECT_EQ(answer.text, "hello");
  EXPECT_EQ(answer.token_bytes, "hello");
  EXPECT_EQ(answer.finish, FinishReason::kLength);
  EXPECT_EQ(answer.num_tokens, 5);
  EXPECT_EQ(answer.deltas, 5U);
}

TEST_F(ChoiceTextTest, CutsBeforeAStopStringAndCountsTheTokenThatCompletesIt) {
  ChoiceTextOptions options;
  options.stop = {"STOP"};
  const Answer answer = run("abSTOPcd", options);
  EXPECT_EQ(answer.text, "ab");
  EXPECT_EQ(answer.token_bytes, "ab");
  EXPECT_EQ(answer.finish, FinishReason::kStop);
  EXPECT_EQ(answer.stop_text, "STOP");
  EXPECT_EQ(answer.num_tokens, 6);
  EXPECT_TRUE(answer.asked_to_stop);
}

TEST_F(ChoiceTextTest, KeepsTheStopStringWhenAsked) {
  ChoiceTextOptions options;
  options.stop = {"STOP"};
  options.include_stop = true;
  EXPECT_EQ(run("abSTOPcd", options).text, "abSTOP");
}

TEST_F(ChoiceTextTest, LogprobsTravelWithHeldText) {
  ChoiceTextOptions options;
  options.stop = {"xyz"};
  options.logprobs = true;
  ChoiceText choice(*tokenizer_, 0, options, {});
  std::vector<Delta> deltas;
  ASSERT_TRUE(choice.push(event_of('x'), deltas).ok());
  ASSERT_EQ(deltas.size(), 1U) << "the answer has begun: doors say the role";
  EXPECT_EQ(deltas[0].text, "");
  EXPECT_TRUE(deltas[0].tokens.empty());
  EXPECT_EQ(deltas[0].num_tokens, 1);
  deltas.clear();
  ASSERT_TRUE(choice.push(event_of('y'), deltas).ok());
  EXPECT_TRUE(deltas.empty());
  ASSERT_TRUE(choice.push(event_of('w'), deltas).ok());
  ASSERT_EQ(deltas.size(), 1U);
  EXPECT_EQ(deltas[0].text, "xyw");
  ASSERT_EQ(deltas[0].tokens.size(), 3U);
  EXPECT_EQ(deltas[0].tokens[2].bytes, "w");
  EXPECT_FLOAT_EQ(*deltas[0].tokens[0].logprob, -0.5F);
}

// lm-eval asks for one token behind a text and drops that token's score: it must be there when the token ends the
// choice.
TEST_F(ChoiceTextTest, TheStopTokenHasItsScoreAndNoText) {
  ChoiceTextOptions options;
  options.logprobs = true;
  ChoiceText choice(*tokenizer_, 0, options, {});
  TokenEvent event = event_of('e', FinishReason::kStop);
  event.stop_token = 'e';
  std::vector<Delta> deltas;
  ASSERT_TRUE(choice.push(event, deltas).ok());
  ASSERT_EQ(deltas.size(), 1U);
  EXPECT_EQ(deltas[0].text, "");
  ASSERT_EQ(deltas[0].tokens.size(), 1U);
  EXPECT_EQ(deltas[0].tokens[0].token, 'e');
  EXPECT_FLOAT_EQ(*deltas[0].tokens[0].logprob, -0.5F);
}

// Clients that train on answers need each id once, whatever became of its text.
TEST_F(ChoiceTextTest, EveryTokenIdIsToldOnce) {
  for (const char* const stop : {"xyz", "cd", "never"}) {
    ChoiceTextOptions options;
    options.stop = {stop};
    ChoiceText choice(*tokenizer_, 0, options, {});
    std::string ids;
    const std::string answer = "xyxycd";
    for (size_t i = 0; i < answer.size() && !choice.finished(); ++i) {
      TokenEvent event = event_of(answer[i], i + 1 == answer.size() ? FinishReason::kStop : FinishReason::kNone);
      if (event.finish == FinishReason::kStop) event.stop_token = answer[i];
      std::vector<Delta> deltas;
      ASSERT_TRUE(choice.push(event, deltas).ok());
      for (const Delta& delta : deltas) ids.append(delta.token_ids.begin(), delta.token_ids.end());
    }
    EXPECT_EQ(ids, answer) << stop;
  }
}

// Each way to cut the answer into a stop string and the rest, through the tokenizer.
TEST_F(ChoiceTextTest, StopStringsOfEveryLengthAtEveryPosition) {
  const std::string text = "one two three";
  for (size_t begin = 0; begin < text.size(); ++begin) {
    for (size_t length = 1; begin + length <= text.size(); ++length) {
      ChoiceTextOptions options;
      options.stop = {text.substr(begin, length)};
      const Answer answer = run(text, options);
      const size_t first = text.find(options.stop[0]);
      EXPECT_EQ(answer.text, text.substr(0, first)) << options.stop[0];
      EXPECT_EQ(answer.token_bytes, text.substr(0, first)) << "logprobs travel with their text";
      EXPECT_EQ(answer.num_tokens, static_cast<int32_t>(first + length));
      EXPECT_EQ(answer.finish, FinishReason::kStop);
    }
  }
}

TEST_F(ChoiceTextTest, HeldTextIsFlushedAtTheEnd) {
  ChoiceTextOptions options;
  options.stop = {"\n\nQ:"};
  const Answer answer = run("a\n\nQ", options);
  EXPECT_EQ(answer.text, "a\n\nQ");
  EXPECT_EQ(answer.token_bytes, "a\n\nQ");
}

TEST_F(ChoiceTextTest, NoStopBeforeMinTokens) {
  ChoiceTextOptions options;
  options.stop = {"a"};
  options.min_tokens = 3;
  EXPECT_EQ(run("aaaaa", options).text, "aaa") << "the third token is not looked at, as in vLLM";
}

// As in vLLM a stop string counts when its end lies behind the first tokens, wherever it begins.
TEST_F(ChoiceTextTest, AStopMayBeginWithinMinTokens) {
  for (const std::string stop : {"END", "aba", "aa", "xyz"}) {
    for (const std::string text : {"ENDENDEND", "..END.END", "ababababa", "aaaaaaaaa", ".xyxyzxyz"}) {
      for (int32_t min_tokens = 0; min_tokens <= 9; ++min_tokens) {
        ChoiceTextOptions options;
        options.stop = {stop};
        options.min_tokens = min_tokens;
        size_t begin = 0;
        while (begin < text.size() && (text.compare(begin, stop.size(), stop) != 0 ||
                                       static_cast<int32_t>(begin + stop.size()) <= min_tokens)) {
          ++begin;
        }
        EXPECT_EQ(run(text, options).text, text.substr(0, begin)) << stop << " in " << text << ", " << min_tokens;
      }
    }
  }
}

TEST_F(ChoiceTextTest, CharactersOfSeveralTokensComeWhole) {
  const std::string euro = "\xe2\x82\xac";
  const Answer whole = run("1" + euro + "2", {});
  EXPECT_EQ(whole.text, "1" + euro + "2");
  EXPECT_EQ(whole.token_bytes, "1" + euro + "2");
  const Answer broken = run("1\xe2\x82", {});
  EXPECT_EQ(broken.text, "1\xef\xbf\xbd");
  EXPECT_EQ(broken.num_tokens, 3);
}

// Scores of a character's parts wait for its text: they are cut with it, or go out with it.
TEST_F(ChoiceTextTest, ScoresOfACharactersPartsTravelWithIt) {
  const std::string euro = "\xe2\x82\xac";
  ChoiceTextOptions options;
  options.logprobs = true;
  options.stop = {euro};
  Answer answer = run("1" + euro + "2", options);
  EXPECT_EQ(answer.text, "1");
  EXPECT_EQ(answer.token_bytes, "1");
  EXPECT_EQ(answer.num_tokens, 4);
  options.include_stop = true;
  EXPECT_EQ(run("1" + euro + "2", options).token_bytes, "1" + euro);
  options = {};
  options.logprobs = true;
  answer = run(euro + "2", options);
  EXPECT_EQ(answer.token_bytes, euro + "2");
  EXPECT_EQ(answer.deltas, 3U) << "one that says the answer has begun, the character, the digit";
  answer = run("1\xe2\x82", options);
  EXPECT_EQ(answer.token_bytes, "1\xe2\x82") << "at the end of the answer they are shown, whole or not";
}

// Each way to cut an answer of characters of one to four bytes, a token each byte.
TEST_F(ChoiceTextTest, StopStringsOfSeveralByteCharactersCutTheirScores) {
  const std::vector<std::string> characters = {"a", "\xc3\xa9",    "\xe2\x82\xac", "\xf0\x9f\x99\x82",
                                               "b", "\xe2\x82\xad"};
  std::string text;
  for (const std::string& character : characters) text += character;
  for (size_t begin = 0; begin < characters.size(); ++begin) {
    std::string stop;
    for (size_t end = begin; end < characters.size(); ++end) {
      stop += characters[end];
      ChoiceTextOptions options;
      options.logprobs = true;
      options.stop = {stop};
      const Answer answer = run(text, options);
      EXPECT_EQ(answer.text, text.substr(0, text.find(stop))) << stop;
      EXPECT_EQ(answer.token_bytes, answer.text) << stop;
      EXPECT_EQ(answer.num_tokens, static_cast<int32_t>(answer.text.size() + stop.size()));
    }
  }
}

TEST_F(ChoiceTextTest, TheStopTokenIsNoText) {
  ChoiceText choice(*tokenizer_, 0, {}, {});
  std::vector<Delta> deltas;
  ASSERT_TRUE(choice.push(event_of('a'), deltas).ok());
  TokenEvent last = event_of('b', FinishReason::kStop);
  last.stop_token = 'b';
  const auto stopped = choice.push(last, deltas);
  ASSERT_TRUE(stopped.ok());
  EXPECT_FALSE(*stopped) << "the scheduler knows";
  ASSERT_EQ(deltas.size(), 2U);
  EXPECT_EQ(deltas[1].text, "");
  EXPECT_EQ(deltas[1].num_tokens, 2);
  EXPECT_EQ(deltas[1].finish, FinishReason::kStop);
  EXPECT_EQ(deltas[1].stop_token, 'b');
}

}  // namespace
}  // namespace moed
