#include "server/bench_engine.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>

#include "base/log.h"
#include "engine/open_engine.h"
#include "server/backend.h"
#include "server/bench_loop.h"
#include "server/model_shapes.h"
#include "server/scheduling.h"
#include "server/settings.h"

namespace moed {
namespace {

using Json = nlohmann::ordered_json;

struct BenchOptions {
  BenchWorkload workload;
  int32_t expert_cache = 1;
  BenchDevice device;
  std::string device_spec;  // empty: as the settings say, which refuse simulated ones
  std::string shape;
  int32_t layers = 0;  // 0: the model's
  std::string json;
  std::string trace;
  int32_t trace_passes = 4;
  std::vector<std::string> settings;  // what is none of these
  bool help = false;
};

struct BenchFlag {
  std::string_view name;
  std::string_view value;
  std::string_view help;
  int32_t* (*number)(BenchOptions&);
  std::string* (*text)(BenchOptions&);
};

constexpr BenchFlag kFlags[] = {
    {"shape", "NAME", "a published model's shape with made-up weights, instead of --model", nullptr,
     [](BenchOptions& o) { return &o.shape; }},
    {"layers", "N", "only the first N layers of the model", [](BenchOptions& o) { return &o.layers; }, nullptr},
    {"clients", "N", "clients; each sends its next request when it has its answer (8)",
     [](BenchOptions& o) { return &o.workload.clients; }, nullptr},
    {"requests", "N", "requests in all (one a client)", [](BenchOptions& o) { return &o.workload.requests; }, nullptr},
    {"prompt", "N", "tokens of a prompt (512)", [](BenchOptions& o) { return &o.workload.prompt_tokens; }, nullptr},
    {"new", "N", "tokens of an answer (64)", [](BenchOptions& o) { return &o.workload.new_tokens; }, nullptr},
    {"long-prompt", "N", "one more request of so many tokens and a one-token answer, beside the others",
     [](BenchOptions& o) { return &o.workload.long_prompt_tokens; }, nullptr},
    {"long-after", "N", "it comes when every client has so many tokens (8)",
     [](BenchOptions& o) { return &o.workload.long_after_tokens; }, nullptr},
    {"device", "SPEC", "as in moed serve, or simulated:FILE (cpu)", nullptr,
     [](BenchOptions& o) { return &o.device_spec; }},
    {"router", "SPEC", "of a simulated device: uniform, zipf:S, shift:S:ROWS or trace:FILE", nullptr,
     [](BenchOptions& o) { return &o.device.router; }},
    {"expert-cache", "N", "0: experts that came do not stay, whatever the policy says (1)",
     [](BenchOptions& o) { return &o.expert_cache; }, nullptr},
    {"seed", "N", "of prompts, and of what devices leave to chance (0)", nullptr, nullptr},
    {"json", "FILE", "write the figures there too", nullptr, [](BenchOptions& o) { return &o.json; }},
    {"trace", "FILE", "write the lanes of some passes there: Chrome's trace format, for Perfetto", nullptr,
     [](BenchOptions& o) { return &o.trace; }},
    {"trace-passes", "N", "how many, from the steady stretch's first on (4)",
     [](BenchOptions& o) { return &o.trace_passes; }, nullptr},
};

Status set(BenchOptions& options, const BenchFlag& flag, const std::string& value) {
  if (flag.text != nullptr) {
    *flag.text(options) = value;
    return {};
  }
  int32_t number = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (error != std::errc() || end != value.data() + value.size() || number < 0) {
    return invalid_argument(fmt::format("--{} is {}, but must be a number from 0 to 2147483647", flag.name, value));
  }
  if (flag.number != nullptr) {
    *flag.number(options) = number;
  } else {
    options.workload.seed = options.device.seed = static_cast<uint64_t>(number);
  }
  return {};
}

StatusOr<BenchOptions> read_options(const std::vector<std::string>& args) {
  BenchOptions options;
  for (size_t i = 0; i < args.size(); ++i) {
    if (args[i] == "--help" || args[i] == "-h") options.help = true;
    const size_t equals = args[i].find('=');
    const std::string name = args[i].substr(0, equals);
    const auto* flag = std::find_if(std::begin(kFlags), std::end(kFlags),
                                    [&](const BenchFlag& one) { return name == "--" + std::string(one.name); });
    if (flag == std::end(kFlags)) {
      options.settings.push_back(args[i]);
      continue;
    }
    if (equals == std::string::npos && i + 1 == args.size()) return invalid_argument(name + " needs a value");
    const std::string value = equals == std::string::npos ? args[++i] : args[i].substr(equals + 1);
    MOED_RETURN_IF_ERROR(set(options, *flag, value));
  }
  return options;
}

// What the workload needs, unless set: contexts of its lengths, KV for all clients where their KV is to be, one pass
// for all of their rows, a queue for all.
void fit_settings(const BenchWorkload& workload, const ModelConfig& model, Settings* settings) {
  const int64_t longest = std::max<int64_t>(int64_t{workload.prompt_tokens} + workload.new_tokens,
                                            int64_t{workload.long_prompt_tokens} + 1);
  if (settings->model.max_model_len == 0)
    settings->model.max_model_len = std::min<int64_t>(longest, model.max_positions);
  const int64_t sequences = workload.clients + (workload.long_prompt_tokens > 0 ? 1 : 0);
  settings->scheduler.sequences_max = std::max(settings->scheduler.sequences_max, sequences);
  settings->scheduler.queue_max = std::max(settings->scheduler.queue_max, sequences);
  settings->scheduler.queue_tokens_max =
      std::max(settings->scheduler.queue_tokens_max,
               int64_t{workload.clients} * workload.prompt_tokens + workload.long_prompt_tokens);
  settings->scheduler.pass_rows_max = std::max(settings->scheduler.pass_rows_max, sequences);
  const auto context_blocks = [](int64_t tokens) { return (tokens + kKvBlockTokens - 1) / kKvBlockTokens + 1; };
  const int64_t blocks = workload.clients * context_blocks(int64_t{workload.prompt_tokens} + workload.new_tokens) +
                         context_blocks(workload.long_prompt_tokens) + context_blocks(longest);
  const double gib =
      static_cast<double>(blocks * kKvBlockTokens * model.kv_bytes_per_token()) / static_cast<double>(int64_t{1} << 30);
  const bool on_device = settings->placement.kv == "device";
  double& wanted = on_device ? settings->memory.device_kv_gib : settings->memory.kv_gib;
  if (wanted == 0.0) wanted = gib;
}

// The figures of a stretch of time.
Json stretch_json(const BenchCounts& begin, const BenchCounts& end) {
  const double us = end.at_us - begin.at_us;
  const auto rate = [&](int64_t count) { return us > 0.0 ? static_cast<double>(count) / us * 1e6 : 0.0; };
  const auto share = [&](double busy_us) { return us > 0.0 ? busy_us / us : 0.0; };
  const auto grown = [&](auto BenchCounts::*part, auto field) { return end.*part.*field - begin.*part.*field; };
  // A device that does not count has done some all the same: null, not zero.
  const bool counted = begin.device.has_value() && end.device.has_value();
  const auto bytes = [&](int64_t DeviceTotals::*field) {
    return counted ? Json((*end.device).*field - (*begin.device).*field) : Json(nullptr);
  };
  const auto busy = [&](double DeviceTotals::*field) {
    return counted ? Json(share((*end.device).*field - (*begin.device).*field)) : Json(nullptr);
  };
  const auto engine = [&](auto field) { return grown(&BenchCounts::engine, field); };
  const auto lane = [&](auto field) { return grown(&BenchCounts::lanes, field) / 1e6; };
  const int64_t new_tokens = end.new_tokens - begin.new_tokens;
  const int64_t prompt_tokens = end.prompt_tokens - begin.prompt_tokens;
  const int64_t passes[] = {end.passes[0] - begin.passes[0], end.passes[1] - begin.passes[1]};
  Json json;
  json["seconds"] = us / 1e6;
  json["prompt_tokens"] = prompt_tokens;
  json["new_tokens"] = new_tokens;
  json["new_tokens_per_s"] = rate(new_tokens);
  json["tokens_per_s"] = rate(new_tokens + prompt_tokens);
  json["interactive_passes"] = passes[0];
  json["bulk_passes"] = passes[1];
  json["rows"] = end.rows - begin.rows;
  json["ms_a_pass"] = passes[0] + passes[1] > 0 ? us / 1e3 / static_cast<double>(passes[0] + passes[1]) : 0.0;
  const double bound_us = end.bound_us - begin.bound_us;
  if (bound_us > 0.0) {
    json["bound"] = {{"seconds", bound_us / 1e6},
                     {"reached", us > 0.0 ? bound_us / us : 0.0},
                     {"link_seconds", (end.part_bounds_us[0] - begin.part_bounds_us[0]) / 1e6},
                     {"host_seconds", (end.part_bounds_us[1] - begin.part_bounds_us[1]) / 1e6},
                     {"device_seconds", (end.part_bounds_us[2] - begin.part_bounds_us[2]) / 1e6}};
  }
  json["pass_seconds"] = {{"total", lane(&StepTimes::total_us)},
                          {"attention", lane(&StepTimes::attention_us)},
                          {"experts", lane(&StepTimes::experts_us)},
                          {"dense", lane(&StepTimes::dense_us)},
                          {"sample", lane(&StepTimes::sample_us)}};
  json["busy"] = {{"kernels", busy(&DeviceTotals::kernels_us)},
                  {"copies_up", busy(&DeviceTotals::up_us)},
                  {"copies_down", busy(&DeviceTotals::down_us)},
                  {"host_ops", busy(&DeviceTotals::host_us)},
                  {"waits_for_ring", share(engine(&EngineStats::ring_wait_us))}};
  json["bytes"] = {{"device_memory", bytes(&DeviceTotals::device_bytes)},
                   {"link_up", bytes(&DeviceTotals::up_bytes)},
                   {"link_down", bytes(&DeviceTotals::down_bytes)},
                   {"host_memory", bytes(&DeviceTotals::host_bytes)},
                   {"experts_copied", engine(&EngineStats::expert_bytes_copied)}};
  json["experts"] = {{"hits", engine(&EngineStats::expert_hits)},
                     {"misses", engine(&EngineStats::expert_misses)},
                     {"prefetched", engine(&EngineStats::experts_prefetched)},
                     {"prefetched_unused", engine(&EngineStats::experts_prefetched_unused)},
                     {"evictions", engine(&EngineStats::expert_evictions)},
                     {"device_rows", engine(&EngineStats::device_expert_rows)},
                     {"host_rows", engine(&EngineStats::host_expert_rows)}};
  return json;
}

Json latency_json(const BenchLatency& latency) {
  return {{"mean_ms", latency.mean_ms}, {"median_ms", latency.median_ms}, {"worst_ms", latency.worst_ms}};
}

Json pins_json(const Backend& backend) {
  const std::optional<ExpertPins> pins = backend.pins();
  if (!pins.has_value()) return nullptr;
  return {{"expert_bytes", pins->expert_bytes},
          {"pinned_bytes", pins->pinned_bytes},
          {"all_pinned", pins->all_pinned()},
          {"refusal", pins->refusal}};
}

Json report(const BenchOptions& options, const Settings& settings, const ModelConfig& model, Backend& backend,
            const BenchResult& result) {
  const BenchWorkload& workload = options.workload;
  const Planning planning = backend.planning();
  Json json;
  json["simulated"] = backend.opened()->is_simulated();
  json["device"] = backend.device_description();
  json["model"] = options.shape.empty() ? settings.model.path : options.shape;
  json["layers"] = model.num_layers;
  json["policy"] = planning.policy->name;
  json["kv"] = name_of(planning.kv);
  json["halves"] = planning.halves;
  json["expert_cache"] = planning.policy->cache && options.expert_cache != 0;
  json["expert_slots"] = backend.budget().device.num_slots;
  json["resident_experts"] = planning.residency.resident.size();
  json["workload"] = {{"clients", workload.clients},
                      {"requests", workload.requests},
                      {"prompt_tokens", workload.prompt_tokens},
                      {"new_tokens", workload.new_tokens},
                      {"long_prompt_tokens", workload.long_prompt_tokens},
                      {"pass_rows_max", settings.scheduler.pass_rows_max},
                      {"bulk_rows_min", settings.scheduler.bulk_rows_min},
                      {"yield_layers", settings.scheduler.yield_layers},
                      {"seed", workload.seed}};
  json["first_token"] = latency_json(result.first_token);
  json["token"] = latency_json(result.token);
  if (workload.long_prompt_tokens > 0) {
    json["token_beside_long"] = latency_json(result.token_beside_long);
    json["long_prompt_ms"] = result.long_prompt_ms;
  }
  json["preemptions"] = result.preemptions;
  json["run"] = stretch_json(result.begin, result.end);
  json["steady"] = stretch_json(result.steady_begin, result.steady_end);
  return json;
}

void print_stretch(std::string_view name, const Json& json) {
  const auto number = [&](const char* part, const char* field) { return json[part][field].get<double>(); };
  fmt::print(
      "{}: {:.3f} s, {} prompt and {} new tokens; {:.1f} new tokens/s, {:.1f} in all; {} + {} passes, {:.2f} ms each\n",
      name, json["seconds"].get<double>(), json["prompt_tokens"].get<int64_t>(), json["new_tokens"].get<int64_t>(),
      json["new_tokens_per_s"].get<double>(), json["tokens_per_s"].get<double>(),
      json["interactive_passes"].get<int64_t>(), json["bulk_passes"].get<int64_t>(), json["ms_a_pass"].get<double>());
  const bool counted = !json["busy"]["kernels"].is_null();
  if (counted) {
    fmt::print("  busy: kernels {:.1f}%, copies up {:.1f}%, down {:.1f}%, host ops {:.1f}%\n",
               100 * number("busy", "kernels"), 100 * number("busy", "copies_up"), 100 * number("busy", "copies_down"),
               100 * number("busy", "host_ops"));
  }
  fmt::print("  waits for the ring {:.1f}%\n", 100 * number("busy", "waits_for_ring"));
  if (json.contains("bound")) {
    fmt::print("  closed-form bound: {:.3f} s ({:.1f}% reached); link {:.3f}, host {:.3f}, device {:.3f}\n",
               number("bound", "seconds"), 100 * number("bound", "reached"), number("bound", "link_seconds"),
               number("bound", "host_seconds"), number("bound", "device_seconds"));
  }
  fmt::print("  seconds of passes: attention {:.3f}, experts {:.3f}, dense {:.3f}, sampling {:.3f}\n",
             number("pass_seconds", "attention"), number("pass_seconds", "experts"), number("pass_seconds", "dense"),
             number("pass_seconds", "sample"));
  fmt::print("  GB: experts copied {:.2f}", number("bytes", "experts_copied") / 1e9);
  if (counted) {
    fmt::print(", link up {:.2f} in all, down {:.2f}; device memory {:.2f}; host memory {:.2f}",
               number("bytes", "link_up") / 1e9, number("bytes", "link_down") / 1e9,
               number("bytes", "device_memory") / 1e9, number("bytes", "host_memory") / 1e9);
  }
  fmt::print("\n");
  fmt::print("  experts: {} hits, {} misses, {} prefetched ({} in vain); rows: {} device, {} host\n",
             json["experts"]["hits"].get<int64_t>(), json["experts"]["misses"].get<int64_t>(),
             json["experts"]["prefetched"].get<int64_t>(), json["experts"]["prefetched_unused"].get<int64_t>(),
             json["experts"]["device_rows"].get<int64_t>(), json["experts"]["host_rows"].get<int64_t>());
}

void print(const Json& json) {
  // Neither of these measures speed, and each figure says so.
  const std::string device = json["device"].get<std::string>();
  const bool real = !device.starts_with("simulated:") && !device.starts_with("emulated:");
  const std::string mark = real ? "" : device.substr(0, device.find(':')) + " ";
  const auto ms = [&](const char* part, const char* field) { return json[part][field].get<double>(); };
  fmt::print("{}\n{}, policy {}, KV {}, {} halves, {} expert slots, {} resident\n", json["device"].get<std::string>(),
             json["model"].get<std::string>(), json["policy"].get<std::string>(), json["kv"].get<std::string>(),
             json["halves"].get<int>(), json["expert_slots"].get<int64_t>(), json["resident_experts"].get<int64_t>());
  print_stretch(mark + "run", json["run"]);
  print_stretch(mark + "steady", json["steady"]);
  fmt::print(
      "{}first token: mean {:.1f} ms, median {:.1f}, worst {:.1f}; token: mean {:.2f} ms, median {:.2f}, worst "
      "{:.2f}\n",
      mark, ms("first_token", "mean_ms"), ms("first_token", "median_ms"), ms("first_token", "worst_ms"),
      ms("token", "mean_ms"), ms("token", "median_ms"), ms("token", "worst_ms"));
  if (json.contains("long_prompt_ms")) {
    fmt::print("{}long prompt: {:.1f} ms; tokens beside it: mean {:.2f} ms, median {:.2f}, worst {:.2f}\n", mark,
               json["long_prompt_ms"].get<double>(), ms("token_beside_long", "mean_ms"),
               ms("token_beside_long", "median_ms"), ms("token_beside_long", "worst_ms"));
  }
}

StatusOr<Model> model_of(const BenchOptions& options, const Settings& settings) {
  MOED_ASSIGN_OR_RETURN(Model model,
                        options.shape.empty() ? load_model_config(settings.model.path) : model_of_shape(options.shape));
  if (options.layers > model.config.num_layers) {
    return invalid_argument(fmt::format("--layers is {}; the model has {}", options.layers, model.config.num_layers));
  }
  if (options.layers > 0) {
    model.config.num_layers = options.layers;
    model.config.layers.resize(options.layers);
  }
  return model;
}

// Traces the passes from the steady stretch's beginning on.
class PassTracer {
 public:
  PassTracer(DeviceTrace* trace, int32_t passes) : trace_(trace), left_(passes) {}
  void passed(bool steady) {
    if (trace_ == nullptr || left_ < 0 || !steady) return;
    if (!started_) trace_->start();
    started_ = true;
    if (left_-- == 0) trace_->stop();
  }

