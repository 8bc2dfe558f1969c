#pragma once

#include <cstdint>
#include <limits>
#include <string>

namespace moed {

// What cgroup v2 leaves to this process: the tightest of its own group and all groups above it.
struct CgroupLimits {
  double cpus = std::numeric_limits<double>::infinity();  // cpu.max: quota over period
  // memory.max less what is in use, page cache that the kernel would give up not counted; never negative. The largest
  // int64 where nothing limits it.
  int64_t memory_headroom_bytes = std::numeric_limits<int64_t>::max();
};

// Reads the files anew at each call; what is missing or unreadable limits nothing. root: where cgroup v2 is mounted;
// self: the file that names this process's group, as "0::/path".
CgroupLimits cgroup_limits(const std::string& root = "/sys/fs/cgroup", const std::string& self = "/proc/self/cgroup");

}  // namespace moed
