#include "server/settings.h"

#include <spdlog/fmt/fmt.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <fstream>
#include <map>
#include <optional>
#include <sstream>

#include "base/toml.h"
#include "server/host_name.h"
#include "server/settings_table.h"

namespace moed {
namespace {

constexpr size_t kFileBytesMax = 1 << 20;

// Where a value was set ("moed.toml:3", "--queue-max", "MOED_QUEUE_MAX") and what it says.
struct Given {
  std::string source;
  std::vector<std::string> texts;  // one; for a list, its elements
};

Status refused(const SettingRow& row, const std::string& source, std::string_view value) {
  return invalid_argument(fmt::format("{}: {} is {}, but must be {}", source, row.path, value, setting_allowed(row)),
                          std::string(row.path));
}

template <class T>
std::optional<T> parse_number(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<bool> parse_bool(std::string_view text) {
  if (text == "true" || text == "1") return true;
  if (text == "false" || text == "0") return false;
  return std::nullopt;
}

bool is_choice(std::string_view choices, std::string_view value) {
  for (std::string_view rest = choices; !rest.empty();) {
    const std::string_view choice = rest.substr(0, rest.find('|'));
    if (choice == value) return true;
    rest.remove_prefix(std::min(rest.size(), choice.size() + 1));
  }
  return choices.empty();
}

// Checks the value's range and stores it.
template <class T>
bool store(const SettingRow& row, T* field, std::optional<T> value) {
  if (!value.has_value()) return false;
  if constexpr (std::is_same_v<T, int64_t> || std::is_same_v<T, double>) {
    // Written so that not-a-number fails.
    const bool inside = static_cast<double>(*value) >= row.min && static_cast<double>(*value) <= row.max;
    if (!inside) return false;
  }
  if constexpr (std::is_same_v<T, std::string>) {
    if (!is_choice(row.choices, *value)) return false;
  }
  *field = std::move(*value);
  return true;
}

// Sets a field from text: flags and environment.
Status set_from_text(const SettingRow& row, const Given& given, Settings& settings) {
  const SettingField field = row.field(settings);
  const std::string& text = given.texts.back();
  bool ok = true;
  if (const auto* target = std::get_if<bool*>(&field)) ok = store(row, *target, parse_bool(text));
  if (const auto* target = std::get_if<int64_t*>(&field)) ok = store(row, *target, parse_number<int64_t>(text));
  if (const auto* target = std::get_if<double*>(&field)) ok = store(row, *target, parse_number<double>(text));
  if (const auto* target = std::get_if<std::string*>(&field)) ok = store(row, *target, std::optional(text));
  if (const auto* target = std::get_if<std::vector<std::string>*>(&field)) **target = given.texts;
  return ok ? Status() : refused(row, given.source, row.secret ? "not allowed" : "\"" + text + "\"");
}

std::optional<std::vector<std::string>> toml_strings(const toml::node& node) {
  if (const auto text = node.value_exact<std::string>()) return std::vector{*text};
  const toml::array* array = node.as_array();
  if (array == nullptr) return std::nullopt;
  std::vector<std::string> values;
  for (const toml::node& item : *array) {
    const auto text = item.value_exact<std::string>();
    if (!text.has_value()) return std::nullopt;
    values.push_back(*text);
  }
  return values;
}

std::string toml_text(const toml::node& node) {
  std::ostringstream text;
  if (node.is_table()) return "a table";
  if (node.is_array()) return "an array";
  node.visit([&](const auto& value) { text << value; });
  return text.str();
}

// Sets a field from a node of the file. Types must match; only an integer may stand for a number.
Status set_from_toml(const SettingRow& row, const std::string& source, const toml::node& node, Settings& settings) {
  const SettingField field = row.field(settings);
  bool ok = true;
  if (const auto* target = std::get_if<bool*>(&field)) ok = store(row, *target, node.value_exact<bool>());
  if (const auto* target = std::get_if<int64_t*>(&field)) ok = store(row, *target, node.value_exact<int64_t>());
  if (const auto* target = std::get_if<double*>(&field)) {
    ok = store(row, *target, node.is_number() ? node.value<double>() : std::nullopt);
  }
  if (const auto* target = std::get_if<std::string*>(&field)) ok = store(row, *target, node.value_exact<std::string>());
  if (const auto* target = std::get_if<std::vector<std::string>*>(&field)) ok = store(row, *target, toml_strings(node));
  return ok ? Status() : refused(row, source, toml_text(node));
}

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row.back();
}

// "; did you mean X?", or nothing when no name is near.
std::string suggestion(std::string_view name, const std::vector<std::string>& known) {
  size_t best = std::max<size_t>(2, name.size() / 3) + 1;
  std::string_view nearest;
  for (const std::string& candidate : known) {
    size_t distance = edit_distance(name.substr(0, 100), candidate);
    // A key in the wrong section is near, whatever the section.
    const std::string_view key = std::string_view(candidate).substr(candidate.rfind('.') + 1);
    const std::string_view own_key = name.substr(name.rfind('.') + 1);
    if (candidate.find('.') != std::string::npos) {
      distance = std::min(distance, edit_distance(own_key.substr(0, 100), key) + 1);
    }
    if (distance < best) {
      best = distance;
      nearest = candidate;
    }
  }
  return nearest.empty() ? "" : fmt::format("; did you mean {}?", nearest);
}

Status unknown_key(const std::string& source, const std::string& path) {
  std::vector<std::string> known;
  for (const SettingRow& row : setting_rows()) {
    if (!row.secret) known.emplace_back(row.path);
  }
  return invalid_argument(fmt::format("{}: unknown key {}{}", source, path, suggestion(path, known)), path);
}

StatusOr<std::string> read_config(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kFileBytesMax + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  // Reading a folder opens but fails; a short file ends with eof set.
  if (!file.eof() && !file) return invalid_argument(fmt::format("{}: cannot be read", path), "config");
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.size() > kFileBytesMax) return invalid_argument(fmt::format("{}: larger than 1 MiB", path), "config");
  return text;
}

Status apply_file(const std::string& path, Settings& settings) {
  MOED_ASSIGN_OR_RETURN(const std::string text, read_config(path));
  const toml::parse_result parsed = toml::parse(text, path);
  const auto at = [&](const toml::source_region& region) { return fmt::format("{}:{}", path, region.begin.line); };
  if (!parsed) {
    return invalid_argument(fmt::format("{}: {}", at(parsed.error().source()), parsed.error().description()), "config");
  }
  for (const auto& [section, node] : parsed.table()) {
    const std::string section_name(section.str());
    const toml::table* keys = node.as_table();
    const bool known_section = std::any_of(setting_rows().begin(), setting_rows().end(),
                                           [&](const SettingRow& row) { return setting_section(row) == section_name; });
    if (keys == nullptr || !known_section) {
      const bool lone_key = keys == nullptr || keys->empty();
      const std::string path_of =
          lone_key ? section_name : fmt::format("{}.{}", section_name, std::string_view(keys->begin()->first.str()));
      return unknown_key(at(section.source()), path_of);
    }
    for (const auto& [key, value] : *keys) {
      const std::string name = fmt::format("{}.{}", section_name, std::string_view(key.str()));
      const auto row = std::find_if(setting_rows().begin(), setting_rows().end(),
                                    [&](const SettingRow& each) { return each.path == name && !each.secret; });
      if (row == setting_rows().end()) return unknown_key(at(key.source()), name);
      MOED_RETURN_IF_ERROR(set_from_toml(*row, at(key.source()), value, settings));
    }
  }
  return Status();
}

std::vector<std::string> split_commas(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    if (!part.empty()) parts.push_back(part);
  }
  return parts;
}

