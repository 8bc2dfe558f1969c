// Puts what tools/gpu_check.sh left in a folder into one report: report.json and report.txt. usage: gpu_report FOLDER
// Reads steps.txt ("NAME passed|failed|skipped SECONDS" a line), machine.txt, probe.json, and NAME.json of benches.
// Exits 1 when a step failed or there is none.

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "tests/gpu/decode_bound.h"

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

Json bench_entry(const std::string& name, const Json& bench, const Json& probe, std::string& text) {
  Json entry = {{"name", name}, {"bench", bench}};
  const Json& steady = bench.at("steady");
  const double passes = steady.at("interactive_passes").get<double>() + steady.at("bulk_passes").get<double>();
  const double rows = passes > 0.0 ? steady.at("rows").get<double>() / passes : 0.0;
  const double reached = steady.at("new_tokens_per_s").get<double>();
  text += "  " + name + ": " +
          format("%.1f new tokens/s, %.1f rows a pass, ring wait %.1f%%", reached, rows,
                 100.0 * steady.at("busy").at("waits_for_ring").get<double>());
  entry["bound"] = probe.is_object() ? decode_bound(bench, probe, rows) : Json(nullptr);
  if (entry["bound"].is_object()) {
    const double most = entry["bound"].at("new_tokens_per_s").get<double>();
    entry["share_of_bound"] = most > 0.0 ? reached / most : 0.0;
    text += format("; bound %.1f, reached %.0f%%", most, most > 0.0 ? 100.0 * reached / most : 0.0) + " (" +
            entry["bound"].at("what").get<std::string>() + ")";
  }
  text += "\n";
  return entry;
}

struct Step {
  std::string name;
  std::string result;
  double seconds = 0.0;
};

std::vector<Step> read_steps(const std::filesystem::path& folder) {
  std::vector<Step> steps;
  std::ifstream file(folder / "steps.txt");
  for (Step step; file >> step.name >> step.result >> step.seconds;) steps.push_back(step);
  return steps;
}

int write_report(const std::filesystem::path& folder) {
  Json report = {{"machine", text_of(folder / "machine.txt")}, {"steps", Json::array()}};
  std::string text = text_of(folder / "machine.txt") + "\nSteps\n";
  const std::vector<Step> steps = read_steps(folder);
  for (const Step& step : steps) {
    report["steps"].push_back({{"name", step.name}, {"result", step.result}, {"seconds", step.seconds}});
    text += "  " + step.name + ": " + step.result + format(" (%.0f s)\n", step.seconds);
  }
  const Json probe = Json::parse(text_of(folder / "probe.json"), nullptr, false);
  report["probe"] = probe.is_object() ? probe : Json(nullptr);
  if (probe.is_object()) text += "\nRates\n" + probe.dump(2) + "\n";
  report["benches"] = Json::array();
  text += "\nDecode, made-up weights, steady stretch\n";
  for (const Step& step : steps) {
    if (!step.name.starts_with("bench-")) continue;
    const Json bench = Json::parse(text_of(folder / (step.name + ".json")), nullptr, false);
    if (bench.is_object()) report["benches"].push_back(bench_entry(step.name.substr(6), bench, probe, text));
  }
  std::string counts;
  for (const char* result : {"passed", "failed", "skipped"}) {
    report[result] = std::count_if(steps.begin(), steps.end(), [&](const Step& step) { return step.result == result; });
    counts += (counts.empty() ? "" : ", ") + report[result].dump() + " " + result;
  }
  text += "\n" + counts + "\n";
  std::ofstream(folder / "report.json") << report.dump(2) << "\n";
  std::ofstream(folder / "report.txt") << text;
  std::fputs(text.c_str(), stdout);
  return report["failed"] > 0 || report["passed"] == 0 ? 1 : 0;
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
