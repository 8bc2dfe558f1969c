#include "kernels/simulated/router_source.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <numeric>
#include <optional>
#include <sstream>

#include "base/check.h"
#include "kernels/simulated/random.h"

namespace moed {
namespace {

constexpr double kExponentMax = 4.0;
constexpr int64_t kRowsMax = int64_t{1} << 40;
constexpr int32_t kTraceLayersMax = 1024;
constexpr int32_t kTraceExpertsMax = 1 << 16;

template <class T>
std::optional<T> parse(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

Status refused(std::string_view spec, const std::string& why) {
  return invalid_argument("router \"" + std::string(spec) + "\": " + why, "router");
}

}  // namespace

StatusOr<RouterSource> RouterSource::make(std::string_view spec, uint64_t seed) {
  RouterSource source;
  source.seed_ = seed;
  source.spec_ = spec.empty() ? "uniform" : std::string(spec);
  if (source.spec_ == "uniform") return source;
  const size_t colon = spec.find(':');
  const std::string_view kind = spec.substr(0, colon);
  std::string_view rest = colon == std::string_view::npos ? std::string_view() : spec.substr(colon + 1);
  if (kind == "trace") {
    MOED_RETURN_IF_ERROR(source.read_trace(std::string(rest)));
    return source;
  }
  if (kind != "zipf" && kind != "shift") {
    return refused(spec, "unknown; there are uniform, zipf:S, shift:S:ROWS and trace:FILE");
  }
  if (kind == "shift") {
    const size_t second = rest.find(':');
    const auto rows = parse<int64_t>(second == std::string_view::npos ? "" : rest.substr(second + 1));
    if (!rows.has_value() || *rows < 1 || *rows > kRowsMax) {
      return refused(spec, "must be shift:S:ROWS with ROWS from 1 to " + std::to_string(kRowsMax));
    }
    source.rows_per_order_ = *rows;
    rest = rest.substr(0, second);
  }
  const auto exponent = parse<double>(rest);
  if (!exponent.has_value() || !(*exponent >= 0.0 && *exponent <= kExponentMax)) {
    return refused(spec, "its exponent must be a number from 0 to 4");
  }
  source.exponent_ = *exponent;
  return source;
}

Status RouterSource::read_trace(const std::string& path) {
  std::ifstream file(path);
  if (!file) return Status(StatusCode::kNotFound, "router trace " + path + ": cannot read this file", "router");
  std::string line;
  for (int64_t number = 1; std::getline(file, line); ++number) {
    const std::string where = path + ":" + std::to_string(number) + ": ";
    std::istringstream words(line.substr(0, line.find('#')));
    std::vector<int32_t> row;
    for (std::string word; words >> word;) {
      const auto value = parse<int32_t>(word);
      const int32_t limit = row.empty() ? kTraceLayersMax : kTraceExpertsMax;
      if (!value.has_value() || *value < 0 || *value >= limit) {
        return invalid_argument(where + "\"" + word + "\" must be a number from 0 to " + std::to_string(limit - 1));
      }
      row.push_back(*value);
    }
    if (row.empty()) continue;
    const size_t cols = row.size() - 1;
    if (recorded_cols_ == 0) recorded_cols_ = cols;
    if (cols == 0 || cols != recorded_cols_) {
      return invalid_argument(where + std::to_string(cols) +
                              " experts; every row needs as many as the first, at least 1");
    }
    std::vector<int32_t> sorted(row.begin() + 1, row.end());
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
      return invalid_argument(where + "an expert is there twice");
    }
    if (layers_.size() <= static_cast<size_t>(row[0])) layers_.resize(row[0] + 1);
    std::vector<int32_t>& recorded = layers_[row[0]].recorded;
    recorded.insert(recorded.end(), row.begin() + 1, row.end());
  }
  if (recorded_cols_ == 0) return invalid_argument(path + ": no row is recorded in this router trace", "router");
  return {};
}

void RouterSource::shuffle(Layer& layer, int32_t num_experts) {
  layer.order.resize(num_experts);
  std::iota(layer.order.begin(), layer.order.end(), 0);
  for (int32_t i = num_experts - 1; i > 0; --i) {
    std::swap(layer.order[i], layer.order[next_random(layer.random) % static_cast<uint64_t>(i + 1)]);
  }
  layer.rows_left = rows_per_order_;
}

RouterSource::Layer& RouterSource::layer_at(int32_t layer, int32_t num_experts) {
  if (recorded_cols_ > 0) {
    MOED_CHECK(layer < static_cast<int32_t>(layers_.size()) && !layers_[layer].recorded.empty())
        << spec_ << " has no rows of MoE layer " << layer;
    return layers_[layer];
  }
  while (static_cast<int32_t>(layers_.size()) <= layer) {
    Layer& added = layers_.emplace_back();
    added.random = seed_ + 0x632be59bd9b4e019ULL * layers_.size();
    shuffle(added, num_experts);
  }
  if (static_cast<int32_t>(sums_.size()) != num_experts) {
    sums_.resize(num_experts);
    double sum = 0.0;
    for (int32_t rank = 0; rank < num_experts; ++rank) sums_[rank] = sum += std::pow(rank + 1.0, -exponent_);
  }
  return layers_[layer];
}

void RouterSource::draw(int32_t layer, int32_t num_experts, std::span<int32_t> chosen) {
  MOED_CHECK(static_cast<int64_t>(chosen.size()) <= num_experts) << chosen.size() << " of " << num_experts;
  Layer& state = layer_at(layer, num_experts);
  if (recorded_cols_ > 0) {
    MOED_CHECK(chosen.size() <= recorded_cols_) << spec_ << " holds " << recorded_cols_ << " experts a row";
    std::copy_n(state.recorded.begin() + static_cast<int64_t>(state.next), chosen.size(), chosen.begin());
    state.next = (state.next + recorded_cols_) % state.recorded.size();
    for (const int32_t expert : chosen) MOED_CHECK(expert < num_experts) << spec_ << " names expert " << expert;
    return;
  }
  MOED_CHECK(static_cast<int32_t>(state.order.size()) == num_experts) << "layers with other numbers of experts";
  for (size_t i = 0; i < chosen.size(); ++i) {
    const auto drawn = chosen.first(i);
    // Again until it is new: that is how a draw without replacement is distributed.
    do {
      const double point = next_uniform(state.random) * sums_.back();
      const auto rank = std::upper_bound(sums_.begin(), sums_.end() - 1, point) - sums_.begin();
      chosen[i] = state.order[rank];
    } while (std::find(drawn.begin(), drawn.end(), chosen[i]) != drawn.end());
  }
  if (rows_per_order_ > 0 && --state.rows_left == 0) shuffle(state, num_experts);
}

}  // namespace moed
