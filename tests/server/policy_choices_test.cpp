#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "plan/policies.h"
#include "server/settings_table.h"

namespace moed {
namespace {

std::string choices_of(std::string_view path) {
  const auto rows = setting_rows();
  return std::string(
      std::find_if(rows.begin(), rows.end(), [&](const SettingRow& row) { return row.path == path; })->choices);
}

TEST(PlacementSettings, OfferThePoliciesThatThereAre) {
  std::string known = "auto";
  for (const Policy& policy : policies()) known += "|" + std::string(policy.name);
  EXPECT_EQ(choices_of("placement.policy"), known);
  known = "auto";
  for (const KvPlacement each : {KvPlacement::kHost, KvPlacement::kDevice, KvPlacement::kSplit}) {
    known += "|" + std::string(name_of(each));
  }
  EXPECT_EQ(choices_of("placement.kv"), known);
}

}  // namespace
}  // namespace moed
