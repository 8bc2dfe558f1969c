#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "server/settings.h"

namespace moed {

using SettingField = std::variant<bool*, int64_t*, double*, std::string*, std::vector<std::string>*>;

// One setting. Flag and environment variable follow from the key: scheduler.queue_max is --queue-max and
// MOED_QUEUE_MAX.
struct SettingRow {
  std::string_view path;  // "section.key"
  SettingField (*field)(Settings&);
  std::string_view help;
  double min = 0, max = 0;        // of numbers
  std::string_view choices = {};  // of strings: "auto|dummy"; empty: any
  bool secret = false;            // from the environment only, and never printed
};

// Every setting, section by section.
std::span<const SettingRow> setting_rows();

std::string_view setting_section(const SettingRow& row);
std::string_view setting_key(const SettingRow& row);
std::string setting_flag(const SettingRow& row);         // "--queue-max"
std::string setting_environment(const SettingRow& row);  // "MOED_QUEUE_MAX"
// "an integer from 1 to 1048576"
std::string setting_allowed(const SettingRow& row);
// The field's value in `settings`, as TOML writes it.
std::string setting_value(const SettingRow& row, const Settings& settings);

}  // namespace moed
