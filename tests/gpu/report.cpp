// Puts what tools/gpu_check.sh left in a folder into one report: report.json and report.txt. usage: gpu_report FOLDER
// Reads steps.txt ("NAME passed|failed|skipped SECONDS" a line), machine.txt, probe.json, bench-*.json. Exits 1 when a
// step failed or there is none.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "plan/memory_budget.h"
#include "server/model_shapes.h"

namespace moed {
namespace {

using Json = nlohmann::ordered_json;

std::string text_of(const std::filesystem::path& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

std::string format(const char* pattern, double a, double b = 0.0, double c = 0.0) {
  char text[256];
  std::snprintf(text, sizeof(text), pattern, a, b, c);
  return text;
}

// The least time of a pass of `rows` decoded rows whose missing experts are copied, at the rates that the probe found:
// - the link carries the experts that rows want and that the slots cannot hold, however well they are kept: of the
//   experts of all layers that a uniform router's choices name, those beyond the number of slots;
// - the device reads the dense weights and the named experts once.
// What takes longer is the bound.
Json bound(const Json& bench, const Json& probe, double rows) {
  StatusOr<Model> model = model_of_shape(bench.at("model").get<std::string>());
  if (!model.ok() || rows <= 0.0) return nullptr;
  ModelConfig config = model->config;
  config.num_layers = bench.at("layers").get<int32_t>();
  config.layers.resize(config.num_layers);
  const MoeConfig& moe = config.moe;
  const double miss = std::pow(1.0 - static_cast<double>(moe.router.top_k) / moe.num_experts, rows);
  const double named = (1.0 - miss) * static_cast<double>(num_routed_experts(config));
  const double expert_gb = 6e-9 * moe.intermediate_size * config.hidden_size;
  const double copied = std::max(0.0, named - bench.at("expert_slots").get<double>());
  const double link_s = copied * expert_gb / probe.at("copy_up_gb_per_s").get<double>();
  const double device_s =
      1e-9 * static_cast<double>(dense_weight_bytes(config)) / probe.at("linear_16_rows_gb_per_s").get<double>() +
      named * expert_gb / probe.at("experts_2_rows_gb_per_s").get<double>();
  const double pass_s = std::max(link_s, device_s);
  return {{"what", link_s >= device_s ? "link" : "device"},
          {"link_ms", 1e3 * link_s},
          {"device_ms", 1e3 * device_s},
          {"experts_copied_gb_a_pass", copied * expert_gb},
          {"new_tokens_per_s", pass_s > 0.0 ? rows / pass_s : 0.0}};
}

Json bench_entry(const std::string& name, const Json& bench, const Json& probe, std::string& text) {
  Json entry = {{"name", name}, {"bench", bench}};
  const Json& steady = bench.at("steady");
  const double passes = steady.at("interactive_passes").get<double>() + steady.at("bulk_passes").get<double>();
  const double rows = passes > 0.0 ? steady.at("rows").get<double>() / passes : 0.0;
  const double reached = steady.at("new_tokens_per_s").get<double>();
  text += "  " + name + ": " +
          format("%.1f new tokens/s, %.1f rows a pass, ring wait %.1f%%", reached, rows,
                 100.0 * steady.at("busy").at("waits_for_ring").get<double>());
  // Where the host computes experts too, the link and the device alone bound nothing.
  const bool is_bound = bench.at("policy") == "stream" && probe.is_object() && !probe.at("tiny").get<bool>();
  entry["bound"] = is_bound ? bound(bench, probe, rows) : Json(nullptr);
  if (entry["bound"].is_object()) {
    const double most = entry["bound"].at("new_tokens_per_s").get<double>();
    entry["share_of_bound"] = most > 0.0 ? reached / most : 0.0;
    text += format("; bound %.1f, reached %.0f%%", most, most > 0.0 ? 100.0 * reached / most : 0.0) + " (" +
            entry["bound"].at("what").get<std::string>() + ")";
  }
  text += "\n";
  return entry;
}

int write_report(const std::filesystem::path& folder) {
  Json report = {{"machine", text_of(folder / "machine.txt")}, {"steps", Json::array()}};
  std::string text = text_of(folder / "machine.txt") + "\nSteps\n";
  int num_failed = 0, num_passed = 0;
  std::ifstream steps(folder / "steps.txt");
  std::string name, result;
  for (double seconds = 0.0; steps >> name >> result >> seconds;) {
    report["steps"].push_back({{"name", name}, {"result", result}, {"seconds", seconds}});
    text += "  " + name + ": " + result + format(" (%.0f s)\n", seconds);
    num_failed += result == "failed" ? 1 : 0;
    num_passed += result == "passed" ? 1 : 0;
  }
  const Json probe = Json::parse(text_of(folder / "probe.json"), nullptr, false);
  report["probe"] = probe.is_object() ? probe : Json(nullptr);
  if (probe.is_object()) text += "\nRates\n" + probe.dump(2) + "\n";
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  report["benches"] = Json::array();
  text += "\nDecode, made-up weights, steady stretch\n";
  for (const auto& file : files) {
    const std::string stem = file.stem().string();
    if (!stem.starts_with("bench-") || file.extension() != ".json") continue;
    const Json bench = Json::parse(text_of(file), nullptr, false);
    if (bench.is_object()) report["benches"].push_back(bench_entry(stem.substr(6), bench, probe, text));
  }
  text += format("\n%.0f passed, %.0f failed\n", num_passed, num_failed);
  report["passed"] = num_passed;
  report["failed"] = num_failed;
  std::ofstream(folder / "report.json") << report.dump(2) << "\n";
  std::ofstream(folder / "report.txt") << text;
  std::fputs(text.c_str(), stdout);
  return num_failed > 0 || num_passed == 0 ? 1 : 0;
}

}  // namespace
}  // namespace moed

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fputs("usage: gpu_report FOLDER\n", stderr);
    return 2;
  }
  return moed::write_report(argv[1]);
}
