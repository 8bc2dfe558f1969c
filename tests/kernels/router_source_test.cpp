#include "kernels/simulated/router_source.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "tests/support/temporary_folder.h"

namespace moed {
namespace {

std::vector<int32_t> draw(RouterSource& source, int32_t layer, int32_t num_experts, int32_t top_k) {
  std::vector<int32_t> chosen(top_k);
  source.draw(layer, num_experts, chosen);
  return chosen;
}

// How often each expert is a row's first choice, most frequent first.
std::vector<double> first_choices(RouterSource& source, int32_t layer, int32_t num_experts, int rows) {
  std::vector<double> shares(num_experts);
  for (int row = 0; row < rows; ++row) shares[draw(source, layer, num_experts, 2)[0]] += 1.0 / rows;
  std::sort(shares.rbegin(), shares.rend());
  return shares;
}

TEST(RouterSource, ChoicesDiffer) {
  for (const char* spec : {"", "uniform", "zipf:1.2", "zipf:4", "shift:1.0:10"}) {
    RouterSource source = RouterSource::make(spec, 1).value();
    for (int row = 0; row < 200; ++row) {
      const std::vector<int32_t> chosen = draw(source, row % 3, 8, 8);  // all of them
      EXPECT_EQ(std::set<int32_t>(chosen.begin(), chosen.end()).size(), 8U) << spec;
    }
  }
}

TEST(RouterSource, FollowsItsLaw) {
  constexpr int kRows = 200'000;
  for (const double exponent : {0.0, 0.8, 1.5}) {
    RouterSource source = RouterSource::make("zipf:" + std::to_string(exponent), 9).value();
    const std::vector<double> shares = first_choices(source, 0, 16, kRows);
    double sum = 0.0;
    for (int rank = 1; rank <= 16; ++rank) sum += std::pow(rank, -exponent);
    for (int rank = 1; rank <= 16; ++rank) {
      const double wanted = std::pow(rank, -exponent) / sum;
      // Sorting moves shares that are nearly alike by some deviations.
      EXPECT_NEAR(shares[rank - 1], wanted, 5.0 * std::sqrt(wanted / kRows)) << exponent << ", rank " << rank;
    }
  }
}

TEST(RouterSource, LayersAndSeedsDiffer) {
  RouterSource one = RouterSource::make("zipf:1.0", 1).value();
  RouterSource same = RouterSource::make("zipf:1.0", 1).value();
  RouterSource other = RouterSource::make("zipf:1.0", 2).value();
  std::vector<int32_t> here, again, there, elsewhere;
  for (int row = 0; row < 20; ++row) {
    for (const auto& [source, layer, all] : {std::tuple{&one, 0, &here}, std::tuple{&same, 0, &again},
                                             std::tuple{&one, 1, &there}, std::tuple{&other, 0, &elsewhere}}) {
      const std::vector<int32_t> chosen = draw(*source, layer, 128, 8);
      all->insert(all->end(), chosen.begin(), chosen.end());
    }
  }
  EXPECT_EQ(here, again);
  EXPECT_NE(here, there);
  EXPECT_NE(here, elsewhere);
}

TEST(RouterSource, TheHotSetMoves) {
  RouterSource source = RouterSource::make("shift:2.0:1000", 4).value();
  std::set<int32_t> hottest;
  for (int era = 0; era < 20; ++era) {
    std::vector<int> counts(64);
    for (int row = 0; row < 1000; ++row) ++counts[draw(source, 0, 64, 1)[0]];
    hottest.insert(static_cast<int32_t>(std::max_element(counts.begin(), counts.end()) - counts.begin()));
    EXPECT_GT(*std::max_element(counts.begin(), counts.end()), 500);  // 61% of draws: no era mixes two orders
  }
  EXPECT_GT(hottest.size(), 10U);
}

StatusOr<RouterSource> of_trace(const std::string& text) {
  const TemporaryFolder folder;
  return RouterSource::make("trace:" + folder.write("router.trace", text), 0);
}

TEST(RouterSource, ATraceIsRepeatedLayerByLayer) {
  RouterSource source = of_trace("# two layers\n0 3 1\n1 5 6\n\n0 2 0 # the second row\n").value();
  EXPECT_EQ(draw(source, 0, 8, 2), (std::vector<int32_t>{3, 1}));
  EXPECT_EQ(draw(source, 0, 8, 2), (std::vector<int32_t>{2, 0}));
  EXPECT_EQ(draw(source, 0, 8, 1), (std::vector<int32_t>{3}));
  EXPECT_EQ(draw(source, 1, 8, 2), (std::vector<int32_t>{5, 6}));
  EXPECT_EQ(draw(source, 1, 8, 2), (std::vector<int32_t>{5, 6}));
  EXPECT_DEATH(draw(source, 2, 8, 2), "no rows of MoE layer 2");
  EXPECT_DEATH(draw(source, 1, 4, 2), "names expert 5");
  EXPECT_DEATH(draw(source, 0, 8, 3), "2 experts a row");
}

TEST(RouterSource, RefusesWhatMakesNoSense) {
  for (const char* spec : {"dice", "zipf", "zipf:", "zipf:x", "zipf:-1", "zipf:nan", "zipf:9", "shift:1.0",
                           "shift:1.0:0", "shift:1.0:x", "shift:x:100", "uniform:1"}) {
    const auto source = RouterSource::make(spec, 0);
    ASSERT_FALSE(source.ok()) << spec;
    EXPECT_EQ(source.status().param(), "router") << spec;
    EXPECT_NE(source.status().message().find(spec), std::string::npos) << source.status().message();
  }
  EXPECT_EQ(RouterSource::make("trace:/nowhere", 0).status().code(), StatusCode::kNotFound);
  for (const auto& [text, said] : {std::pair{"", "no row"},
                                   {"0 1 2\n0 1\n", ":2: 1 experts"},
                                   {"0\n", ":1: 0 experts"},
                                   {"0 1 x\n", "\"x\""},
                                   {"-1 2\n", "\"-1\""},
                                   {"0 3 3\n", "twice"},
                                   {"0 99999\n", "\"99999\""}}) {
    const auto source = of_trace(text);
    ASSERT_FALSE(source.ok()) << text;
    EXPECT_NE(source.status().message().find(said), std::string::npos) << source.status().message();
  }
}

}  // namespace
}  // namespace moed
