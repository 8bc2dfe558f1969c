#include "server/stop_matcher.h"

#include <gtest/gtest.h>

#include <random>

namespace moed {
namespace {

struct Outcome {
  std::string text;
  int stop = -1;
  bool operator==(const Outcome&) const = default;
};

// What should happen, found by trying every end in turn on the whole text.
Outcome brute_force(const std::string& text, const std::vector<std::string>& stops) {
  for (size_t end = 1; end <= text.size(); ++end) {
    Outcome best;
    size_t best_length = 0;
    for (size_t i = 0; i < stops.size(); ++i) {
      const size_t length = stops[i].size();
      if (length > end || text.compare(end - length, length, stops[i]) != 0 || length <= best_length) continue;
      best = {text.substr(0, end - length), static_cast<int>(i)};
      best_length = length;
    }
    if (best.stop >= 0) return best;
  }
  return {text, -1};
}

Outcome in_pieces(const std::vector<std::string>& pieces, const std::vector<std::string>& stops) {
  StopMatcher matcher(stops);
  Outcome outcome;
  for (const std::string& piece : pieces) {
    StopMatcher::Result result = matcher.push(piece);
    outcome.text += result.text;
    if (result.stop >= 0) {
      outcome.stop = result.stop;
      return outcome;
    }
  }
  outcome.text += matcher.flush();
  return outcome;
}

TEST(StopMatcher, FindsAStopSplitAtEveryPosition) {
  const std::string text = "one two STOP three";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    EXPECT_EQ(in_pieces({text.substr(0, cut), text.substr(cut)}, {"STOP"}), (Outcome{"one two ", 0})) << cut;
  }
}

TEST(StopMatcher, HoldsOnlyWhatMayBeginAStop) {
  StopMatcher matcher({"\n\nUser:"});
  EXPECT_EQ(matcher.push("Hello.\n").text, "Hello.");
  EXPECT_EQ(matcher.push("\n").text, "");
  EXPECT_EQ(matcher.push("Us").text, "");
  EXPECT_EQ(matcher.push("age").text, "\n\nUsage");
  EXPECT_EQ(matcher.push(" \n").text, " ");
  EXPECT_EQ(matcher.flush(), "\n");
}

TEST(StopMatcher, SelfOverlappingStops) {
  EXPECT_EQ(in_pieces({"a", "a", "a", "b"}, {"aab"}), (Outcome{"a", 0}));
  EXPECT_EQ(in_pieces({"abab", "ac"}, {"abac"}), (Outcome{"ab", 0}));
}

TEST(StopMatcher, AgreesWithBruteForceHoweverTextIsCut) {
  std::mt19937 random(7);
  const auto word = [&](int longest) {
    std::string text;
    for (int i = 1 + static_cast<int>(random() % longest); i > 0; --i) text += static_cast<char>('a' + random() % 2);
    return text;
  };
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::string> stops;
    for (int i = 1 + static_cast<int>(random() % 3); i > 0; --i) stops.push_back(word(6));
    std::vector<std::string> pieces;
    std::string text;
    for (int i = static_cast<int>(random() % 8); i > 0; --i) {
      pieces.push_back(word(5));
      text += pieces.back();
    }
    const Outcome expected = brute_force(text, stops);
    const Outcome found = in_pieces(pieces, stops);
    ASSERT_EQ(found.text, expected.text) << "round " << round << ", text " << text;
    ASSERT_EQ(found.stop >= 0, expected.stop >= 0) << "round " << round;
  }
}

}  // namespace
}  // namespace moed
