#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace moed {

// What a simulated router answers: a seeded stream of choices a layer. Kinds:
// - "uniform": each row chooses top_k different experts, all alike;
// - "zipf:S": expert number r of a random order (one a layer) has weight 1 / r^S; a row draws without replacement;
// - "shift:S:ROWS": the same, with another order after each ROWS rows of a layer: a hot set that moves;
// - "trace:FILE": what was recorded. A line is a row: its layer among the MoE layers, then its experts, best first,
//   separated by blanks; '#' begins a comment. A layer's rows come in the order of the file, again and again.
class RouterSource {
 public:
  // spec "": uniform. Errors: kInvalidArgument naming kind, number or file and line; kNotFound.
  static StatusOr<RouterSource> make(std::string_view spec, uint64_t seed);

  // The next row of the layer: fills `chosen` with different experts in [0, num_experts). REQUIRES: chosen.size() <=
  // num_experts. MOED_CHECK: a trace without this layer, with other experts or with fewer choices.
  void draw(int32_t layer, int32_t num_experts, std::span<int32_t> chosen);
  const std::string& description() const { return spec_; }

 private:
  struct Layer {
    uint64_t random = 0;
    std::vector<int32_t> order;     // experts by falling weight
    int64_t rows_left = 0;          // of this order; 0: for ever
    std::vector<int32_t> recorded;  // [rows, recorded_cols]
    size_t next = 0;                // in recorded
  };

  Status read_trace(const std::string& path);
  Layer& layer_at(int32_t layer, int32_t num_experts);
  void shuffle(Layer& layer, int32_t num_experts);

  std::string spec_;
  uint64_t seed_ = 0;
  double exponent_ = 0.0;
  int64_t rows_per_order_ = 0;
  size_t recorded_cols_ = 0;  // 0: nothing is recorded
  std::vector<double> sums_;  // [num_experts]: of the weights up to and with that rank
  std::vector<Layer> layers_;
};

}  // namespace moed
