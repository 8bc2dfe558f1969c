#include <spdlog/fmt/fmt.h>

#include <nlohmann/json.hpp>

#include "server/settings_table.h"

namespace moed {
namespace {

constexpr std::string_view kSources =
    "Flags win over environment variables, those over the file that `--config` (or `MOED_CONFIG`) names, and that "
    "over\n"
    "the defaults.";

std::string_view section_title(std::string_view section) {
  if (section == "model") return "The model";
  if (section == "server") return "The server";
  if (section == "device") return "The device";
  if (section == "memory") return "Memory";
  if (section == "placement") return "Placement of experts and KV";
  if (section == "scheduler") return "Scheduling";
  if (section == "limits") return "Limits of a request";
  return section;
}

// What the user types after a flag.
std::string_view placeholder(const SettingRow& row) {
  Settings defaults;
  const SettingField field = row.field(defaults);
  if (row.path == "model.path") return " DIR";
  if (std::holds_alternative<bool*>(field)) return "";
  if (std::holds_alternative<int64_t*>(field) || std::holds_alternative<double*>(field)) return " N";
  return " TEXT";
}

}  // namespace

std::string settings_help() {
  const Settings defaults;
  std::string text =
      "usage: moed serve --model DIR [flags]\n\n"
      "  --config FILE\n        TOML file of settings [MOED_CONFIG]\n"
      "  --print-config\n        print the settings in force as TOML and leave\n"
      "  --help, -h\n        print this and leave\n";
  std::string_view section;
  for (const SettingRow& row : setting_rows()) {
    if (row.secret) continue;
    if (setting_section(row) != section) {
      section = setting_section(row);
      text += fmt::format("\n{} [{}]\n", section_title(section), section);
    }
    text += fmt::format("  {}{}\n        {}\n        {}; default {} [{}]\n", setting_flag(row), placeholder(row),
                        row.help, setting_allowed(row), setting_value(row, defaults), setting_environment(row));
  }
  text += fmt::format(
      "\n{}\nMOED_API_KEY holds one key that clients must present. --no-NAME turns a switch off; a flag that "
      "takes a list may be given\nseveral times, a variable separates with commas.\n",
      kSources);
  return text;
}

std::string settings_toml(const Settings& settings) {
  std::string text;
  std::string_view section;
  for (const SettingRow& row : setting_rows()) {
    if (row.secret) continue;
    if (setting_section(row) != section) {
      text += fmt::format("{}[{}]\n", section.empty() ? "" : "\n", setting_section(row));
      section = setting_section(row);
    }
    text += fmt::format("{} = {}\n", setting_key(row), setting_value(row, settings));
  }
  return text;
}

std::string settings_json(const Settings& settings) {
  Settings copy = settings;
  nlohmann::ordered_json json;
  for (const SettingRow& row : setting_rows()) {
    if (row.secret) continue;
    nlohmann::ordered_json& value = json[std::string(setting_section(row))][std::string(setting_key(row))];
    std::visit([&](const auto* field) { value = *field; }, row.field(copy));
  }
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

std::string settings_markdown() {
  const Settings defaults;
  std::string text = fmt::format(
      "# Settings\n\n"
      "Written by `moed docs-config` from the table in `server/settings_table.cpp`; a test compares.\n\n"
      "{}\n`moed serve --print-config` prints what is in force, as a file that `--config` reads back. An unknown key "
      "or flag is an "
      "error that\nsuggests the nearest; an unknown `MOED_*` variable is a warning, an empty one counts as unset.\n\n"
      "A switch is turned on by its flag alone and off by `--no-NAME` or `=false`. A flag that takes a list may be "
      "given several\n"
      "times; a variable separates with commas. Sizes ending in `_bytes` are bytes, times are seconds.\n",
      kSources);
  std::string_view section;
  for (const SettingRow& row : setting_rows()) {
    if (setting_section(row) != section) {
      section = setting_section(row);
      text += fmt::format(
          "\n## {} `[{}]`\n\n| key | flag | environment | default | allowed | what |\n|---|---|---|---|---|---|\n",
          section_title(section), section);
    }
    const std::string key = row.secret ? "" : fmt::format("`{}`", setting_key(row));
    const std::string flag = row.secret ? "" : fmt::format("`{}`", setting_flag(row));
    const std::string value = row.secret ? "" : fmt::format("`{}`", setting_value(row, defaults));
    text += fmt::format("| {} | {} | `{}` | {} | {} | {} |\n", key, flag, setting_environment(row), value,
                        setting_allowed(row), row.help);
  }
  return text;
}

}  // namespace moed
