#pragma once

#include <span>
#include <vector>

namespace moed {

// A logical CPU and the core it is a thread of.
struct CpuPlace {
  int cpu = 0;
  int package = 0;
  int core = 0;  // unique within its package
};

// The CPUs of the process's affinity mask, ascending, with the kernel's topology.
std::vector<CpuPlace> allowed_cpus();

// The first CPU of each (package, core), in the order of `cpus`: two threads of one core share its units and are no
// gain to kernels that keep them busy.
std::vector<int> one_cpu_per_core(std::span<const CpuPlace> cpus);

// Where num_threads compute threads are bound: CPU i for thread i, one a core. Empty when they are not as many as the
// cores: with fewer or more threads the kernel's balancing does better than a fixed choice, which other processes do
// not know of.
std::vector<int> pinned_cpus(std::span<const CpuPlace> cpus, int num_threads);

}  // namespace moed
