#include "kernels/machine_file.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <set>

#include "base/toml.h"

namespace moed {
namespace {

constexpr size_t kFileBytesMax = 1 << 16;
constexpr size_t kPointsMax = 64;

// Limits far outside any machine of these years: what lies beyond is a slip of a unit or of a digit.
struct Limits {
  double min;
  double max;
};
constexpr Limits kGib{0.001, 65536.0};
constexpr Limits kGigabytesPerSecond{0.001, 100'000.0};
constexpr Limits kTeraflops{0.001, 100'000.0};
constexpr Limits kGigaflops{0.001, 10'000'000.0};
constexpr Limits kMicroseconds{0.0, 100'000.0};
constexpr Limits kPollMicroseconds{0.01, 100'000.0};  // above 0, or a host that polls never gets any further
constexpr Limits kRows{1.0, 4096.0};
constexpr Limits kNoise{0.0, 0.9};
constexpr Limits kSeconds{0.001, 1'000'000.0};

std::string shown(const toml::node& node) {
  if (const auto* value = node.as_floating_point()) return fmt::format("{}", value->get());
  if (const auto* value = node.as_integer()) return fmt::format("{}", value->get());
  if (const auto* value = node.as_string()) return fmt::format("\"{}\"", value->get());
  if (node.is_array()) return "a list";
  return node.is_table() ? "a table" : "no number";
}

// Reads one table; the first thing wrong is kept.
class Reader {
 public:
  Reader(const std::string& path, const toml::table* table, std::string prefix, Status& status)
      : path_(path), table_(table), prefix_(std::move(prefix)), status_(status) {}
  // What was never asked for has no place in the table.
  ~Reader() {
    if (table_ == nullptr) return;
    for (const auto& [key, node] : *table_) {
      const std::string name(key.str());
      if (!asked_.contains(name)) refuse(name, "unknown; known are: " + fmt::format("{}", fmt::join(asked_, ", ")));
    }
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  void number(const char* key, const Limits& limits, double* out) {
    if (const toml::node* node = find(key, true)) *out = checked(key, *node, limits);
  }
  // May be left out.
  void optional_number(const char* key, const Limits& limits, double* out) {
    if (const toml::node* node = find(key, false)) *out = checked(key, *node, limits);
  }
  const toml::table* table(const char* key, bool required) {
    const toml::node* node = find(key, required);
    if (node != nullptr && !node->is_table()) refuse(key, "is " + shown(*node) + ", but must be a table");
    return node == nullptr ? nullptr : node->as_table();
  }
  std::string text(const char* key, bool required) {
    const toml::node* node = find(key, required);
    if (node == nullptr) return {};
    if (const auto* value = node->as_string()) return value->get();
    refuse(key, "is " + shown(*node) + ", but must be a text");
    return {};
  }
  std::vector<double> numbers(const char* key, const Limits& limits) {
    std::vector<double> values;
    const toml::node* node = find(key, true);
    if (node == nullptr) return values;
    const toml::array* array = node->as_array();
    if (array == nullptr || array->size() < 2 || array->size() > kPointsMax) {
      refuse(key, fmt::format("must be a list of 2 to {} numbers", kPointsMax));
      return values;
    }
    for (const toml::node& element : *array) values.push_back(checked(key, element, limits));
    return values;
  }
  void refuse(const std::string& key, const std::string& what) {
    if (status_.ok()) {
      const std::string field = prefix_.empty() ? key : prefix_ + "." + key;
      status_ = invalid_argument(path_ + ": " + field + " " + what, field);
    }
  }

 private:
  const toml::node* find(const char* key, bool required) {
    asked_.insert(key);
    const toml::node* node = table_ == nullptr ? nullptr : table_->get(key);
    if (node == nullptr && required) refuse(key, "is missing");
    return node;
  }
  double checked(const char* key, const toml::node& node, const Limits& limits) {
    const std::optional<double> value = node.is_number() ? node.value<double>() : std::nullopt;
    // NaN fails both comparisons.
    if (value.has_value() && *value >= limits.min && *value <= limits.max) return *value;
    refuse(key, fmt::format("is {}, but must be a number from {} to {}", shown(node), limits.min, limits.max));
    return limits.min;
  }

  const std::string& path_;
  const toml::table* table_;
  const std::string prefix_;
  Status& status_;
  std::set<std::string> asked_;
};

void read_device(Reader reader, MachineDevice* device) {
  reader.number("memory_gib", kGib, &device->memory_gib);
  reader.number("bf16_tflops", kTeraflops, &device->bf16_tflops);
  reader.number("dram_gb_s", kGigabytesPerSecond, &device->dram_gb_s);
  reader.number("kernel_us", kMicroseconds, &device->kernel_us);
  reader.number("tile_rows", kRows, &device->tile_rows);
}

void read_host(Reader reader, MachineHost* host) {
  reader.number("memory_gib", kGib, &host->memory_gib);
  reader.number("dram_gb_s", kGigabytesPerSecond, &host->dram_gb_s);
  reader.number("bf16_gflops", kGigaflops, &host->bf16_gflops);
  reader.number("attention_gb_s", kGigabytesPerSecond, &host->attention_gb_s);
  reader.number("attention_gflops", kGigaflops, &host->attention_gflops);
  reader.number("fork_us", kMicroseconds, &host->fork_us);
}

void read_calls(Reader reader, MachineCalls* calls) {
  reader.number("launch_us", kMicroseconds, &calls->launch_us);
  reader.number("copy_us", kMicroseconds, &calls->copy_us);
  reader.number("event_us", kMicroseconds, &calls->event_us);
  reader.number("poll_us", kPollMicroseconds, &calls->poll_us);
  reader.number("wake_us", kMicroseconds, &calls->wake_us);
}

void read_curve(Reader reader, std::vector<InterferencePoint>* points) {
  const std::vector<double> dram = reader.numbers("dram_share", {0.0, 1.0});
  const std::vector<double> link = reader.numbers("link_share", {0.001, 1.0});
  if (dram.size() != link.size()) {
    reader.refuse("link_share", fmt::format("has {} numbers, but dram_share has {}", link.size(), dram.size()));
    return;
  }
  for (size_t i = 0; i < dram.size(); ++i) points->push_back({dram[i], link[i]});
  const bool ascends = std::adjacent_find(dram.begin(), dram.end(), std::greater_equal<>()) == dram.end();
  if (!dram.empty() && (!ascends || dram.front() != 0.0 || dram.back() != 1.0)) {
    reader.refuse("dram_share", "must ascend from 0 to 1");
  }
}

void read_machine(const std::string& path, const toml::table& root, MachineFile* machine, Status& status) {
  Reader top(path, &root, "", status);
  const auto part = [&](const char* key, bool required) { return Reader(path, top.table(key, required), key, status); };
  machine->name = top.text("name", true);
  read_device(part("device", true), &machine->device);
  {
    Reader link = part("link", true);
    link.number("h2d_gb_s", kGigabytesPerSecond, &machine->link.h2d_gb_s);
    link.number("d2h_gb_s", kGigabytesPerSecond, &machine->link.d2h_gb_s);
  }
  read_host(part("host", true), &machine->host);
  read_calls(part("calls", true), &machine->calls);
  read_curve(part("interference", true), &machine->interference);
  {
    Reader noise = part("noise", false);
    noise.optional_number("jitter", kNoise, &machine->noise.jitter);
    noise.optional_number("drift", kNoise, &machine->noise.drift);
    noise.optional_number("drift_period_s", kSeconds, &machine->noise.drift_period_s);
  }
  machine->faults = part("faults", false).text("inject", false);
  if (machine->host.attention_gb_s > machine->host.dram_gb_s) {
    top.refuse("host.attention_gb_s", "is above host.dram_gb_s");
  }
}

}  // namespace

double MachineFile::link_left(double dram_share) const {
  const double share = std::clamp(dram_share, 0.0, 1.0);
  for (size_t i = 1; i < interference.size(); ++i) {
    const InterferencePoint& begin = interference[i - 1];
    const InterferencePoint& end = interference[i];
    if (share > end.dram_share) continue;
    const double part = (share - begin.dram_share) / (end.dram_share - begin.dram_share);
    return begin.link_share + part * (end.link_share - begin.link_share);
  }
  return interference.empty() ? 1.0 : interference.back().link_share;
}

StatusOr<MachineFile> parse_machine_file(std::string_view text, const std::string& path) {
  const toml::parse_result parsed = toml::parse(text);
  if (!parsed) {
    return invalid_argument(
        fmt::format("{}:{}: {}", path, parsed.error().source().begin.line, std::string(parsed.error().description())));
  }
  MachineFile machine;
  Status status;
  read_machine(path, parsed.table(), &machine, status);
  if (!status.ok()) return status;
  return machine;
}

StatusOr<MachineFile> load_machine_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kFileBytesMax + 1, '\0');
  if (file) file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file && !file.eof()) return Status(StatusCode::kNotFound, path + ": cannot read this machine file", "device");
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.size() > kFileBytesMax) {
    return invalid_argument(fmt::format("{}: more than {} bytes; this is no machine file", path, kFileBytesMax));
  }
  return parse_machine_file(text, path);
}

}  // namespace moed