 private:
  DeviceTrace* const trace_;
  int32_t left_;
  bool started_ = false;
};

Status run(const BenchOptions& options, const LoadedSettings& loaded) {
  Settings settings = loaded.settings;
  if (!options.shape.empty()) settings.model.load_format = "dummy";
  if (!options.device_spec.empty()) settings.device.device = options.device_spec;
  MOED_ASSIGN_OR_RETURN(const Model model, model_of(options, settings));
  fit_settings(options.workload, model.config, &settings);
  BenchDevice device = options.device;
  device.traced = !options.trace.empty();
  device.cache = options.expert_cache != 0;
  MOED_ASSIGN_OR_RETURN(const auto backend, load_bench_backend(settings, model, device));
  const Planning planning = backend->planning();
  const SchedulerConfig scheduler = scheduler_config(settings, backend->budget(), planning.kv);
  DeviceTrace* const trace = backend->opened()->trace();
  PassTracer tracer(trace, options.trace_passes);
  const BenchInputs inputs{.opened = *backend->opened(),
                           .model = model.config,
                           .planning = planning,
                           .scheduler = scheduler,
                           .prior = backend->prior(),
                           .yield_layers = static_cast<int32_t>(settings.scheduler.yield_layers),
                           .passed = [&](bool steady) { tracer.passed(steady); }};
  MOED_ASSIGN_OR_RETURN(const BenchResult result, run_bench(inputs, options.workload));
  Json json = report(options, settings, model.config, *backend, result);
  json["pins"] = pins_json(*backend);
  print(json);
  if (trace != nullptr) MOED_RETURN_IF_ERROR(trace->write(options.trace));
  if (options.json.empty()) return {};
  std::ofstream file(options.json);
  file << json.dump(2) << "\n";
  return file.good() ? Status() : invalid_argument(options.json + ": cannot write the figures there", "json");
}

int fail(const Status& status) {
  fmt::print(stderr, "moed bench engine: {}\n", status.message());
  return 1;
}

}  // namespace

std::string bench_engine_help() {
  std::string text =
      "moed bench engine: scheduler and engine without doors and text, clients in a closed loop; on a simulated "
      "device\n"
      "(--device simulated:FILE) without weights, on its clock.\n\n";
  for (const BenchFlag& flag : kFlags) {
    text += fmt::format("  {:24} {}\n", fmt::format("--{} {}", flag.name, flag.value), flag.help);
  }
  return text + fmt::format("\nShapes: {}. All settings of `moed serve` hold too (`moed serve --help`).\n",
                            model_shape_names());
}

int bench_engine(const std::vector<std::string>& args, const char* const* environment) {
  const StatusOr<BenchOptions> options = read_options(args);
  if (!options.ok()) return fail(options.status());
  if (options->help) {
    fmt::print("{}", bench_engine_help());
    return 0;
  }
  std::vector<std::string> flags = options->settings;
  if (!options->shape.empty()) flags.insert(flags.end(), {"--model", options->shape});
  if (!options->device_spec.empty()) {
    // Settings refuse simulated devices, which cannot serve; emulated ones have memory of their own too.
    const bool simulated = options->device_spec.starts_with("simulated");
    flags.insert(flags.end(), {"--device", simulated ? "emulated" : options->device_spec});
  }
  const StatusOr<LoadedSettings> loaded = load_settings(flags, environment);
  if (!loaded.ok()) return fail(loaded.status());
  // A process has one log; tests run this more than once.
  if (spdlog::get("moed") == nullptr) init_log(loaded->settings.server.log_level, loaded->settings.server.log_json);
  const Status status = run(*options, *loaded);
  return status.ok() ? 0 : fail(status);
}

}  // namespace moed
