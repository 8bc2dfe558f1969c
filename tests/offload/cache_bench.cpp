// Hits of the expert ring against Belady's optimum, on made-up traces or on one that was recorded.
//   cache_bench                 a table over Zipf exponents, batch sizes and shares of experts that are cached
//   cache_bench FILE EXPERTS    FILE has a line for each visit: layer, then the experts that its rows chose

#include <cstdio>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>

#include "tests/offload/cache_trace.h"

namespace moed {
namespace {

constexpr double kShares[] = {0.10, 0.25, 0.50};

void print_row(const std::string& name, const std::vector<Trace>& layers, int32_t num_experts, size_t period) {
  std::printf("| %s |", name.c_str());
  for (const double share : kShares) {
    const auto slots = std::max(1, static_cast<int32_t>(share * num_experts));
    const Hits hits = play(layers, num_experts, std::max(3, slots * static_cast<int32_t>(layers.size())), period);
    const auto part = [](int64_t some, int64_t all) { return static_cast<double>(some) / static_cast<double>(all); };
    std::printf(" %.3f | %.3f | %.3f | %.3f |", part(hits.ring, hits.wanted), part(hits.optimal, hits.wanted),
                part(hits.ring, hits.optimal), part(hits.fixed, hits.optimal));
  }
  std::printf("\n");
  std::fflush(stdout);
}

void print_head() {
  std::printf("| trace |");
  for (const double share : kShares) std::printf(" %.0f%%: ring | optimum | ring of it | fixed of it |", share * 100);
  std::printf("\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
}

void zipf_table() {
  print_head();
  for (const int32_t rows : {1, 16}) {
    for (const double exponent : {0.5, 0.8, 1.0, 1.2}) {
      std::vector<Trace> layers;
      for (int layer = 0; layer < 4; ++layer) {
        const ZipfTrace spec{.exponent = exponent, .batch_rows = rows, .shift_visits = 2000 / rows};
        layers.push_back(zipf_trace(spec, 100 + layer));
      }
      char name[64];
      std::snprintf(name, sizeof(name), "Zipf %.1f, %d row%s", exponent, rows, rows == 1 ? "" : "s");
      print_row(name, layers, 128, static_cast<size_t>(2000 / rows));
    }
  }
}

int recorded_table(const char* path, int32_t num_experts) {
  std::ifstream file(path);
  if (!file || num_experts < 1) {
    std::fprintf(stderr, "cache_bench: cannot read %s, or no number of experts\n", path);
    return 1;
  }
  std::map<int32_t, Trace> by_layer;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    int32_t layer = 0;
    if (!(words >> layer)) continue;
    std::set<int32_t> experts;
    for (int32_t expert = 0; words >> expert;) experts.insert(expert);
    by_layer[layer].emplace_back(experts.begin(), experts.end());
  }
  std::vector<Trace> layers;
  for (auto& [layer, trace] : by_layer) layers.push_back(std::move(trace));
  for (Trace& trace : layers) trace.resize(layers.back().size());
  if (layers.empty()) return 1;
  print_head();
  print_row("recorded", layers, num_experts, layers[0].size());
  return 0;
}

}  // namespace
}  // namespace moed

int main(int argc, char** argv) {
  if (argc == 3) return moed::recorded_table(argv[1], std::stoi(argv[2]));
  moed::zipf_table();
  return 0;
}
