#include "base/cpu_places.h"

#include <sched.h>

#include <fstream>
#include <set>
#include <string>
#include <utility>

namespace moed {

std::vector<CpuPlace> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<CpuPlace> places;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return places;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &set)) continue;
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    CpuPlace place{.cpu = cpu, .package = 0, .core = cpu};
    if (int package = 0; std::ifstream(topology + "physical_package_id") >> package) place.package = package;
    if (int core = 0; std::ifstream(topology + "core_id") >> core) place.core = core;
    places.push_back(place);
  }
  return places;
}

std::vector<int> one_cpu_per_core(std::span<const CpuPlace> cpus) {
  std::set<std::pair<int, int>> cores;
  std::vector<int> first;
  for (const CpuPlace& place : cpus) {
    if (cores.emplace(place.package, place.core).second) first.push_back(place.cpu);
  }
  return first;
}

std::vector<int> pinned_cpus(std::span<const CpuPlace> cpus, int num_threads) {
  std::vector<int> first = one_cpu_per_core(cpus);
  if (static_cast<int>(first.size()) != num_threads) first.clear();
  return first;
}

}  // namespace moed
