#include "tests/gpu/decode_bound.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "plan/bound.h"
#include "server/model_shapes.h"

namespace moed {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kGbPerS = 1e3;      // bytes a microsecond
constexpr double kTflopPerS = 1e6;   // FLOP a microsecond
constexpr double kUnmeasured = 1.0;  // of the host, for which there is no work

// What a probe that was cut off did not measure bounds nothing.
MachineProfile profile_of(const Json& probe) {
  const auto best = [&](std::initializer_list<const char*> fields) {
    double most = 0.0;
    for (const char* field : fields) most = std::max(most, probe.value(field, 0.0));
    return most > 0.0 ? most : INFINITY;
  };
  MachineProfile machine;
  machine.link_bytes = kGbPerS * best({"copy_up_gb_per_s"});
  machine.device_bytes =
      kGbPerS * best({"linear_1_row_gb_per_s", "linear_4_rows_gb_per_s", "linear_8_rows_gb_per_s",
                      "linear_16_rows_gb_per_s", "linear_32_rows_gb_per_s", "experts_2_rows_gb_per_s"});
  machine.device_flops = kTflopPerS * best({"linear_many_rows_tflop_per_s", "experts_many_rows_tflop_per_s"});
  machine.host_bytes = machine.host_flops = machine.attention_bytes = machine.attention_flops = kUnmeasured;
  return machine;
}

// Null where the host computes experts too.
const Policy* policy_of(const std::string& name) {
  const auto all = policies();
  const auto found = std::find_if(all.begin(), all.end(), [&](const Policy& one) { return one.name == name; });
  return found != all.end() && (found->streams_all || found->all_resident) ? &*found : nullptr;
}

}  // namespace

Json decode_bound(const Json& bench, const Json& probe, double rows) {
  StatusOr<Model> model = model_of_shape(bench.at("model").get<std::string>());
  Planning planning;
  planning.policy = policy_of(bench.at("policy").get<std::string>());
  const bool probed = probe.contains("copy_up_gb_per_s") && !probe.at("tiny").get<bool>();
  if (!model.ok() || planning.policy == nullptr || rows < 1.0 || !probed) return nullptr;
  ModelConfig& config = model->config;
  config.num_layers = bench.at("layers").get<int32_t>();
  config.layers.resize(config.num_layers);
  planning.residency.num_slots = bench.at("expert_slots").get<int32_t>();
  planning.residency.resident.resize(bench.at("resident_experts").get<size_t>());
  StepShape shape;
  shape.num_rows = shape.num_sampled = static_cast<int32_t>(std::lround(rows));
  const LeastWork work = least_work(config, shape, planning, /*host_kv_share=*/1.0);
  const Bound bound = closed_form_bound(profile_of(probe), work);
  return {{"what", bound.binding()},
          {"link_ms", 1e-3 * bound.link_us},
          {"device_ms", 1e-3 * bound.device_us},
          {"experts_copied_gb_a_pass", 1e-9 * work.link_bytes},
          {"new_tokens_per_s", 1e6 * rows / bound.us()}};
}

}  // namespace moed
