#include "base/numa.h"

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <climits>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string_view>

namespace moed {
namespace {

// What the kernel may be built for.
constexpr int kNodesMax = 1024;
constexpr int kCpusMax = 1 << 16;

// The number that all of the text is; nothing where it is another text.
std::optional<int> number(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  return value;
}

// A file of ranges, "0-3,8": the numbers below max, ascending. Nothing when it is not there; what is no range is left
// out.
std::optional<std::vector<int>> list_in(const std::filesystem::path& path, int max) {
  std::ifstream file(path);
  std::string line;
  if (!file) return std::nullopt;
  std::getline(file, line);
  std::vector<int> found;
  for (std::string_view left = line; !left.empty();) {
    const std::string_view range = left.substr(0, left.find(','));
    left.remove_prefix(std::min(left.size(), range.size() + 1));
    const size_t dash = range.find('-');
    const std::optional<int> first = number(range.substr(0, dash));
    const std::optional<int> last = dash == std::string_view::npos ? first : number(range.substr(dash + 1));
    if (!first || !last) continue;
    for (int i = *first; i <= std::min(*last, max - 1); ++i) found.push_back(i);
  }
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace

std::vector<int> numa_nodes(std::span<const CpuPlace> cpus, const std::string& root) {
  const std::filesystem::path folder(root);
  std::vector<int> nodes;
  for (const int node : list_in(folder / "has_memory", kNodesMax).value_or(std::vector<int>())) {
    const auto own = list_in(folder / ("node" + std::to_string(node)) / "cpulist", kCpusMax);
    const bool allowed = own && std::any_of(cpus.begin(), cpus.end(), [&](const CpuPlace& place) {
                           return std::binary_search(own->begin(), own->end(), place.cpu);
                         });
    if (allowed) nodes.push_back(node);
  }
  return nodes;
}

Status interleave(std::byte* data, int64_t bytes, std::span<const int> nodes) {
  constexpr int kWordBits = sizeof(unsigned long) * CHAR_BIT;
  std::vector<unsigned long> mask(kNodesMax / kWordBits);
  for (const int node : nodes) mask[node / kWordBits] |= 1UL << node % kWordBits;
  // The kernel looks at one bit less than it is told.
  if (syscall(SYS_mbind, data, bytes, MPOL_INTERLEAVE, mask.data(), kNodesMax + 1UL, 0U) == 0) return {};
  return Status(StatusCode::kUnimplemented, std::string("mbind: ") + std::strerror(errno));
}

}  // namespace moed
