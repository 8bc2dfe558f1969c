#include "server/daemon.h"

#include <algorithm>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/log.h"
#include "server/generation.h"
#include "server/scheduling.h"

#ifndef MOED_VERSION
#define MOED_VERSION "unknown"
#endif

namespace moed {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kTextThreads = 2;
constexpr size_t kNameBytesMax = 128;  // of a name that an error repeats
// Between two lines of the log about loading.
constexpr int64_t kProgressUs = 2'000'000;
// Events of a choice that a door may leave unread before its request is dropped.
constexpr size_t kEventsMax = 16'384;

double gib(int64_t bytes) { return static_cast<double>(bytes) / static_cast<double>(int64_t{1} << 30); }

std::string folder_name(const std::string& path) {
  const std::filesystem::path normal = std::filesystem::path(path).lexically_normal();
  const std::string name = normal.filename().string();
  return name.empty() ? normal.parent_path().filename().string() : name;
}

std::vector<std::string> served_names(const Settings& settings) {
  if (!settings.model.served_model_name.empty()) return settings.model.served_model_name;
  return {folder_name(settings.model.path)};
}

// tokenizer_config.json's eos_token, spelled as a string or an object with `content`.
std::optional<std::string> tokenizer_eos(const std::string& model_dir) {
  std::ifstream file(std::filesystem::path(model_dir) / "tokenizer_config.json");
  const Json json = Json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("eos_token")) return std::nullopt;
  const Json& eos = json["eos_token"];
  if (eos.is_string()) return eos.get<std::string>();
  if (eos.is_object() && eos.contains("content") && eos["content"].is_string())
    return eos["content"].get<std::string>();
  return std::nullopt;
}

// What a call's task keeps in memory while it waits.
int64_t text_bytes(const GenerationParams& params) {
  size_t bytes = params.messages_json.size() + params.template_kwargs_json.size();
  for (const PromptInput& prompt : params.prompts) bytes += prompt.text.size() + prompt.ids.size() * sizeof(int64_t);
  for (const auto* const texts : {&params.stop, &params.bad_words}) {
    for (const std::string& text : *texts) bytes += sizeof(std::string) + text.size();
  }
  bytes += params.stop_token_ids.size() * sizeof(int64_t);
  if (params.allowed_token_ids) bytes += params.allowed_token_ids->size() * sizeof(int64_t);
  bytes += params.logit_bias.size() * sizeof params.logit_bias.front();
  return static_cast<int64_t>(bytes);
}

// A client's model name may be as long as a body, and errors travel in gRPC's metadata.
std::string shown_name(std::string_view name) {
  std::string shown;
  for (const char c : name.substr(0, kNameBytesMax)) {
    shown += c >= 0x20 && c < 0x7f ? std::string(1, c) : fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
  }
  return name.size() > kNameBytesMax ? shown + "..." : shown;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// null where the device has no memory of its own.
Json device_budget_json(const DeviceBudget& budget) {
  if (budget.memory_bytes == 0) return nullptr;
  return {{"memory_bytes", budget.memory_bytes},         {"dense_weight_bytes", budget.dense_weight_bytes},
          {"activation_bytes", budget.activation_bytes}, {"kv_bytes", budget.kv_bytes},
          {"staging_bytes", budget.staging_bytes},       {"expert_slot_bytes", budget.slot_bytes},
          {"rounding_bytes", budget.rounding_bytes},     {"kv_blocks", budget.kv_blocks}};
}

Json budget_json(const MemoryBudget& budget) {
  return {{"dense_weight_bytes", budget.dense_weight_bytes},
          {"expert_weight_bytes", budget.expert_weight_bytes},
          {"kv_bytes", budget.kv_bytes},
          {"activation_bytes", budget.activation_bytes},
          {"process_bytes", budget.process_bytes},
          {"free_bytes", budget.free_bytes},
          {"kv_blocks", budget.kv_blocks},
          {"max_model_len", budget.max_model_len},
          {"device", device_budget_json(budget.device)}};
}

// What the daemon was told about placement, as far as it was decided at start.
Json planning_json(const Backend& backend) {
  const Planning planning = backend.planning();
  const DeviceBudget& device = backend.budget().device;
  Json json = {{"policy", planning.policy->name},
               {"kv", name_of(planning.kv)},
               {"halves", planning.halves},
               {"expert_slots", device.num_slots},
               {"resident_experts", planning.residency.resident.size()},
               {"staging_blocks", device.staging_blocks}};
  if (const auto pins = backend.pins()) {
    json["host_experts"] = {{"bytes", pins->expert_bytes},
                            {"pinned_bytes", pins->pinned_bytes},
                            {"refusal", pins->refusal.empty() ? Json(nullptr) : Json(pins->refusal)}};
  }
  return json;
}

}  // namespace

