#include "server/settings_table.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <iterator>

namespace moed {
namespace {

constexpr double kTokensMax = 1 << 24;
constexpr double kGibMax = 65536;

// The address of a member, as a function that the table can hold.
template <auto Section, auto Member>
SettingField at(Settings& settings) {
  return &(settings.*Section.*Member);
}

using S = Settings;

const SettingRow kRows[] = {
    {"model.path", at<&S::model, &S::Model::path>,
     "Folder of the checkpoint (config.json, *.safetensors, tokenizer.json)"},
    {"model.load_format", at<&S::model, &S::Model::load_format>,
     "auto reads the checkpoint's weights; dummy makes seeded random ones from config.json (a tokenizer is needed "
     "either way)",
     0, 0, "auto|dummy"},
    {"model.served_model_name", at<&S::model, &S::Model::served_model_name>,
     "Names that requests may use for the model; none: the folder's name"},
    {"model.max_model_len", at<&S::model, &S::Model::max_model_len>,
     "Tokens of prompt and answer together; 0: the model's context, or what the KV memory holds if that is less", 0,
     kTokensMax},

    {"server.host", at<&S::server, &S::Server::host>,
     "Address to listen on, for HTTP and gRPC; beyond loopback it needs a key or insecure"},
    {"server.http_port", at<&S::server, &S::Server::http_port>, "HTTP port; 0: any free one", 0, 65535},
    {"server.grpc_port", at<&S::server, &S::Server::grpc_port>, "gRPC port; 0: any free one", 0, 65535},
    {"server.api_key_file", at<&S::server, &S::Server::api_key_file>,
     "File of the keys that clients may present as `Authorization: Bearer KEY`, one a line"},
    {"server.api_key", at<&S::server, &S::Server::api_key>, "One such key, for containers", 0, 0, "", true},
    {"server.insecure", at<&S::server, &S::Server::insecure>, "Listen beyond loopback without a key"},
    {"server.drain_seconds", at<&S::server, &S::Server::drain_seconds>,
     "How long running requests may go on after SIGTERM", 0, 86400},
    {"server.cors_origin", at<&S::server, &S::Server::cors_origin>,
     "Origins whose pages may call the server from a browser; none by default"},
    {"server.log_level", at<&S::server, &S::Server::log_level>, "Least severe log lines that are written", 0, 0,
     "trace|debug|info|warn|error"},
    {"server.log_json", at<&S::server, &S::Server::log_json>, "Write the log as JSON, one object a line"},

    {"device.device", at<&S::device, &S::Device::device>,
     "Device that runs the model: cpu, emulated or emulated:FILE; cuda or cuda:N where the build has it; auto: cuda "
     "where "
     "build and machine have it, else cpu"},
    {"device.device_memory_gib", at<&S::device, &S::Device::device_memory_gib>,
     "Cap on the device's memory in GiB, above what it has without effect; 0: none (4 GiB on emulated), and so it must "
     "be on cpu",
     0, kGibMax},
    {"device.threads", at<&S::device, &S::Device::threads>,
     "Compute threads, the serving thread counted; 0: the physical cores that affinity and cgroup allow", 0, 1024},
    {"device.deterministic", at<&S::device, &S::Device::deterministic>,
     "One kernel and one order of sums whatever the batch: the same tokens, slower"},

    {"memory.host_memory_gib", at<&S::memory, &S::Memory::host_memory_gib>,
     "Host memory that may be taken in GiB, for weights, KV cache and the rest; 0: what the machine says is free. "
     "Virtual machines whose memory grows as it is used say too little",
     0, kGibMax},
    {"memory.kv_gib", at<&S::memory, &S::Memory::kv_gib>,
     "Host memory of the KV cache in GiB; 0: what is free, at most 16 full contexts", 0, kGibMax},
    {"memory.device_kv_gib", at<&S::memory, &S::Memory::device_kv_gib>,
     "Device memory of the KV cache in GiB, where placement.kv puts it there; 0: a quarter of what dense weights "
     "leave, "
     "at most 16 full contexts",
     0, kGibMax},
    {"memory.prefix_cache", at<&S::memory, &S::Memory::prefix_cache>,
     "Keep the KV of finished requests for prompts that begin alike"},

    {"placement.policy", at<&S::placement, &S::Placement::policy>,
     "Where experts run. host: all on the CPU. device: all in device memory. stream: every layer's experts come "
     "through "
     "the ring in order, for many rows a pass. hot: those most asked for stay in device memory, others are copied or "
     "run on the CPU, as costs say, which are placeholders on real devices until calibrated. auto: hot where the "
     "device has memory of its own, else host",
     0, 0, "auto|host|device|stream|hot"},
    {"placement.kv", at<&S::placement, &S::Placement::kv>,
     "Where the KV cache lives, and so where attention runs; split: on the device while a prompt fits there, else on "
     "the host; auto: device under the policy of that name, else host",
     0, 0, "auto|host|device|split"},
    {"placement.resident_experts", at<&S::placement, &S::Placement::resident_experts>,
     "Experts that never leave device memory: one number (the first so many of each layer), or elements layer:expert "
     "and layer:first-last; none: those most asked for stay by themselves"},
    {"placement.halves", at<&S::placement, &S::Placement::halves>,
     "Parts of a pass that take turns, so that attention on the CPU overlaps the device's products of the other; two "
     "read the weights twice",
     1, 2},
    {"placement.ring_slots", at<&S::placement, &S::Placement::ring_slots>,
     "Experts that device memory holds at once, resident ones counted; 0: as many as fit", 0, 1 << 24},

    {"scheduler.bulk_rows_min", at<&S::scheduler, &S::Scheduler::bulk_rows_min>,
     "A prefill of more rows runs in a bulk pass, which lets running answers go first", 1, 1 << 20},
    {"scheduler.pass_rows_max", at<&S::scheduler, &S::Scheduler::pass_rows_max>,
     "Rows (tokens) in one pass. Where every pass streams the experts, as many as a long prompt has: a pass takes no "
     "longer for it. 640 lets decode rows ride in long prompts where a GPU holds a few large experts all",
     2, 65536},
    {"scheduler.sequences_max", at<&S::scheduler, &S::Scheduler::sequences_max>, "Sequences that run at once", 1,
     65536},
    {"scheduler.queue_max", at<&S::scheduler, &S::Scheduler::queue_max>,
     "Requests that wait; more are refused at once (429)", 1, 1 << 20},
    {"scheduler.queue_tokens_max", at<&S::scheduler, &S::Scheduler::queue_tokens_max>,
     "Prompt tokens of the requests that wait", 1, 1e12},
    {"scheduler.scheduling_policy", at<&S::scheduler, &S::Scheduler::scheduling_policy>,
     "Who goes first: fcfs takes requests in the order they came and refuses those that give a priority; priority "
     "takes "
     "the lower priority first",
     0, 0, "fcfs|priority"},
    {"scheduler.yield_layers", at<&S::scheduler, &S::Scheduler::yield_layers>,
     "A bulk pass lets others in after so many layers", 1, 1000},

    {"limits.body_bytes_max", at<&S::limits, &S::Limits::body_bytes_max>, "Bytes of a request's body", 1024, 1 << 30},
    {"limits.prompt_tokens_max", at<&S::limits, &S::Limits::prompt_tokens_max>, "Tokens of a prompt; 0: the context", 0,
     kTokensMax},
    {"limits.new_tokens_max", at<&S::limits, &S::Limits::new_tokens_max>, "Tokens of an answer; 0: the context", 0,
     kTokensMax},
    {"limits.n_max", at<&S::limits, &S::Limits::n_max>, "Answers to one prompt (`n`)", 1, 1024},
    {"limits.prompts_max", at<&S::limits, &S::Limits::prompts_max>, "Prompts in one completions request", 1, 65536},
    {"limits.stop_max", at<&S::limits, &S::Limits::stop_max>, "Stop strings", 0, 1024},
    {"limits.stop_bytes_max", at<&S::limits, &S::Limits::stop_bytes_max>,
     "Bytes of a stop string, or of a word of `bad_words`", 1, 65536},
    {"limits.stop_token_ids_max", at<&S::limits, &S::Limits::stop_token_ids_max>, "Entries of `stop_token_ids`", 0,
     65536},
    {"limits.bad_words_max", at<&S::limits, &S::Limits::bad_words_max>, "Entries of `bad_words`", 0, 65536},
    {"limits.top_logprobs_max", at<&S::limits, &S::Limits::top_logprobs_max>, "Logprobs a token", 0, 1000},
    {"limits.scores_max", at<&S::limits, &S::Limits::scores_max>,
     "Log-probabilities in one answer: scored tokens, times the alternatives and the token itself, times the choices; "
     "an "
     "answer is that much shorter where its length is left open",
     1, 1e9},
    {"limits.logit_bias_max", at<&S::limits, &S::Limits::logit_bias_max>, "Entries of `logit_bias`", 0, 1 << 20},
    {"limits.json_depth_max", at<&S::limits, &S::Limits::json_depth_max>, "Nesting of a request's JSON", 4, 100},
    {"limits.connections_max", at<&S::limits, &S::Limits::connections_max>, "Open HTTP connections", 1, 1 << 20},
    {"limits.grpc_calls_max", at<&S::limits, &S::Limits::grpc_calls_max>, "gRPC calls at once on one connection", 1,
     1 << 20},
    {"limits.header_bytes_max", at<&S::limits, &S::Limits::header_bytes_max>, "Bytes of a request's headers", 1024,
     1 << 20},
    {"limits.reading_bytes_max", at<&S::limits, &S::Limits::reading_bytes_max>,
     "Bytes of all HTTP bodies that are being received or parsed; requests beyond are refused (429). As many again for "
     "what gRPC receives",
     1 << 20, 1e12},
    {"limits.request_id_bytes_max", at<&S::limits, &S::Limits::request_id_bytes_max>,
     "Bytes of a client's request id; a longer one is replaced", 1, 1024},
    {"limits.queued_text_bytes_max", at<&S::limits, &S::Limits::queued_text_bytes_max>,
     "Bytes of text of the requests that wait to be tokenised; more are refused at once (429)", 1 << 20, 1e12},
    {"limits.header_seconds", at<&S::limits, &S::Limits::header_seconds>,
     "Time for a request's headers to arrive, from its first byte (408)", 0.1, 3600},
    {"limits.body_seconds", at<&S::limits, &S::Limits::body_seconds>, "Time for a request's body to arrive (408)", 0.1,
     3600},
    {"limits.idle_seconds", at<&S::limits, &S::Limits::idle_seconds>,
     "How long a connection may be open without a byte of a request; of gRPC, without a call", 0.1, 86400},
    {"limits.write_seconds", at<&S::limits, &S::Limits::write_seconds>,
     "How long a client may take no byte of its answer before it is dropped; of gRPC, no piece of a stream", 0.1, 3600},
    {"limits.ping_seconds", at<&S::limits, &S::Limits::ping_seconds>,
     "Silence in a stream of server-sent events after which a `: ping` comment is sent", 0.1, 3600},
    {"limits.request_seconds", at<&S::limits, &S::Limits::request_seconds>,
     "Time for a request as a whole; 0: no limit", 0, 1e6},
    {"limits.layer_seconds", at<&S::limits, &S::Limits::layer_seconds>,
     "Time for one layer of a pass, or its head; what takes longer counts as hung, and /live says 503 while it lasts",
     1, 1e5},
    {"limits.template_fuel", at<&S::limits, &S::Limits::template_fuel>, "Instructions of one run of the chat template",
     1000, 1e9},
    {"limits.template_output_bytes", at<&S::limits, &S::Limits::template_output_bytes>,
     "Bytes of a prompt that the chat template renders", 1024, 1 << 30},
};

template <class... F>
struct Overloaded : F... {
  using F::operator()...;
};
template <class... F>
Overloaded(F...) -> Overloaded<F...>;

std::string toml_string(std::string_view text) {
  std::string result = "\"";
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (code < 0x20 || code == 0x7F) {
      result += fmt::format("\\u{:04X}", static_cast<unsigned>(code));
    } else {
      result += c;
    }
  }
  return result + '"';
}

std::string toml_float(double value) {
  std::string text = fmt::format("{}", value);
  return text.find_first_of(".e") == std::string::npos ? text + ".0" : text;
}

// 1048576, not 1.04858e+06.
std::string plain_number(double value) {
  return value == static_cast<double>(static_cast<int64_t>(value)) ? fmt::format("{}", static_cast<int64_t>(value))
                                                                   : fmt::format("{}", value);
}

SettingField field_of(const SettingRow& row, const Settings& settings) {
  // Only read through the pointer it returns.
  return row.field(const_cast<Settings&>(settings));
}

}  // namespace

