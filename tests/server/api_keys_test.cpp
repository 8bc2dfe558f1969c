#include "server/api_keys.h"

#include <gtest/gtest.h>

#include "tests/text/tokenizer_fixture.h"

namespace moed {
namespace {

TEST(ApiKeysTest, EachLineOfTheFileAndTheVariableIsAKey) {
  const TemporaryFolder folder;
  folder.write("keys", "first\n\nsecond \r\nthird");
  const auto keys = ApiKeys::load(folder.path() + "/keys", "fourth");
  ASSERT_TRUE(keys.ok()) << keys.status().message();
  EXPECT_FALSE(keys->empty());
  for (const char* const key : {"first", "second", "third", "fourth"}) EXPECT_TRUE(keys->accepts(key)) << key;
  for (const char* const key : {"", "firs", "firstx", "First", "first\n", " first", "fifth", "second "}) {
    EXPECT_FALSE(keys->accepts(key)) << key;
  }
}

TEST(ApiKeysTest, NoneAtAllAndTheVariableAlone) {
  const auto none = ApiKeys::load("", "");
  ASSERT_TRUE(none.ok());
  EXPECT_TRUE(none->empty());
  const auto one = ApiKeys::load("", "key");
  ASSERT_TRUE(one.ok());
  EXPECT_TRUE(one->accepts("key"));
  EXPECT_FALSE(one->accepts(""));
}

// Secrets are often files that end in a newline.
TEST(ApiKeysTest, WhatEndsTheVariableIsNoPartOfTheKey) {
  const auto keys = ApiKeys::load("", "key \r\n");
  ASSERT_TRUE(keys.ok());
  EXPECT_TRUE(keys->accepts("key"));
  EXPECT_FALSE(keys->accepts("key \r\n"));
  const auto blank = ApiKeys::load("", "\n");
  ASSERT_FALSE(blank.ok()) << "a key was meant: the door must not be open";
  EXPECT_NE(blank.status().message().find("MOED_API_KEY"), std::string::npos);
}

// A file that was meant to close the door must not leave it open.
TEST(ApiKeysTest, AFileWithoutKeysIsAnError) {
  const TemporaryFolder folder;
  folder.write("empty", "\n \r\n\n");
  for (const std::string name : {"/empty", "/missing"}) {
    const auto keys = ApiKeys::load(folder.path() + name, "");
    ASSERT_FALSE(keys.ok()) << name;
    EXPECT_NE(keys.status().message().find(folder.path() + name), std::string::npos) << keys.status().message();
    EXPECT_NE(keys.status().message().find("api_key_file"), std::string::npos);
  }
}

}  // namespace
}  // namespace moed
