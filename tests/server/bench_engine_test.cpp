#include "server/bench_engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/support/temporary_folder.h"

namespace moed {
namespace {

using Json = nlohmann::json;

constexpr const char* kNothing[] = {nullptr};
constexpr const char* kH200 = "simulated:" MOED_SOURCE_DIR "/deploy/machines/h200.toml";
constexpr const char* kRtx4090 = "simulated:" MOED_SOURCE_DIR "/deploy/machines/rtx4090.toml";
constexpr const char* kA40 = "simulated:" MOED_SOURCE_DIR "/deploy/machines/a40.toml";

Json parsed(const std::string& path) {
  std::ifstream file(path);
  return Json::parse(file, nullptr, /*allow_exceptions=*/false);
}

// The figures of a run; null when it failed.
Json bench(std::vector<std::string> args, const std::string& device = kA40) {
  const TemporaryFolder folder;
  const std::string path = folder.file("figures.json");
  args.insert(args.end(), {"--device", device, "--json", path, "--log-level", "error"});
  testing::internal::CaptureStdout();
  const int code = bench_engine(args, kNothing);
  const std::string text = testing::internal::GetCapturedStdout();
  if (code != 0) return nullptr;
  const Json json = parsed(path);
  // No figure of a simulated device goes without the word.
  if (json["simulated"].get<bool>()) {
    EXPECT_EQ(text.find("simulated: "), 0U) << text;
    EXPECT_NE(text.find("simulated run: "), std::string::npos) << text;
    EXPECT_NE(text.find("simulated steady: "), std::string::npos) << text;
    EXPECT_NE(text.find("simulated first token: "), std::string::npos) << text;
  }
  return json;
}

std::vector<std::string> olmoe(std::vector<std::string> more) {
  std::vector<std::string> args{"--shape",    "olmoe-1b-7b", "--layers", "3",  "--clients", "4",
                                "--requests", "12",          "--prompt", "40", "--new",     "10"};
  args.insert(args.end(), more.begin(), more.end());
  return args;
}

TEST(BenchEngine, EveryPolicyServesEveryRequest) {
  for (const char* policy : {"host", "device", "stream", "hot"}) {
    for (const char* halves : {"1", "2"}) {
      for (const char* kv : {"host", "device", "split"}) {
        const Json json = bench(olmoe({"--policy", policy, "--halves", halves, "--kv", kv}));
        ASSERT_TRUE(json.is_object()) << policy << " " << halves << " " << kv;
        EXPECT_EQ(json["run"]["prompt_tokens"], 12 * 40);
        EXPECT_EQ(json["run"]["new_tokens"], 12 * 10);
        EXPECT_EQ(json["policy"], policy);
        EXPECT_EQ(json["kv"], kv);
        // Each row of a layer asks for 8 experts; a request's last token is no row.
        const int64_t expert_rows =
            json["run"]["experts"]["device_rows"].get<int64_t>() + json["run"]["experts"]["host_rows"].get<int64_t>();
        EXPECT_EQ(expert_rows, int64_t{12} * (40 + 9) * 3 * 8) << policy << " " << halves << " " << kv;
        EXPECT_EQ(json["run"]["rows"], 12 * (40 + 9));
        for (const auto& [name, share] : json["run"]["busy"].items()) {
          EXPECT_GE(share.get<double>(), 0.0) << name;
          EXPECT_LE(share.get<double>(), 1.0 + 1e-9) << name;
        }
      }
    }
  }
}

TEST(BenchEngine, TheSameSeedGivesTheSameFigures) {
  const std::vector<std::string> args =
      olmoe({"--policy", "hot", "--device-memory-gib", "1.2", "--router", "zipf:1.0"});
  std::vector<std::string> seeded = args;
  seeded.insert(seeded.end(), {"--seed", "1"});
  const Json first = bench(args);
  ASSERT_TRUE(first.is_object());
  EXPECT_EQ(first, bench(args));
  EXPECT_NE(first["run"]["seconds"], bench(seeded)["run"]["seconds"]);
}

// All experts of all layers come in each pass: bytes over the link, and at 19.5 GB/s the time, are known.
TEST(BenchEngine, StreamingTakesTheTimeOfItsBytes) {
  const Json json = bench({"--shape", "mixtral-8x7b", "--layers", "4", "--clients", "8", "--prompt", "8", "--new", "20",
                           "--policy", "stream", "--ring-slots", "2", "--bulk-rows-min", "512"});
  ASSERT_TRUE(json.is_object());
  const Json& steady = json["steady"];
  const int64_t passes = steady["interactive_passes"].get<int64_t>();
  ASSERT_EQ(passes, 19);
  const double expert_bytes = 3.0 * 4096 * 14336 * 2;
  const double least_s = static_cast<double>(passes) * 4 * 8 * expert_bytes / 19.5e9;
  EXPECT_NEAR(steady["bytes"]["experts_copied"].get<double>() / (static_cast<double>(passes) * 4 * 8 * expert_bytes),
              1.0, 0.02);
  EXPECT_GT(steady["seconds"].get<double>(), 0.96 * least_s);  // jitter and drift work both ways
  EXPECT_LT(steady["seconds"].get<double>(), 1.10 * least_s);
  EXPECT_GT(steady["busy"]["copies_up"].get<double>(), 0.9);
}

// One expert of Mixtral takes the host milliseconds, in which some hundred packets are to be fed.
TEST(BenchEngine, CopiesRunBesideLargeExpertsOfTheHost) {
  const Json json = bench({"--shape", "mixtral-8x7b", "--layers", "4", "--policy", "hot", "--kv", "host",
                           "--ring-slots", "6", "--clients", "64", "--prompt", "16", "--new", "12"},
                          kRtx4090);
  ASSERT_TRUE(json.is_object());
  const Json& steady = json["steady"];
  EXPECT_GT(steady["bound"]["reached"].get<double>(), 0.8);
  EXPECT_LT(steady["busy"]["waits_for_ring"].get<double>(), 0.1);
}

// Experts that stay are at least as fast as streaming without reuse, which two slots make sure of.
TEST(BenchEngine, ACacheNeverLoses) {
  for (const char* router : {"uniform", "zipf:1.0", "shift:1.0:100"}) {
    const auto run = [&](const char* slots, const char* cache) {
      return bench({"--shape", "olmoe-1b-7b", "--layers", "4", "--policy", "hot", "--clients", "8", "--prompt", "16",
                    "--new", "40", "--router", router, "--ring-slots", slots, "--expert-cache", cache});
    };
    const auto rate = [](const Json& json) { return json["steady"]["new_tokens_per_s"].get<double>(); };
    const Json without = run("2", "0");
    ASSERT_TRUE(without.is_object());
    EXPECT_EQ(without["expert_cache"], false);
    auto hits_before = without["steady"]["experts"]["hits"].get<double>();
    for (const char* slots : {"8", "48", "128"}) {
      const Json with = run(slots, "1");
      ASSERT_TRUE(with.is_object());
      EXPECT_EQ(with["expert_cache"], true);
      EXPECT_GE(rate(with), 0.98 * rate(without)) << router << ", " << slots << " slots";
      const auto hits = with["steady"]["experts"]["hits"].get<double>();
      EXPECT_GT(hits, hits_before) << router << ", " << slots << " slots";
      hits_before = hits;
    }
  }
}

// Decode rows ride in the chunks of a long prompt, where chunks are as large as one sweep of the weights pays for: both
// are then nearly as fast as alone.
TEST(BenchEngine, ALongPromptCarriesTheOthers) {
  const auto run = [](const char* clients, const char* prompt, const char* tokens, std::vector<std::string> more) {
    std::vector<std::string> args{"--shape",  "mixtral-8x7b", "--layers", "8",         "--policy",
                                  "device",   "--kv",         "device",   "--clients", clients,
                                  "--prompt", prompt,         "--new",    tokens,      "--pass-rows-max"};
    args.insert(args.end(), more.begin(), more.end());
    return bench(args, kH200);
  };
  const Json prompt = run("1", "8192", "1", {"8192"});
  const Json decode = run("8", "64", "60", {"640"});
  const Json both = run("8", "64", "120", {"640", "--long-prompt", "8192"});
  ASSERT_TRUE(prompt.is_object() && decode.is_object() && both.is_object());
  EXPECT_LE(both["long_prompt_ms"].get<double>(), 1.3 * prompt["first_token"]["mean_ms"].get<double>());
  EXPECT_LE(both["token_beside_long"]["mean_ms"].get<double>(), 1.5 * decode["token"]["mean_ms"].get<double>());
}

// Where every pass streams the model, it takes as long as that, whoever rides.
TEST(BenchEngine, ALongPromptAndOthersShareASweepOfTheLink) {
  const auto run = [](std::vector<std::string> more) {
    std::vector<std::string> args{"--shape", "mixtral-8x7b",    "--layers", "4", "--policy", "stream", "--ring-slots",
                                  "6",       "--pass-rows-max", "4200"};
    args.insert(args.end(), more.begin(), more.end());
    return bench(args);
  };
  const Json prompt = run({"--clients", "1", "--prompt", "4096", "--new", "1"});
  const Json decode = run({"--clients", "8", "--prompt", "64", "--new", "40"});
  const Json both = run({"--clients", "8", "--prompt", "64", "--new", "60", "--long-prompt", "4096"});
  ASSERT_TRUE(prompt.is_object() && decode.is_object() && both.is_object());
  EXPECT_LE(both["long_prompt_ms"].get<double>(), 1.3 * prompt["first_token"]["mean_ms"].get<double>());
  EXPECT_LE(both["token_beside_long"]["mean_ms"].get<double>(), 1.5 * decode["token"]["mean_ms"].get<double>());
}

TEST(BenchEngine, ALongPromptIsMeasuredBesideTheOthers) {
  const Json json = bench({"--shape", "olmoe-1b-7b", "--layers", "2", "--clients", "4", "--prompt", "16", "--new", "60",
                           "--long-prompt", "2000", "--policy", "device"});
  ASSERT_TRUE(json.is_object());
  EXPECT_GT(json["long_prompt_ms"].get<double>(), 0.0);
  EXPECT_GT(json["token_beside_long"]["mean_ms"].get<double>(), json["token"]["median_ms"].get<double>() * 0.5);
  EXPECT_EQ(json["run"]["new_tokens"], 4 * 60);
  EXPECT_GT(json["run"]["bulk_passes"].get<int64_t>(), 0);
}

TEST(BenchEngine, TracesLanes) {
  const TemporaryFolder folder;
  const std::string path = folder.file("passes.trace");
  const Json json = bench({"--shape", "mixtral-8x7b", "--layers", "2", "--clients", "4", "--prompt", "8", "--new", "12",
                           "--policy", "stream", "--ring-slots", "4", "--trace", path, "--trace-passes", "3"});
  ASSERT_TRUE(json.is_object());
  const Json trace = parsed(path);
  ASSERT_TRUE(trace.is_object());
  std::map<std::string, int> spans;
  std::map<int, double> ends;
  for (const Json& event : trace["traceEvents"]) {
    if (event["ph"] != "X") continue;
    ++spans[event["name"].get<std::string>()];
    EXPECT_GE(event["dur"].get<double>(), 0.0);
    if (event["tid"] == 0) continue;
    // In a stream one thing follows the other.
    double& end = ends[event["tid"].get<int>()];
    EXPECT_GE(event["ts"].get<double>(), end - 0.01) << event.dump();
    end = event["ts"].get<double>() + event["dur"].get<double>();
  }
  EXPECT_EQ(spans["route"], 3 * 2);  // three passes of two layers
  EXPECT_GT(spans["copy"], 3 * 2 * 8);
  EXPECT_GT(spans["wait"], 0);
  EXPECT_EQ(ends.size(), 2U);
}

TEST(BenchEngine, RunsOnRealDevicesToo) {
  const Json json = bench({"--model", MOED_SOURCE_DIR "/tests/golden/mixtral", "--clients", "2", "--prompt", "6",
                           "--new", "4", "--threads", "1"},
                          "cpu");
  ASSERT_TRUE(json.is_object());
  EXPECT_EQ(json["simulated"], false);
  EXPECT_EQ(json["run"]["new_tokens"], 8);
  EXPECT_EQ(json["layers"], 2);  // the model's, without --layers
}

// Zero would say that nothing was copied.
TEST(BenchEngine, WhatADeviceDoesNotCountIsNull) {
  const Json json = bench({"--model", MOED_SOURCE_DIR "/tests/golden/mixtral", "--clients", "2", "--prompt", "6",
                           "--new", "4", "--threads", "1", "--policy", "stream", "--device-memory-gib", "0.1"},
                          "emulated");
  ASSERT_TRUE(json.is_object());
  for (const char* part : {"kernels", "copies_up", "copies_down", "host_ops"}) {
    EXPECT_TRUE(json["run"]["busy"][part].is_null()) << part;
  }
  EXPECT_TRUE(json["run"]["bytes"]["link_up"].is_null());
  EXPECT_GT(json["run"]["bytes"]["experts_copied"], 0);
  EXPECT_TRUE(json["pins"]["all_pinned"].get<bool>());
}

TEST(BenchEngine, RefusesByName) {
  const auto refused = [](const std::vector<std::string>& args, const std::string& said) {
    testing::internal::CaptureStderr();
    EXPECT_EQ(bench_engine(args, kNothing), 1);
    const std::string text = testing::internal::GetCapturedStderr();
    EXPECT_NE(text.find(said), std::string::npos) << text;
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1) << text;
  };
  const std::vector<std::string> good{"--shape", "olmoe-1b-7b", "--device", kA40, "--log-level", "error"};
  const auto with = [&](std::vector<std::string> more) {
    std::vector<std::string> args = good;
    args.insert(args.end(), more.begin(), more.end());
    return args;
  };
  refused({"--shape", "gpt-9", "--log-level", "error"}, "mixtral-8x7b");
  refused(with({"--clients", "0"}), "--clients is 0");
  refused(with({"--clients", "many"}), "--clients is many");
  refused(with({"--prompt", "-3"}), "--prompt is -3");
  refused(with({"--new", "0"}), "--new is 0");
  refused(with({"--layers", "17"}), "the model has 16");
  refused(with({"--router", "dice"}), "router \"dice\"");
  refused(with({"--prompt", "5000"}), "4096");
  refused(with({"--policy", "magic"}), "magic");
  refused(with({"--json"}), "--json needs a value");
  refused(with({"--json", "/nowhere/x.json", "--layers", "1", "--prompt", "4", "--new", "1", "--clients", "1"}),
          "/nowhere/x.json");
  refused({"--shape", "olmoe-1b-7b", "--device", "simulated:none.toml"}, "none.toml");
  refused({}, "model");
}

}  // namespace
}  // namespace moed
