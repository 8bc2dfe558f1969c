#include "text/utf8.h"

#include <gtest/gtest.h>

namespace moed {
namespace {

const std::string kBad = "\xEF\xBF\xBD";

TEST(Utf8Test, ReplacesEachMaximalIllFormedPartOnce) {
  EXPECT_EQ(replace_invalid_utf8("ä€😀z"), "ä€😀z");
  EXPECT_EQ(replace_invalid_utf8("a\xF0\x9F\x98z"), "a" + kBad + "z");
  // Python: b'\xe0\x80\x80'.decode('utf-8', 'replace') is three of them; so are surrogates and overlong forms.
  EXPECT_EQ(replace_invalid_utf8("\xE0\x80\x80"), kBad + kBad + kBad);
  EXPECT_EQ(replace_invalid_utf8("\xED\xA0\x80"), kBad + kBad + kBad);
  EXPECT_EQ(replace_invalid_utf8("\xC0\xAF"), kBad + kBad);
  EXPECT_EQ(replace_invalid_utf8("\xF4\x90\x80\x80"), kBad + kBad + kBad + kBad);
  EXPECT_EQ(replace_invalid_utf8("\xE4\xB8"), kBad);
  EXPECT_EQ(replace_invalid_utf8("\xFF"), kBad);
}

TEST(Utf8Test, IsValidWithoutIllFormedParts) {
  for (const char* whole : {"", "a", "ä€😀z", "\xF4\x8F\xBF\xBF", "\xEF\xBF\xBD"}) EXPECT_TRUE(is_valid_utf8(whole));
  for (const char* broken :
       {"\xE4\xB8", "a\xF0\x9F\x98z", "\xE0\x80\x80", "\xED\xA0\x80", "\xC0\xAF", "\xF4\x90\x80\x80", "\x80", "\xFF"}) {
    EXPECT_FALSE(is_valid_utf8(broken));
  }
}

TEST(Utf8Test, HoldsOnlyWhatMayBecomeACharacter) {
  EXPECT_EQ(incomplete_utf8_suffix(""), 0u);
  EXPECT_EQ(incomplete_utf8_suffix("abc"), 0u);
  EXPECT_EQ(incomplete_utf8_suffix("a\xC3"), 1u);
  EXPECT_EQ(incomplete_utf8_suffix("a\xE4\xB8"), 2u);
  EXPECT_EQ(incomplete_utf8_suffix("a\xF0\x9F\x98"), 3u);
  EXPECT_EQ(incomplete_utf8_suffix("a\xF0\x9F\x98\x80"), 0u);
  EXPECT_EQ(incomplete_utf8_suffix("\xE0\x80"), 0u);      // overlong: never valid
  EXPECT_EQ(incomplete_utf8_suffix("\x80\x80\x80"), 0u);  // no lead byte
  EXPECT_EQ(incomplete_utf8_suffix("\xFF"), 0u);
}

}  // namespace
}  // namespace moed