using Variables = std::map<std::string, std::string>;

// The MOED_* variables that are not empty.
Variables moed_variables(const char* const* environment) {
  Variables variables;
  for (; environment != nullptr && *environment != nullptr; ++environment) {
    const std::string_view entry = *environment;
    const size_t equals = entry.find('=');
    if (!entry.starts_with("MOED_") || equals == std::string_view::npos || equals + 1 == entry.size()) continue;
    variables.emplace(entry.substr(0, equals), entry.substr(equals + 1));
  }
  return variables;
}

Status apply_environment(const Variables& variables, LoadedSettings& loaded) {
  std::vector<std::string> known = {"MOED_CONFIG"};
  for (const SettingRow& row : setting_rows()) {
    known.push_back(setting_environment(row));
    const auto variable = variables.find(known.back());
    if (variable == variables.end()) continue;
    // Kubernetes sets MOED_HTTP_PORT to an address where a Service is named moed-http.
    if (setting_key(row).ends_with("_port") && variable->second.starts_with("tcp://")) {
      loaded.warnings.push_back(fmt::format("the environment variable {} is {}, no port, and is ignored",
                                            variable->first, variable->second.substr(0, 64)));
      continue;
    }
    Given given{known.back(), {variable->second}};
    if (std::holds_alternative<std::vector<std::string>*>(row.field(loaded.settings))) {
      given.texts = split_commas(variable->second);
    }
    MOED_RETURN_IF_ERROR(set_from_text(row, given, loaded.settings));
  }
  for (const auto& [name, value] : variables) {
    if (std::find(known.begin(), known.end(), name) != known.end()) continue;
    loaded.warnings.push_back(
        fmt::format("the environment variable {} is no setting and is ignored{}", name, suggestion(name, known)));
  }
  return Status();
}

