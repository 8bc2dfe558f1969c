#include "server/settings.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "server/settings_table.h"
#include "tests/support/temporary_folder.h"

namespace moed {
namespace {

using Strings = std::vector<std::string>;

StatusOr<LoadedSettings> load(const Strings& args, const Strings& environment = {}) {
  std::vector<const char*> pointers;
  for (const std::string& entry : environment) pointers.push_back(entry.c_str());
  pointers.push_back(nullptr);
  return load_settings(args, pointers.data());
}

Settings load_ok(const Strings& args, const Strings& environment = {}) {
  auto loaded = load(args, environment);
  EXPECT_TRUE(loaded.ok()) << loaded.status().message();
  return loaded.ok() ? loaded->settings : Settings();
}

void expect_error(const StatusOr<LoadedSettings>& loaded, const Strings& parts) {
  ASSERT_FALSE(loaded.ok());
  EXPECT_EQ(loaded.status().code(), StatusCode::kInvalidArgument);
  for (const std::string& part : parts) {
    EXPECT_NE(loaded.status().message().find(part), std::string::npos)
        << loaded.status().message() << "\nlacks " << part;
  }
}

class SettingsFileTest : public testing::Test {
 protected:
  StatusOr<LoadedSettings> load_file(const std::string& content) {
    return load({"--model", "m", "--config", folder_.write("moed.toml", content)});
  }
  TemporaryFolder folder_;
};

TEST(SettingsTest, DefaultsServeOnLoopback) {
  const Settings settings = load_ok({"--model", "/m"});
  EXPECT_EQ(settings.model.path, "/m");
  EXPECT_EQ(settings.server.host, "127.0.0.1");
  EXPECT_EQ(settings.server.http_port, 8000);
  EXPECT_EQ(settings.server.grpc_port, 50051);
  EXPECT_EQ(settings.scheduler.bulk_rows_min, 64);
  EXPECT_TRUE(settings.memory.prefix_cache);
}

TEST(SettingsTest, FlagsOfEveryType) {
  const Settings settings =
      load_ok({"--model=/m", "--http-port", "0", "--kv-gib=1.5", "--deterministic", "--no-prefix-cache",
               "--insecure=false", "--served-model-name", "a,b", "--served-model-name", "org/c", "--queue-max", "1",
               "--queue-max", "2", "--log-level", "debug"});
  EXPECT_EQ(settings.server.http_port, 0);
  EXPECT_EQ(settings.memory.kv_gib, 1.5);
  EXPECT_TRUE(settings.device.deterministic);
  EXPECT_FALSE(settings.memory.prefix_cache);
  EXPECT_FALSE(settings.server.insecure);
  EXPECT_EQ(settings.model.served_model_name, (Strings{"a,b", "org/c"}));
  EXPECT_EQ(settings.scheduler.queue_max, 2);
  EXPECT_EQ(settings.server.log_level, "debug");
}

TEST(SettingsTest, EnvironmentOfEveryType) {
  const Settings settings = load_ok(
      {}, {"MOED_MODEL=/m", "MOED_HTTP_PORT=81", "MOED_KV_GIB=2", "MOED_DETERMINISTIC=true", "MOED_PREFIX_CACHE=0",
           "MOED_SERVED_MODEL_NAME=a,b", "MOED_API_KEY=k", "MOED_QUEUE_MAX=", "PATH=/bin", "MOED_LOG_LEVEL=warn"});
  EXPECT_EQ(settings.model.path, "/m");
  EXPECT_EQ(settings.server.http_port, 81);
  EXPECT_EQ(settings.memory.kv_gib, 2.0);
  EXPECT_TRUE(settings.device.deterministic);
  EXPECT_FALSE(settings.memory.prefix_cache);
  EXPECT_EQ(settings.model.served_model_name, (Strings{"a", "b"}));
  EXPECT_EQ(settings.server.api_key, "k");
  EXPECT_EQ(settings.scheduler.queue_max, 1024);
  EXPECT_EQ(settings.server.log_level, "warn");
}

TEST_F(SettingsFileTest, FlagsWinOverEnvironmentOverFileOverDefaults) {
  const std::string path =
      folder_.write("moed.toml", "[scheduler]\nqueue_max = 10\nsequences_max = 11\npass_rows_max = 12\n");
  const Settings settings =
      load_ok({"--model", "m", "--config", path, "--queue-max", "30"}, {"MOED_QUEUE_MAX=20", "MOED_SEQUENCES_MAX=21"});
  EXPECT_EQ(settings.scheduler.queue_max, 30);
  EXPECT_EQ(settings.scheduler.sequences_max, 21);
  EXPECT_EQ(settings.scheduler.pass_rows_max, 12);
  EXPECT_EQ(settings.scheduler.bulk_rows_min, 64);
  EXPECT_EQ(load_ok({"--model", "m"}, {"MOED_CONFIG=" + path}).scheduler.queue_max, 10);
}

TEST_F(SettingsFileTest, EveryTypeInAFile) {
  auto loaded = load_file(
      "[model]\nserved_model_name = [\"a\", \"b\"]\n[server]\ncors_origin = \"https://x\"\nlog_json = true\n"
      "[memory]\nkv_gib = 3\n[limits]\nheader_seconds = 2.5\n");
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(loaded->settings.model.served_model_name, (Strings{"a", "b"}));
  EXPECT_EQ(loaded->settings.server.cors_origin, (Strings{"https://x"}));
  EXPECT_TRUE(loaded->settings.server.log_json);
  EXPECT_EQ(loaded->settings.memory.kv_gib, 3.0);
  EXPECT_EQ(loaded->settings.limits.header_seconds, 2.5);
}

TEST_F(SettingsFileTest, UnknownKeysSuggestTheNearest) {
  expect_error(load_file("[scheduler]\nqueue_max = 1\nsequence_max = 3\n"),
               {"moed.toml:3", "unknown key scheduler.sequence_max", "did you mean scheduler.sequences_max?"});
  expect_error(load_file("[scheduler]\nkv_gib = 1\n"), {"scheduler.kv_gib", "did you mean memory.kv_gib?"});
  expect_error(load_file("[sheduler]\nqueue_max = 1\n"), {"moed.toml:1", "did you mean scheduler.queue_max?"});
  expect_error(load_file("http_port = 1\n"), {"unknown key http_port", "did you mean server.http_port?"});
  expect_error(load_file("[server]\napi_key = \"k\"\n"), {"unknown key server.api_key"});
  expect_error(load_file("[zzzzzzzz]\nqqqqqqqqqqqqq = 1\n"), {"unknown key zzzzzzzz.qqqqqqqqqqqqq"});
}

TEST_F(SettingsFileTest, WrongTypesAndRangesNameKeyLineAndLimit) {
  const Strings ports = {"moed.toml:2", "server.http_port", "an integer from 0 to 65535"};
  for (const char* value : {"-1", "65536", "1.5", "\"80\"", "true", "[1]", "{}", "99999999999", "1979-05-27"}) {
    SCOPED_TRACE(value);
    expect_error(load_file("[server]\nhttp_port = " + std::string(value) + "\n"), ports);
  }
  expect_error(load_file("[server]\nlog_json = 1\n"), {"server.log_json", "true or false"});
  expect_error(load_file("[server]\nlog_level = \"loud\"\n"),
               {"server.log_level", "trace, debug, info, warn or error"});
  expect_error(load_file("[server]\nlog_level = \"debug|info\"\n"), {"server.log_level"});
  expect_error(load_file("[memory]\nkv_gib = nan\n"), {"memory.kv_gib", "a number from 0 to 65536"});
  expect_error(load_file("[memory]\nkv_gib = inf\n"), {"memory.kv_gib"});
  expect_error(load_file("[model]\nserved_model_name = [1]\n"), {"model.served_model_name", "a list of strings"});
  expect_error(load_file("[server]\nhttp_port = \n"), {"moed.toml:2"});
  expect_error(load_file("server = 3\n"), {"moed.toml:1", "server"});
  // Letters where a key or a space may stand: what toml++ alone does with them is undefined (asan preset).
  for (const char* letter : {"\u00e9", "\u0434", "\u3001", "\ufdfa"}) {
    expect_error(load_file(std::string("[server]\n") + letter + "http_port = 1\n"), {"moed.toml:2"});
    expect_error(load_file(std::string("[server]\nhttp_port") + letter + " = 1\n"), {"moed.toml:2"});
  }
}

TEST_F(SettingsFileTest, FilesThatCannotBeRead) {
  expect_error(load({"--model", "m", "--config", folder_.file("none.toml")}), {"none.toml", "cannot be read"});
  expect_error(load({"--model", "m", "--config", folder_.path()}), {folder_.path(), "cannot be read"});
  expect_error(load_file(std::string(2 << 20, '#')), {"larger than 1 MiB"});
  expect_error(load_file(std::string(100'000, '[')), {"moed.toml:1"});
}

TEST(SettingsTest, BadFlagsAndVariables) {
  expect_error(load({"--model", "m", "--http-prt", "1"}), {"unknown flag --http-prt", "did you mean --http-port?"});
  expect_error(load({"--model", "m", "--queue_max=1"}), {"unknown flag --queue_max", "did you mean --queue-max?"});
  expect_error(load({"--model", "m", "stray"}), {"unknown argument stray"});
  expect_error(load({"--model"}), {"--model"});
  expect_error(load({"--model", "m", "--api-key", "k"}), {"unknown flag --api-key"});
  for (const char* value : {"-1", "65536", "80x", " 80", "1e3", "0x50"}) {
    SCOPED_TRACE(value);
    expect_error(load({"--model", "m", std::string("--http-port=") + value}), {"--http-port", "65535"});
  }
  expect_error(load({"--model", "m", "--http-port="}), {"--http-port"});
  expect_error(load({"--model", "m", "--http-port", "-3"}), {"--http-port", "\"-3\""});
  expect_error(load({"--model", "m", "--kv-gib", "nan"}), {"--kv-gib", "memory.kv_gib"});
  expect_error(load({"--model", "m"}, {"MOED_HTTP_PORT=http"}), {"MOED_HTTP_PORT", "server.http_port"});
  expect_error(load({"--model", "m"}, {"MOED_INSECURE=perhaps"}), {"MOED_INSECURE", "true or false"});
}

TEST(SettingsTest, UnknownVariablesWarn) {
  auto loaded = load({"--model", "m"}, {"MOED_PORT=tcp://10.0.0.1:80", "MOED_QUEU_MAX=3", "MOED_HTTP_PORT=1"});
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  ASSERT_EQ(loaded->warnings.size(), 2u);
  EXPECT_NE(loaded->warnings[0].find("MOED_PORT"), std::string::npos);
  EXPECT_NE(loaded->warnings[1].find("did you mean MOED_QUEUE_MAX?"), std::string::npos) << loaded->warnings[1];
}

// What Kubernetes sets where Services are named moed-http and moed-grpc.
TEST(SettingsTest, AddressesOfServicesAreNoPorts) {
  auto loaded = load({"--model", "m"}, {"MOED_HTTP_PORT=tcp://10.0.0.1:80", "MOED_GRPC_PORT=tcp://10.0.0.2:50051"});
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(loaded->settings.server.http_port, 8000);
  EXPECT_EQ(loaded->settings.server.grpc_port, 50051);
  ASSERT_EQ(loaded->warnings.size(), 2u);
  EXPECT_NE(loaded->warnings[0].find("MOED_HTTP_PORT is tcp://10.0.0.1:80"), std::string::npos) << loaded->warnings[0];
}

TEST(SettingsTest, WhatIsNeededTogether) {
  expect_error(load({}), {"--model"});
  expect_error(load({"--model", "m", "--host", "0.0.0.0"}), {"0.0.0.0", "--api-key-file", "--insecure"});
  EXPECT_TRUE(load({"--model", "m", "--host", "0.0.0.0", "--insecure"}).ok());
  EXPECT_TRUE(load({"--model", "m", "--host", "0.0.0.0"}, {"MOED_API_KEY=k"}).ok());
  EXPECT_TRUE(load({"--model", "m", "--host", "0.0.0.0", "--api-key-file", "f"}).ok());
  EXPECT_TRUE(load({"--model", "m", "--host", "::1"}).ok());
  expect_error(load({"--model", "m", "--reading-bytes-max", "2000000", "--body-bytes-max", "2000001"}),
               {"limits.reading_bytes_max is 2000000", "limits.body_bytes_max"});
  EXPECT_TRUE(load({"--model", "m", "--reading-bytes-max", "2000000", "--body-bytes-max", "2000000"}).ok());
  EXPECT_TRUE(load({"--help"}).ok());
  EXPECT_TRUE(load({"-h"})->help);
  EXPECT_TRUE(load({"--print-config"})->print_config);
}

TEST(SettingsTest, DeviceMemoryNeedsADeviceThatHasSome) {
  expect_error(load({"--model", "m", "--device", "cpu", "--device-memory-gib", "8"}),
               {"device.device_memory_gib", "cpu"});
  expect_error(load({"--model", "m", "--device", "cpu"}, {"MOED_DEVICE_MEMORY_GIB=8"}), {"device.device_memory_gib"});
  EXPECT_TRUE(load({"--model", "m", "--device-memory-gib", "0"}).ok());
  EXPECT_EQ(load_ok({"--model", "m", "--device", "cuda:0", "--device-memory-gib", "8"}).device.device_memory_gib, 8.0);
}

TEST(SettingsTest, PlacementNeedsADeviceThatHasMemory) {
  const auto with = [](Strings more) {
    more.insert(more.begin(), {"--model", "m"});
    return load(more);
  };
  expect_error(with({"--device", "cpu", "--policy", "hot"}),
               {"placement.policy is hot, but device.device is cpu", "auto or host"});
  expect_error(with({"--device", "cpu", "--kv", "split"}), {"placement.kv is split", "cpu"});
  expect_error(with({"--device", "cpu", "--resident-experts", "4"}), {"placement.resident_experts is set", "cpu"});
  expect_error(with({"--device", "cpu", "--ring-slots", "4"}), {"placement.ring_slots is 4", "cpu", "leave it 0"});
  expect_error(with({"--device", "emulated", "--device-kv-gib", "4"}),
               {"memory.device_kv_gib is 4, but placement.kv is auto"});
  expect_error(with({"--device", "simulated:f"}), {"device.device is simulated:f", "cannot serve"});
  EXPECT_TRUE(with({"--policy", "host", "--kv", "host", "--halves", "2"}).ok());
  EXPECT_TRUE(with({"--device", "emulated", "--policy", "device", "--device-kv-gib", "4"}).ok());
  const auto loaded =
      with({"--device", "emulated", "--policy", "stream", "--kv", "split", "--device-kv-gib", "0.5",
            "--resident-experts", "1:0-3", "--resident-experts", "2:7", "--ring-slots", "12", "--halves", "2"});
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(loaded->settings.placement.policy, "stream");
  EXPECT_EQ(loaded->settings.placement.kv, "split");
  EXPECT_EQ(loaded->settings.placement.resident_experts, (Strings{"1:0-3", "2:7"}));
  EXPECT_EQ(loaded->settings.placement.ring_slots, 12);
  EXPECT_EQ(loaded->settings.placement.halves, 2);
  EXPECT_EQ(loaded->settings.memory.device_kv_gib, 0.5);
}

TEST_F(SettingsFileTest, PlacementInAFile) {
  const auto loaded = load_file(
      "[device]\ndevice = \"emulated\"\n[placement]\npolicy = \"hot\"\nresident_experts = [\"0:1\", \"2:0-3\"]\n");
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(loaded->settings.placement.resident_experts, (Strings{"0:1", "2:0-3"}));
  expect_error(load_file("[placement]\npolicy = \"fast\"\n"),
               {"moed.toml:2", "placement.policy is 'fast'", "auto, host, device, stream or hot"});
  expect_error(load_file("[placement]\nkv = \"disk\"\n"), {"placement.kv is 'disk'", "auto, host, device or split"});
  expect_error(load_file("[placement]\nhalves = 3\n"), {"placement.halves is 3", "an integer from 1 to 2"});
  expect_error(load_file("[placement]\nring_slots = -1\n"), {"placement.ring_slots is -1", "from 0 to 16777216"});
}

StatusOr<HealthTarget> health_target(const Strings& args, const Strings& environment = {}) {
  std::vector<const char*> pointers;
  for (const std::string& entry : environment) pointers.push_back(entry.c_str());
  pointers.push_back(nullptr);
  return load_health_target(args, pointers.data());
}

std::string health_address(const Strings& args, const Strings& environment = {}) {
  const auto target = health_target(args, environment);
  return target.ok() ? target->host + " " + std::to_string(target->port) : target.status().message();
}

TEST_F(SettingsFileTest, HealthAsksWhereTheSettingsSay) {
  EXPECT_EQ(health_address({}), "127.0.0.1 8000");
  const std::string path =
      folder_.write("moed.toml", "[server]\nhost = \"10.1.2.3\"\nhttp_port = 81\n[model]\npath = \"m\"\n");
  EXPECT_EQ(health_address({"--config", path}), "10.1.2.3 81");
  EXPECT_EQ(health_address({}, {"MOED_CONFIG=" + path, "MOED_HTTP_PORT=82"}), "10.1.2.3 82");
  EXPECT_EQ(health_address({"--http-port", "83", "--host", "h"}, {"MOED_HTTP_PORT=82"}), "h 83");
  EXPECT_EQ(health_address({"--port", "84"}), "127.0.0.1 84");
  EXPECT_EQ(health_address({"--port=85"}), "127.0.0.1 85");
  // Every address: reached on loopback, with no key asked for.
  EXPECT_EQ(health_address({}, {"MOED_HOST=0.0.0.0"}), "127.0.0.1 8000");
  EXPECT_EQ(health_address({"--host", "::"}), "::1 8000");
  EXPECT_EQ(health_address({"--host", "[::1]"}), "::1 8000");
}

TEST(SettingsTest, HealthRefusesWhatItCannotUse) {
  EXPECT_NE(health_address({"--http-port", "0"}).find("any free port"), std::string::npos);
  EXPECT_NE(health_address({"--http-port", "x"}).find("65535"), std::string::npos);
  EXPECT_NE(health_address({"--htp-port", "1"}).find("did you mean --http-port?"), std::string::npos);
  EXPECT_NE(health_address({"--kv-gib", "1"}).find("--kv-gib is not a flag of moed health"), std::string::npos);
}

TEST_F(SettingsFileTest, PrintedConfigReadsBack) {
  const Settings settings =
      load_ok({"--model", "/a \"b\"\\c", "--served-model-name", "ü", "--served-model-name", "y\n", "--kv-gib", "0.1",
               "--drain-seconds", "3600", "--no-prefix-cache", "--template-fuel", "123456789"},
              {"MOED_API_KEY=topsecret"});
  const std::string printed = settings_toml(settings);
  EXPECT_EQ(printed.find("topsecret"), std::string::npos);
  auto again = load({"--config", folder_.write("moed.toml", printed)});
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(settings_toml(again->settings), printed);
  EXPECT_EQ(again->settings.model.path, "/a \"b\"\\c");
  EXPECT_EQ(again->settings.model.served_model_name, (Strings{"ü", "y\n"}));
  EXPECT_EQ(again->settings.limits.template_fuel, 123456789);
}

TEST(SettingsTest, JsonHoldsEveryFieldButSecrets) {
  Settings settings;
  settings.server.api_key = "topsecret";
  const auto json = nlohmann::json::parse(settings_json(settings));
  EXPECT_EQ(json["limits"]["n_max"], 64);
  EXPECT_EQ(json["memory"]["prefix_cache"], true);
  EXPECT_EQ(json.dump().find("topsecret"), std::string::npos);
}

TEST(SettingsTest, TheTableIsSound) {
  std::set<std::string> flags, variables;
  Settings defaults;
  for (const SettingRow& row : setting_rows()) {
    SCOPED_TRACE(row.path);
    EXPECT_TRUE(flags.insert(setting_flag(row)).second);
    EXPECT_TRUE(variables.insert(setting_environment(row)).second);
    EXPECT_FALSE(row.help.empty());
    const SettingField field = row.field(defaults);
    if (const auto* value = std::get_if<int64_t*>(&field)) {
      EXPECT_TRUE(static_cast<double>(**value) >= row.min && static_cast<double>(**value) <= row.max);
    }
    if (const auto* value = std::get_if<double*>(&field)) {
      EXPECT_TRUE(**value >= row.min && **value <= row.max);
    }
    if (!row.secret) {
      EXPECT_NE(settings_help().find(setting_flag(row)), std::string::npos);
    }
  }
  // Each field of the struct has its row: two rows on one field would leave another without.
  std::set<const void*> addresses;
  for (const SettingRow& row : setting_rows()) {
    std::visit([&](auto* address) { EXPECT_TRUE(addresses.insert(address).second) << row.path; }, row.field(defaults));
  }
  std::ifstream header(std::string(MOED_SOURCE_DIR) + "/server/settings.h");
  size_t num_fields = 0;
  for (std::string line; std::getline(header, line);) {
    for (const char* type : {"std::string ", "std::vector<std::string> ", "int64_t ", "double ", "bool "}) {
      num_fields += line.starts_with("    " + std::string(type)) ? 1 : 0;
    }
  }
  EXPECT_EQ(num_fields, setting_rows().size());
}

TEST(SettingsTest, DocsAreWhatTheTableSays) {
  std::ifstream file(std::string(MOED_SOURCE_DIR) + "/docs/CONFIG.md");
  std::ostringstream text;
  text << file.rdbuf();
  EXPECT_TRUE(text.str() == settings_markdown()) << "write it anew: moed docs-config > docs/CONFIG.md";
}

TEST(SettingsTest, ExamplesHoldOnlyKnownKeys) {
  int num_files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(std::string(MOED_SOURCE_DIR) + "/deploy/config")) {
    if (entry.path().extension() != ".toml") continue;
    ++num_files;
    const auto loaded = load({"--model", "m", "--config", entry.path().string()});
    EXPECT_TRUE(loaded.ok()) << loaded.status().message();
  }
  EXPECT_GE(num_files, 4);
}

}  // namespace
}  // namespace moed
