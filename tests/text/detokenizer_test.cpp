#include <gtest/gtest.h>

#include <random>

#include "tests/text/tokenizer_fixture.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

namespace moed {
namespace {

const char* const kAtoms[] = {
    "a", "hello",   " hello", " the", " ",  "  ", "\n", "中", "文", "日本", "😀",    "👨‍👩‍👧",
    "é", "e\u0301", "ß",      ".",    "🇨🇭", "\t", "z",  "ä",  "w",  "�",    "\u00A0"};

std::string random_text(std::mt19937& random, int num_atoms) {
  std::string text;
  for (int i = 0; i < num_atoms; ++i) text += kAtoms[random() % std::size(kAtoms)];
  return text;
}

bool is_utf8(const std::string& text) { return replace_invalid_utf8(text) == text; }

// Pushes `ids` one by one; each piece must be whole characters.
std::string stream(const Tokenizer& tokenizer, std::span<const int32_t> ids, bool skip_special_tokens) {
  Detokenizer detokenizer(tokenizer, skip_special_tokens, {});
  std::string text;
  for (const int32_t id : ids) {
    auto piece = detokenizer.push(id);
    EXPECT_TRUE(piece.ok()) << piece.status().message();
    EXPECT_TRUE(is_utf8(*piece));
    text += *piece;
  }
  auto rest = detokenizer.flush();
  EXPECT_TRUE(rest.ok()) << rest.status().message();
  return text + *rest;
}

void expect_streams_like_decode(const Tokenizer& tokenizer, uint32_t seed) {
  std::mt19937 random(seed);
  for (int round = 0; round < 60; ++round) {
    const std::string text = random_text(random, 1 + static_cast<int>(random() % 25));
    const auto ids = tokenizer.encode(text, false);
    ASSERT_TRUE(ids.ok());
    EXPECT_EQ(stream(tokenizer, *ids, false), text) << "seed " << seed << " round " << round;
    for (size_t size = 0; size <= ids->size(); ++size) {
      const auto prefix = std::span(*ids).first(size);
      ASSERT_EQ(stream(tokenizer, prefix, false), tokenizer.decode(prefix, false).value())
          << "seed " << seed << " round " << round << " prefix " << size;
    }
  }
}

TEST(DetokenizerTest, ByteLevelEqualsDecodeForEveryPrefix) {
  const auto tokenizer = load_tokenizer(byte_level_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  expect_streams_like_decode(*tokenizer, 1);
}

TEST(DetokenizerTest, ByteFallbackEqualsDecodeForEveryPrefixThatEndsAtACharacter) {
  const auto tokenizer = load_tokenizer(byte_fallback_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  std::mt19937 random(2);
  for (int round = 0; round < 60; ++round) {
    const std::string text = random_text(random, 1 + static_cast<int>(random() % 25));
    const auto ids = tokenizer->encode(text, false);
    ASSERT_TRUE(ids.ok());
    EXPECT_EQ(stream(*tokenizer, *ids, false), text) << "round " << round;
    for (size_t size = 0; size <= ids->size(); ++size) {
      const auto prefix = std::span(*ids).first(size);
      const std::string whole = tokenizer->decode(prefix, false).value();
      const std::string streamed = stream(*tokenizer, prefix, false);
      // A prefix that ends inside a run of byte tokens may be broken; decode then replaces the run's whole characters
      // too.
      if (text.starts_with(whole)) {
        ASSERT_EQ(streamed, whole) << "round " << round << " prefix " << size;
      } else {
        const size_t broken = streamed.find_last_not_of("\xEF\xBF\xBD");
        ASSERT_TRUE(text.starts_with(streamed.substr(0, broken + 1)) || streamed == whole)
            << "round " << round << " prefix " << size;
      }
    }
  }
}

TEST(DetokenizerTest, ByteLevelEqualsDecodeForAnyTokens) {
  const auto tokenizer = load_tokenizer(byte_level_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    std::vector<int32_t> ids(random() % 40);
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % static_cast<uint32_t>(tokenizer->vocab_size()));
    const bool skip = round % 2 == 0;
    ASSERT_EQ(stream(*tokenizer, ids, skip), tokenizer->decode(ids, skip).value()) << "round " << round;
  }
}

TEST(DetokenizerTest, SendsACharacterWithItsLastToken) {
  const auto tokenizer = load_tokenizer(byte_level_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  Detokenizer detokenizer(*tokenizer, true, {});
  EXPECT_EQ(detokenizer.push(0xF0).value(), "");
  EXPECT_EQ(detokenizer.push(0x9F).value(), "");
  EXPECT_EQ(detokenizer.push(0x98).value(), "");
  EXPECT_EQ(detokenizer.push(0x80).value(), "😀");
  EXPECT_EQ(detokenizer.push('a').value(), "a");
  EXPECT_EQ(detokenizer.push(0xE4).value(), "");
  EXPECT_EQ(detokenizer.push('b').value(),
            "\xEF\xBF\xBD"
            "b");
  EXPECT_EQ(detokenizer.push(0xE4).value(), "");
  EXPECT_EQ(detokenizer.flush().value(), "\xEF\xBF\xBD");
  EXPECT_EQ(detokenizer.flush().value(), "");
}

TEST(DetokenizerTest, ByteFallbackSendsACharacterWithItsLastToken) {
  const auto tokenizer = load_tokenizer(byte_fallback_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  Detokenizer detokenizer(*tokenizer, true, {});
  EXPECT_EQ(detokenizer.push(3 + 0xE4).value(), "");
  EXPECT_EQ(detokenizer.push(3 + 0xB8).value(), "");
  EXPECT_EQ(detokenizer.push(3 + 0xAD).value(), "中");
  EXPECT_EQ(detokenizer.push(3 + 0xE4).value(), "");
  const int32_t dot = *tokenizer->token_to_id(".");
  EXPECT_EQ(detokenizer.push(dot).value(), "\xEF\xBF\xBD.");
}

TEST(DetokenizerTest, AnswerKeepsItsLeadingSpaceAfterAPrompt) {
  const auto tokenizer = load_tokenizer(byte_fallback_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  const int32_t hello = *tokenizer->token_to_id("\xE2\x96\x81hello");
  const std::vector<int32_t> prompt = {1, *tokenizer->token_to_id("a")};
  Detokenizer after_prompt(*tokenizer, true, prompt);
  EXPECT_EQ(after_prompt.push(hello).value(), " hello");
  EXPECT_EQ(after_prompt.push(hello).value(), " hello");
  Detokenizer alone(*tokenizer, true, {});
  EXPECT_EQ(alone.push(hello).value(), "hello");
  EXPECT_EQ(alone.push(hello).value(), " hello");
}

TEST(DetokenizerTest, EndlessBrokenBytesAreNotHeldForever) {
  const auto tokenizer = load_tokenizer(byte_fallback_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  Detokenizer detokenizer(*tokenizer, true, {});
  std::string text;
  for (int i = 0; i < 1000; ++i) text += detokenizer.push(3 + 0xFF).value();
  EXPECT_GE(text.size(), 3u * 900);
  text += detokenizer.flush().value();
  EXPECT_EQ(text.size(), 3u * 1000);
}

TEST(DetokenizerTest, IgnoresIdsWithoutATokenAndRefusesNegativeOnes) {
  const auto tokenizer = load_tokenizer(byte_level_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  Detokenizer detokenizer(*tokenizer, true, {});
  EXPECT_EQ(detokenizer.push(tokenizer->vocab_size() + 7).value(), "");
  EXPECT_EQ(detokenizer.push('x').value(), "x");
  EXPECT_EQ(detokenizer.push(-1).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace moed