Daemon::Daemon(Settings settings, ApiKeys keys)
    : settings_(std::move(settings)),
      keys_(std::move(keys)),
      names_(served_names(settings_)),
      created_s_(std::time(nullptr)),
      metrics_(names_.front()),
      text_pool_(std::make_unique<TextPool>(kTextThreads, static_cast<size_t>(settings_.scheduler.queue_max),
                                            settings_.limits.queued_text_bytes_max)) {}

Daemon::~Daemon() {
  stop();
  text_pool_.reset();
}

Status Daemon::load_text(Loaded& loaded) const {
  const std::string& dir = settings_.model.path;
  MOED_ASSIGN_OR_RETURN(loaded.tokenizer, Tokenizer::load(dir));
  ChatTemplateLimits limits;
  limits.fuel = static_cast<uint64_t>(settings_.limits.template_fuel);
  limits.output_bytes_max = static_cast<uint64_t>(settings_.limits.template_output_bytes);
  auto chat_template = ChatTemplate::load(dir, limits);
  if (chat_template.ok()) {
    loaded.chat_template = std::move(*chat_template);
  } else if (chat_template.status().code() == StatusCode::kNotFound) {
    spdlog::warn("{}; chat requests are refused", chat_template.status().message());
  } else {
    return chat_template.status();
  }
  return Status();
}

Status Daemon::load(const BackendFactory& factory) {
  auto loaded = std::make_unique<Loaded>();
  MOED_ASSIGN_OR_RETURN(loaded->model, load_model_config(settings_.model.path));
  MOED_RETURN_IF_ERROR(load_text(*loaded));
  MOED_ASSIGN_OR_RETURN(
      loaded->backend,
      factory(settings_, loaded->model, [this, said_us = now_us()](int64_t bytes, int64_t total) mutable {
        loaded_bytes_ = bytes;
        total_bytes_ = total;
        if (now_us() - said_us < kProgressUs) return;
        said_us = now_us();
        spdlog::info("loading: {:.1f} of {:.1f} GiB", gib(bytes), gib(total));
      }));
  const MemoryBudget& budget = loaded->backend->budget();

  ValidationContext& context = loaded->context;
  context.tokenizer = loaded->tokenizer.get();
  context.chat_template = loaded->chat_template.get();
  context.defaults = loaded->model.generation;
  if (const std::string line = clamp_defaults(context.defaults); !line.empty()) spdlog::warn("{}", line);
  context.eos_token_ids = loaded->model.generation.eos_token_ids;
  if (const auto eos = tokenizer_eos(settings_.model.path)) {
    const auto id = loaded->tokenizer->token_to_id(*eos);
    auto& ids = context.eos_token_ids;
    if (id.has_value() && std::find(ids.begin(), ids.end(), *id) == ids.end()) ids.push_back(*id);
  }
  context.vocab_size = loaded->model.config.vocab_size;
  context.max_model_len = budget.max_model_len;
  context.limits = settings_.limits;
  context.scheduler = settings_.scheduler;

  const SchedulerConfig scheduling = scheduler_config(settings_, budget, loaded->backend->planning().kv);
  MOED_RETURN_IF_ERROR(validate(scheduling));
  metrics_.set_cache(scheduling.block_tokens, scheduling.num_blocks, scheduling.device_blocks, scheduling.prefix_cache);
  const Planning planning = loaded->backend->planning();
  metrics_.set_plan(planning.policy->name, std::string(name_of(planning.kv)), planning.halves);
  loaded->scheduler = std::make_unique<Scheduler>(scheduling);
  ServingConfig serving;
  serving.queue_max = static_cast<int32_t>(settings_.scheduler.queue_max);
  serving.request_seconds = settings_.limits.request_seconds;
  serving.yield_layers = static_cast<int32_t>(settings_.scheduler.yield_layers);
  serving.planning = loaded->backend->planning();
  loaded->loop = std::make_unique<ServingLoop>(loaded->backend->engine(), *loaded->scheduler, loaded->model.config,
                                               loaded->backend->prior(), metrics_, std::move(serving));
  loaded->loop->start();
  storage_ = std::move(loaded);
  loaded_.store(storage_.get(), std::memory_order_release);
  state_ = ServerState::kReady;
  return Status();
}

