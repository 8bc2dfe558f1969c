#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"

namespace moed {

// Everything that an operator may set. One table (settings_table.cpp) gives each field its TOML key, flag, environment
// variable, range and help; docs/CONFIG.md is written from it. No other file reads flags, files or environment.
struct Settings {
  struct Model {
    std::string path;                            // folder of the checkpoint
    std::string load_format = "auto";            // auto | dummy
    std::vector<std::string> served_model_name;  // empty: the folder's name
    int64_t max_model_len = 0;                   // tokens; 0: the smaller of the model's and what the KV memory holds
  } model;

  struct Server {
    std::string host = "127.0.0.1";
    int64_t http_port = 8000;   // 0: any free port
    int64_t grpc_port = 50051;  // 0: any free port
    std::string api_key_file;   // one key a line
    std::string api_key;        // from MOED_API_KEY only; never printed
    bool insecure = false;      // allow a bind beyond loopback without a key
    double drain_seconds = 30;
    std::vector<std::string> cors_origin;
    std::string log_level = "info";
    bool log_json = false;
  } server;

  struct Device {
    std::string device = "auto";
    double device_memory_gib = 0;  // 0: no cap
    int64_t threads = 0;           // compute threads, the serving thread included; 0: all physical cores allowed
    bool deterministic = false;
  } device;

  struct Memory {
    double host_memory_gib = 0;  // that may be taken; 0: what is free
    double kv_gib = 0;           // of host memory; 0: chosen from what is free
    double device_kv_gib = 0;    // of the device's; 0: chosen from what is left
    bool prefix_cache = true;
  } memory;

  struct Placement {
    std::string policy = "auto";                // plan/policies.cpp lists them
    std::string kv = "auto";                    // auto | host | device | split
    std::vector<std::string> resident_experts;  // one number, or "layer:expert" and "layer:first-last"
    int64_t halves = 1;
    int64_t ring_slots = 0;  // 0: what device memory holds
  } placement;

  struct Scheduler {
    int64_t bulk_rows_min = 64;   // a prefill of more rows runs in a bulk pass
    int64_t pass_rows_max = 512;  // rows in one pass
    int64_t sequences_max = 256;  // running at once
    int64_t queue_max = 1024;     // requests waiting
    int64_t queue_tokens_max = 4'194'304;
    std::string scheduling_policy = "fcfs";  // fcfs | priority
    int64_t yield_layers = 1;                // a bulk pass lets interactive rows in after so many layers
  } scheduler;

  struct Limits {
    int64_t body_bytes_max = 32ll << 20;
    int64_t prompt_tokens_max = 0;  // 0: the context
    int64_t new_tokens_max = 0;     // 0: the context
    int64_t n_max = 64;
    int64_t prompts_max = 1024;  // prompts in one completions request
    int64_t stop_max = 16;
    int64_t stop_bytes_max = 1024;  // of one stop string, or one of bad_words
    int64_t stop_token_ids_max = 64;
    int64_t bad_words_max = 64;
    int64_t top_logprobs_max = 20;
    int64_t scores_max = 1ll << 20;  // log-probabilities in one answer, alternatives and all choices counted
    int64_t logit_bias_max = 1024;
    int64_t json_depth_max = 64;
    int64_t connections_max = 4096;
    int64_t grpc_calls_max = 1024;  // at once on one connection
    int64_t header_bytes_max = 32ll << 10;
    int64_t reading_bytes_max = 256ll << 20;  // of all bodies that are being received or parsed
    int64_t request_id_bytes_max = 128;
    int64_t queued_text_bytes_max = 256ll << 20;  // held by requests whose text waits to be templated and tokenised
    double header_seconds = 10;
    double body_seconds = 30;
    double idle_seconds = 75;
    double write_seconds = 30;
    double ping_seconds = 10;
    double request_seconds = 0;  // 0: no limit
    double layer_seconds = 60;
    int64_t template_fuel = 2'000'000;
    int64_t template_output_bytes = 16ll << 20;
  } limits;
};

struct LoadedSettings {
  Settings settings;
  std::string config_file;            // empty when none was given
  std::vector<std::string> warnings;  // one line each, for the log: unknown MOED_* variables
  bool help = false;                  // --help: print settings_help() and leave
  bool print_config = false;          // --print-config: print settings_toml(settings) and leave
};

// The settings of `moed serve`: flags over environment over the file named by --config (or MOED_CONFIG) over defaults.
// `args`: what follows "serve"; `environment`: "NAME=value" entries, as in environ, ended by a null pointer.
// kInvalidArgument with one line that names the key, where it was set (file:line, flag or variable) and what is
// allowed; for an unknown key or flag, the nearest known one. Unless help or print_config is asked for, a model must be
// named, and a host other than loopback needs a key or `insecure`.
StatusOr<LoadedSettings> load_settings(std::span<const std::string> args, const char* const* environment);

// Where a daemon of these settings answers on this machine.
struct HealthTarget {
  std::string host;  // the address to connect to: loopback when the daemon listens on every address
  int64_t port = 0;
};

// The same settings as `moed serve` has them, for `moed health`; no model is needed. `args`: what follows "health";
// --port is --http-port. kInvalidArgument also when the port is 0, which only the daemon knows.
StatusOr<HealthTarget> load_health_target(std::span<const std::string> args, const char* const* environment);

// What `moed serve --help` prints.
std::string settings_help();
// A TOML file that sets every field to its value in `settings`, without secrets. load_settings reads it back.
std::string settings_toml(const Settings& settings);
// {"limits": {"n_max": 64, ...}, ...}: every field by section, without secrets.
std::string settings_json(const Settings& settings);
// docs/CONFIG.md.
std::string settings_markdown();

}  // namespace moed
