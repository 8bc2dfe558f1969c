#include "base/cgroup.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <optional>
#include <string_view>

namespace moed {
namespace {

// The process's group below the root: "" or "/a/b".
std::string own_path(const std::string& self) {
  constexpr std::string_view kVersion2 = "0::";
  std::ifstream file(self);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(kVersion2)) continue;
    std::string path = line.substr(kVersion2.size());
    // A group outside of what is mounted here: only the root can be read.
    if (!path.starts_with('/') || path.find("/..") != std::string::npos) return {};
    while (path.ends_with('/')) path.pop_back();
    return path;
  }
  return {};
}

// A file that holds one number; nothing when it is not there or says "max".
std::optional<int64_t> number_in(const std::string& path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (!(file >> value)) return std::nullopt;
  return value;
}

// The value of a key in a file of "key value" lines; 0 when it is not there.
int64_t keyed_number(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  for (int64_t value = 0; file >> name >> value;) {
    if (name == key) return value;
  }
  return 0;
}

void apply_cpu(const std::string& group, CgroupLimits* limits) {
  std::ifstream file(group + "/cpu.max");
  std::string quota;
  double period_us = 0;
  if (!(file >> quota >> period_us) || period_us <= 0) return;
  int64_t quota_us = 0;
  const auto [end, error] = std::from_chars(quota.data(), quota.data() + quota.size(), quota_us);
  if (error != std::errc() || quota_us <= 0) return;  // "max"
  limits->cpus = std::min(limits->cpus, static_cast<double>(quota_us) / period_us);
}

void apply_memory(const std::string& group, CgroupLimits* limits) {
  const std::optional<int64_t> limit = number_in(group + "/memory.max");
  if (!limit || *limit < 0) return;
  const int64_t used = std::max<int64_t>(0, number_in(group + "/memory.current").value_or(0));
  // File pages that nobody used lately go first when the group meets its limit: model files just read lie there.
  const int64_t cache = std::clamp<int64_t>(keyed_number(group + "/memory.stat", "inactive_file"), 0, used);
  limits->memory_headroom_bytes =
      std::min(limits->memory_headroom_bytes, std::max<int64_t>(0, *limit - (used - cache)));
}

}  // namespace

CgroupLimits cgroup_limits(const std::string& root, const std::string& self) {
  CgroupLimits limits;
  for (std::string path = own_path(self);; path.resize(path.rfind('/'))) {
    apply_cpu(root + path, &limits);
    apply_memory(root + path, &limits);
    if (path.empty()) return limits;
  }
}

}  // namespace moed
