#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <thread>

#include "tests/text/tokenizer_fixture.h"

namespace moed {
namespace {

using nlohmann::json;

std::vector<int32_t> encode(const Tokenizer& tokenizer, std::string_view text, bool add_special_tokens = false) {
  auto ids = tokenizer.encode(text, add_special_tokens);
  EXPECT_TRUE(ids.ok()) << ids.status().message();
  return ids.ok() ? ids.value() : std::vector<int32_t>();
}

TEST(TokenizerTest, ByteLevelMergesAndComesBack) {
  const auto tokenizer = load_tokenizer(byte_level_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_TRUE(tokenizer->is_byte_level());
  // "hello the" by the merges of the fixture, in order of rank: he, ll, hell, o | ␣the.
  const auto id = [&](std::string_view bytes) { return tokenizer->token_to_id(byte_level(bytes)).value_or(-1); };
  EXPECT_EQ(encode(*tokenizer, "hello the"), (std::vector<int32_t>{id("hell"), 'o', id(" the")}));
  // The file's truncation to 4 tokens must not cut prompts.
  const std::string text = "The 中文 text, 😀😀 with\n\ttabs — and   spaces.";
  const auto ids = encode(*tokenizer, text);
  EXPECT_GT(ids.size(), 4u);
  EXPECT_EQ(tokenizer->decode(ids, false).value(), text);
  std::string joined;
  for (const int32_t token : ids) joined += tokenizer->token_bytes(token);
  EXPECT_EQ(joined, text);
}

TEST(TokenizerTest, BytesOfTokensAreTheirOwn) {
  const auto tokenizer = load_tokenizer(byte_level_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  for (int byte = 0; byte < 256; ++byte) {
    EXPECT_EQ(tokenizer->token_bytes(byte), std::string(1, static_cast<char>(byte)));
  }
  EXPECT_EQ(tokenizer->token_bytes(*tokenizer->token_to_id(byte_level("\xF0\x9F\x98"))), "\xF0\x9F\x98");
  EXPECT_EQ(tokenizer->token_bytes(*tokenizer->token_to_id("<|im_end|>")), "<|im_end|>");
  EXPECT_EQ(tokenizer->longest_token_bytes(), 12);  // <|im_start|>
  EXPECT_EQ(tokenizer->vocab_size(), 256 + 9 + 3);
  EXPECT_EQ(tokenizer->token_bytes(-1), "");
  EXPECT_EQ(tokenizer->token_bytes(1 << 30), "");
}

TEST(TokenizerTest, SpecialTokens) {
  const auto tokenizer = load_tokenizer(byte_level_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  const int32_t end = *tokenizer->token_to_id("<|im_end|>");
  const int32_t think = *tokenizer->token_to_id("<think>");
  EXPECT_TRUE(tokenizer->is_special(end));
  EXPECT_FALSE(tokenizer->is_special(think));
  EXPECT_FALSE(tokenizer->is_special('a'));
  EXPECT_FALSE(tokenizer->is_special(-5));
  const auto ids = encode(*tokenizer, "<think>a<|im_end|>");
  EXPECT_EQ(ids, (std::vector<int32_t>{think, 'a', end}));
  EXPECT_EQ(tokenizer->decode(ids, false).value(), "<think>a<|im_end|>");
  EXPECT_EQ(tokenizer->decode(ids, true).value(), "<think>a");
  EXPECT_EQ(tokenizer->id_to_token(end), "<|im_end|>");
  EXPECT_EQ(tokenizer->id_to_token(-1), "");
  EXPECT_FALSE(tokenizer->token_to_id("no such token").has_value());
}

TEST(TokenizerTest, ConfigMakesATokenSpecial) {
  const auto tokenizer = load_tokenizer(byte_level_tokenizer(), {{"eos_token", {{"content", "<think>"}}}});
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_TRUE(tokenizer->is_special(*tokenizer->token_to_id("<think>")));
  EXPECT_EQ(tokenizer->vocab_size(), 256 + 9 + 3);
}

TEST(TokenizerTest, ByteFallback) {
  const auto tokenizer = load_tokenizer(byte_fallback_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_FALSE(tokenizer->is_byte_level());
  const auto ids = encode(*tokenizer, "hello world 中.", true);
  EXPECT_EQ(ids.front(), 1);  // <s>
  EXPECT_EQ(ids[1], *tokenizer->token_to_id("\xE2\x96\x81hello"));
  EXPECT_EQ(tokenizer->decode(ids, true).value(), "hello world 中.");
  EXPECT_EQ(encode(*tokenizer, "hello world 中.", false).front(), ids[1]);
  EXPECT_EQ(tokenizer->token_bytes(3 + 0xE4), "\xE4");
  EXPECT_EQ(tokenizer->token_bytes(ids[1]), " hello");
  EXPECT_EQ(tokenizer->token_bytes(1), "<s>");
  // Half a character, as Hugging Face shows it: one replacement a byte.
  EXPECT_EQ(tokenizer->decode(std::vector<int32_t>{3 + 0xE4, 3 + 0xB8}, true).value(), "\xEF\xBF\xBD\xEF\xBF\xBD");
}

TEST(TokenizerTest, RefusesIdsOutsideTheVocabulary) {
  const auto tokenizer = load_tokenizer(byte_level_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  for (const int32_t id : {-1, tokenizer->vocab_size(), 1 << 30}) {
    const auto text = tokenizer->decode(std::vector<int32_t>{'a', id}, false);
    ASSERT_FALSE(text.ok());
    EXPECT_EQ(text.status().code(), StatusCode::kInvalidArgument);
    EXPECT_NE(text.status().message().find(std::to_string(id)), std::string::npos) << text.status().message();
  }
}

TEST(TokenizerTest, RefusesTextThatIsNotUtf8WithoutQuotingIt) {
  const auto tokenizer = load_tokenizer(byte_level_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  const auto ids = tokenizer->encode("secret\xFF", false);
  ASSERT_FALSE(ids.ok());
  EXPECT_EQ(ids.status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(ids.status().message().find("secret"), std::string::npos);
  EXPECT_TRUE(encode(*tokenizer, "").empty());
  EXPECT_EQ(tokenizer->decode({}, false).value(), "");
}

TEST(TokenizerTest, BadFilesAreNamed) {
  const auto expect_error = [](const TemporaryFolder& folder, StatusCode code, const std::string& part) {
    const auto loaded = Tokenizer::load(folder.path());
    ASSERT_FALSE(loaded.ok());
    EXPECT_EQ(loaded.status().code(), code) << loaded.status().message();
    EXPECT_NE(loaded.status().message().find(part), std::string::npos) << loaded.status().message();
    EXPECT_NE(loaded.status().message().find(folder.path()), std::string::npos) << loaded.status().message();
  };
  {
    TemporaryFolder folder;
    expect_error(folder, StatusCode::kNotFound, "tokenizer.json: no such file");
  }
  for (const std::string& content : {std::string(), std::string("{"), std::string("[]"), std::string("{\"model\":3}"),
                                     std::string("\xFF\xFE\0", 3), std::string(100'000, '[')}) {
    TemporaryFolder folder;
    folder.write("tokenizer.json", content);
    expect_error(folder, StatusCode::kInvalidArgument, "tokenizer.json");
  }
  {
    TemporaryFolder folder;
    std::filesystem::create_directory(folder.file("tokenizer.json"));
    expect_error(folder, StatusCode::kInvalidArgument, "not a regular file");
  }
  {
    TemporaryFolder folder;
    folder.write("tokenizer.json", byte_level_tokenizer().dump());
    folder.write("tokenizer_config.json", "{\"eos_token\":");
    expect_error(folder, StatusCode::kInvalidArgument, "tokenizer_config.json");
  }
  {
    TemporaryFolder folder;
    json tokenizer = byte_level_tokenizer();
    tokenizer["model"]["vocab"]["far"] = 4'000'000'000u;
    folder.write("tokenizer.json", tokenizer.dump());
    expect_error(folder, StatusCode::kInvalidArgument, "4000000000");
  }
}

TEST(TokenizerTest, FollowsSymbolicLinks) {
  TemporaryFolder blobs, snapshot;
  blobs.write("0a1b", byte_level_tokenizer().dump());
  std::filesystem::create_symlink(blobs.file("0a1b"), snapshot.file("tokenizer.json"));
  EXPECT_TRUE(Tokenizer::load(snapshot.path()).ok());
}

TEST(TokenizerTest, ManyThreadsAtOnce) {
  const auto tokenizer = load_tokenizer(byte_level_tokenizer());
  ASSERT_NE(tokenizer, nullptr);
  const std::string text = "hello the world, 中文 😀 again and again";
  const auto expected = encode(*tokenizer, text);
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) {
        const auto ids = tokenizer->encode(text, false);
        if (!ids.ok() || *ids != expected || tokenizer->decode(*ids, false).value() != text) ++wrong;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace moed