std::span<const SettingRow> setting_rows() { return kRows; }

std::string_view setting_section(const SettingRow& row) { return row.path.substr(0, row.path.find('.')); }

std::string_view setting_key(const SettingRow& row) { return row.path.substr(row.path.find('.') + 1); }

// The model's folder is the one flag that everybody types.
std::string setting_flag(const SettingRow& row) {
  std::string name(row.path == "model.path" ? "model" : setting_key(row));
  std::replace(name.begin(), name.end(), '_', '-');
  return "--" + name;
}

std::string setting_environment(const SettingRow& row) {
  std::string name(row.path == "model.path" ? "model" : setting_key(row));
  std::transform(name.begin(), name.end(), name.begin(),
                 [](char c) { return c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c; });
  return "MOED_" + name;
}

std::string setting_allowed(const SettingRow& row) {
  Settings defaults;
  const std::string range = fmt::format("from {} to {}", plain_number(row.min), plain_number(row.max));
  return std::visit(
      Overloaded{[](bool*) { return std::string("true or false"); }, [&](int64_t*) { return "an integer " + range; },
                 [&](double*) { return "a number " + range; },
                 [&](std::string*) {
                   if (row.choices.empty()) return std::string("a string");
                   std::string list(row.choices);
                   for (size_t at = 0; (at = list.find('|', at)) != std::string::npos;) {
                     list.replace(at, 1, list.find('|', at + 1) == std::string::npos ? " or " : ", ");
                   }
                   return list;
                 },
                 [](std::vector<std::string>*) { return std::string("a list of strings"); }},
      row.field(defaults));
}

std::string setting_value(const SettingRow& row, const Settings& settings) {
  return std::visit(Overloaded{[](const bool* value) { return std::string(*value ? "true" : "false"); },
                               [](const int64_t* value) { return fmt::format("{}", *value); },
                               [](const double* value) { return toml_float(*value); },
                               [](const std::string* value) { return toml_string(*value); },
                               [](const std::vector<std::string>* values) {
                                 std::string text = "[";
                                 for (const std::string& value : *values) {
                                   text += (text.size() > 1 ? ", " : "") + toml_string(value);
                                 }
                                 return text + "]";
                               }},
                    field_of(row, settings));
}

}  // namespace moed