struct Flags {
  std::map<std::string_view, Given> given;  // by a row's path
  std::string config;
  bool help = false;
  bool print_config = false;
};

Status check_no_extras(const std::vector<std::string>& extras) {
  if (extras.empty()) return Status();
  std::vector<std::string> known = {"--config", "--print-config", "--help"};
  for (const SettingRow& row : setting_rows()) {
    if (!row.secret) known.push_back(setting_flag(row));
  }
  const std::string name = extras.front().substr(0, extras.front().find('='));
  const std::string_view kind = name.starts_with("-") ? "flag" : "argument";
  return invalid_argument(fmt::format("unknown {} {}{}", kind, name, suggestion(name, known)), name);
}

StatusOr<Flags> read_flags(std::span<const std::string> args) {
  Flags flags;
  CLI::App app;
  app.set_help_flag();
  app.allow_extras();
  app.add_flag("-h,--help", flags.help);
  app.add_flag("--print-config", flags.print_config);
  app.add_option("--config", flags.config)->take_last();
  std::vector<std::pair<const SettingRow*, CLI::Option*>> options;
  Settings defaults;
  for (const SettingRow& row : setting_rows()) {
    if (row.secret) continue;
    const std::string flag = setting_flag(row);
    if (std::holds_alternative<bool*>(row.field(defaults))) {
      options.emplace_back(&row, app.add_flag(fmt::format("{},!--no-{}", flag, flag.substr(2)))->take_last());
    } else {
      options.emplace_back(&row, app.add_option(flag)->take_all());
    }
  }
  try {
    app.parse(std::vector<std::string>(args.rbegin(), args.rend()));
  } catch (const CLI::ParseError& error) {
    return invalid_argument(error.what());
  }
  MOED_RETURN_IF_ERROR(check_no_extras(app.remaining()));
  for (const auto& [row, option] : options) {
    if (option->count() > 0) flags.given[row->path] = {setting_flag(*row), option->results()};
  }
  return flags;
}

bool is_loopback(std::string_view host) {
  return host == "localhost" || host == "::1" || host == "[::1]" || host.starts_with("127.");
}

// What only a device with memory of its own can do.
Status check_device(const Settings& settings) {
  const auto refused = [](std::string path, const std::string& value, std::string_view instead) {
    return invalid_argument(
        fmt::format("{} is {}, but device.device is cpu, which has no memory of its own: {}", path, value, instead),
        path);
  };
  const Settings::Device& device = settings.device;
  if (device.device.starts_with("simulated")) {
    return invalid_argument(
        fmt::format("device.device is {}, but a simulated device computes nothing and cannot serve: use emulated",
                    device.device),
        "device.device");
  }
  const Settings::Placement& placement = settings.placement;
  const double device_kv_gib = settings.memory.device_kv_gib;
  if (device_kv_gib != 0 && placement.kv != "device" && placement.kv != "split" && placement.policy != "device") {
    return invalid_argument(fmt::format("memory.device_kv_gib is {}, but placement.kv is {}: no KV lies on the device",
                                        device_kv_gib, placement.kv),
                            "memory.device_kv_gib");
  }
  if (device.device != "cpu") return Status();
  if (device.device_memory_gib != 0) {
    return refused("device.device_memory_gib", fmt::format("{}", device.device_memory_gib),
                   "leave it 0; memory.kv_gib bounds the KV cache");
  }
  if (placement.policy != "auto" && placement.policy != "host") {
    return refused("placement.policy", placement.policy, "use auto or host");
  }
  if (placement.kv != "auto" && placement.kv != "host")
    return refused("placement.kv", placement.kv, "use auto or host");
  if (!placement.resident_experts.empty()) return refused("placement.resident_experts", "set", "leave it out");
  if (placement.ring_slots != 0) {
    return refused("placement.ring_slots", fmt::format("{}", placement.ring_slots), "leave it 0");
  }
  return Status();
}

