#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/cpu_places.h"
#include "base/status.h"

namespace moed {

// The nodes that have memory and one of these CPUs at least, ascending; empty where the kernel says nothing of nodes.
// Reads the files anew at each call. root: where it lists them.
std::vector<int> numa_nodes(std::span<const CpuPlace> cpus, const std::string& root = "/sys/devices/system/node");

// Pages of the range that nobody wrote yet will lie on these nodes in turn. data: at the beginning of a page. Errors:
// kUnimplemented with what the kernel says (in a container it may refuse without CAP_SYS_NICE); then a page lies where
// its first writer runs.
Status interleave(std::byte* data, int64_t bytes, std::span<const int> nodes);

}  // namespace moed