void Daemon::drain(double seconds) {
  state_ = ServerState::kDraining;
  const int64_t deadline = now_us() + static_cast<int64_t>(seconds * 1e6);
  if (storage_ == nullptr) return;
  // In this order: a call is known to the loop before it is no longer being prepared.
  while ((num_preparing_ > 0 || storage_->loop->num_open() > 0) && now_us() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

void Daemon::stop() {
  state_ = ServerState::kDraining;
  if (storage_ == nullptr || stopped_) return;
  stopped_ = true;
  storage_->loop->stop(Status(StatusCode::kUnavailable, "the server is shutting down"));
}

Status Daemon::unavailable() const {
  if (state_ == ServerState::kLoading) return Status(StatusCode::kUnavailable, "the model is loading");
  return Status(StatusCode::kUnavailable, "the server is shutting down");
}

std::shared_ptr<Generation> Daemon::start(GenerationParams params, std::function<void()> wake) {
  Loaded* loaded = loaded_.load(std::memory_order_acquire);
  // Counted before the look at state_: drain() sets that first and counts then, so that one of the two sees the other.
  ++num_preparing_;
  std::shared_ptr<void> preparing(nullptr, [this](void*) { --num_preparing_; });
  const bool ready = loaded != nullptr && state_ == ServerState::kReady;
  auto generation = std::make_shared<GenerationImpl>(now_us(), ready ? loaded->tokenizer.get() : nullptr,
                                                     ready ? loaded->loop.get() : nullptr, std::move(wake));
  Status status = ready ? check_model(params.model) : unavailable();
  if (!status.ok()) {
    generation->refuse(std::move(status));
    return generation;
  }
  // A weak pointer: a door that gave up before its turn came costs no work.
  const int64_t bytes = text_bytes(params);
  status = text_pool_->try_post(
      [this, loaded, preparing = std::move(preparing), weak = std::weak_ptr(generation), params = std::move(params)] {
        const auto alive = weak.lock();
        if (alive == nullptr || alive->cancelled()) return;
        auto valid = validate(params, loaded->context);
        if (!valid.ok()) return alive->refuse(valid.status());
        const RequestId first = next_request_.fetch_add(static_cast<RequestId>(valid->requests.size()));
        alive->run(std::move(*valid), request_limits(loaded->context), first, kEventsMax);
      },
      bytes);
  if (!status.ok()) generation->refuse(std::move(status));
  return generation;
}

void Daemon::tokenize(TokenizeParams params, std::function<void(StatusOr<TokenizeResult>)> done) {
  Loaded* loaded = loaded_.load(std::memory_order_acquire);
  if (loaded == nullptr) return done(unavailable());
  if (Status status = check_model(params.model); !status.ok()) return done(std::move(status));
  const auto bytes =
      static_cast<int64_t>(params.text.size() + params.messages_json.size() + params.template_kwargs_json.size());
  Status status = text_pool_->try_post(
      [loaded, params = std::move(params), done] {
        if (params.abandoned != nullptr && params.abandoned()) {
          return done(Status(StatusCode::kCancelled, "the client is gone"));
        }
        done(tokenize_text(params, loaded->context));
      },
      bytes);
  if (!status.ok()) done(std::move(status));
}

void Daemon::detokenize(std::string model, std::vector<int64_t> tokens,
                        std::function<void(StatusOr<std::string>)> done) {
  Loaded* loaded = loaded_.load(std::memory_order_acquire);
  if (loaded == nullptr) return done(unavailable());
  if (Status status = check_model(model); !status.ok()) return done(std::move(status));
  const auto bytes = static_cast<int64_t>(tokens.size() * sizeof(int64_t));
  const auto run = [loaded, tokens = std::move(tokens)]() -> StatusOr<std::string> {
    std::vector<int32_t> ids;
    for (const int64_t token : tokens) {
      if (token < 0 || token >= loaded->context.vocab_size) {
        return invalid_argument("tokens: " + std::to_string(token) + " is not between 0 and " +
                                    std::to_string(loaded->context.vocab_size - 1),
                                "tokens");
      }
      ids.push_back(static_cast<int32_t>(token));
    }
    return loaded->tokenizer->decode(ids, /*skip_special_tokens=*/false);
  };
  if (Status status = text_pool_->try_post([run, done] { done(run()); }, bytes); !status.ok()) done(std::move(status));
}

Health Daemon::health() const {
  Health health;
  health.state = state_;
  health.loaded_bytes = loaded_bytes_;
  health.total_bytes = total_bytes_;
  const Loaded* loaded = loaded_.load(std::memory_order_acquire);
  const auto layer_us = static_cast<int64_t>(settings_.limits.layer_seconds * 1e6);
  health.alive = loaded == nullptr || now_us() - loaded->loop->heartbeat_us() < layer_us;
  return health;
}

ModelInfo Daemon::model() const {
  const Loaded* loaded = loaded_.load(std::memory_order_acquire);
  return {names_, folder_name(settings_.model.path), loaded == nullptr ? 0 : loaded->context.max_model_len, created_s_};
}

Loads Daemon::loads() const {
  const Loaded* loaded = loaded_.load(std::memory_order_acquire);
  if (loaded == nullptr) return {};
  const SchedulerStats stats = loaded->loop->stats();
  return {stats.num_running, stats.num_waiting, stats.kv_usage()};
}

Status Daemon::check_model(const std::string& name) const {
  if (name.empty() || std::find(names_.begin(), names_.end(), name) != names_.end()) return Status();
  return Status(StatusCode::kNotFound,
                "The model `" + shown_name(name) + "` does not exist; this server has: " + joined(names_), "model",
                "model_not_found");
}

std::string Daemon::info_json() const {
  Json info = {{"version", MOED_VERSION}, {"model", {{"names", names_}, {"root", folder_name(settings_.model.path)}}}};
  if (const Loaded* loaded = loaded_.load(std::memory_order_acquire)) {
    const ModelConfig& config = loaded->model.config;
    info["model"]["architecture"] = config.architecture;
    info["model"]["num_layers"] = config.num_layers;
    info["model"]["hidden_size"] = config.hidden_size;
    info["model"]["vocab_size"] = config.vocab_size;
    info["model"]["num_experts"] = config.moe.num_experts;
    info["model"]["experts_per_token"] = config.moe.router.top_k;
    info["model"]["max_model_len"] = loaded->context.max_model_len;
    info["device"] = loaded->backend->device_description();
    info["memory_budget"] = budget_json(loaded->backend->budget());
    info["plan"] = planning_json(*loaded->backend);
  }
  info["settings"] = Json::parse(settings_json(settings_), nullptr, /*allow_exceptions=*/false);
  return info.dump(2, ' ', false, Json::error_handler_t::replace);
}

std::string Daemon::metrics_text() const { return metrics_.text(); }

bool Daemon::authorized(std::string_view presented) const { return keys_.empty() || keys_.accepts(presented); }

}  // namespace moed