Status check_together(const Settings& settings) {
  if (settings.model.path.empty()) {
    return invalid_argument("no model: name the checkpoint's folder with --model, MOED_MODEL or model.path",
                            "model.path");
  }
  const Settings::Server& server = settings.server;
  if (!is_loopback(server.host) && server.api_key.empty() && server.api_key_file.empty() && !server.insecure) {
    return invalid_argument(
        fmt::format(
            "server.host is \"{}\", which others can reach: set MOED_API_KEY or --api-key-file, or allow it with "
            "--insecure",
            server.host),
        "server.host");
  }
  if (const Settings::Limits& limits = settings.limits; limits.reading_bytes_max < limits.body_bytes_max) {
    return invalid_argument(fmt::format("limits.reading_bytes_max is {}, less than limits.body_bytes_max, {}: no body "
                                        "of that size could be received",
                                        limits.reading_bytes_max, limits.body_bytes_max),
                            "limits.reading_bytes_max");
  }
  return check_device(settings);
}

// The file, the environment and the flags, one over the other.
Status apply_all(const Flags& flags, const Variables& variables, LoadedSettings& loaded) {
  loaded.config_file = flags.config;
  if (loaded.config_file.empty() && variables.contains("MOED_CONFIG")) loaded.config_file = variables.at("MOED_CONFIG");
  if (!loaded.config_file.empty()) MOED_RETURN_IF_ERROR(apply_file(loaded.config_file, loaded.settings));
  MOED_RETURN_IF_ERROR(apply_environment(variables, loaded));
  for (const SettingRow& row : setting_rows()) {
    const auto given = flags.given.find(row.path);
    if (given != flags.given.end()) MOED_RETURN_IF_ERROR(set_from_text(row, given->second, loaded.settings));
  }
  return Status();
}

}  // namespace

StatusOr<LoadedSettings> load_settings(std::span<const std::string> args, const char* const* environment) {
  LoadedSettings loaded;
  MOED_ASSIGN_OR_RETURN(const Flags flags, read_flags(args));
  const Variables variables = moed_variables(environment);
  loaded.help = flags.help;
  loaded.print_config = flags.print_config;
  if (loaded.help) return loaded;
  MOED_RETURN_IF_ERROR(apply_all(flags, variables, loaded));
  if (!loaded.print_config) MOED_RETURN_IF_ERROR(check_together(loaded.settings));
  return loaded;
}

StatusOr<HealthTarget> load_health_target(std::span<const std::string> args, const char* const* environment) {
  std::vector<std::string> renamed(args.begin(), args.end());
  for (std::string& arg : renamed) {
    if (arg == "--port" || arg.starts_with("--port=")) arg.replace(0, 6, "--http-port");
  }
  MOED_ASSIGN_OR_RETURN(const Flags flags, read_flags(renamed));
  for (const auto& [path, given] : flags.given) {
    if (path == "server.host" || path == "server.http_port") continue;
    return invalid_argument(fmt::format("{} is not a flag of moed health", given.source), std::string(path));
  }
  LoadedSettings loaded;
  MOED_RETURN_IF_ERROR(apply_all(flags, moed_variables(environment), loaded));
  const Settings::Server& server = loaded.settings.server;
  if (server.http_port == 0) {
    return invalid_argument("server.http_port is 0, any free port: name the daemon's with --http-port",
                            "server.http_port");
  }
  return HealthTarget{reached_at(server.host), server.http_port};
}

}  // namespace moed
