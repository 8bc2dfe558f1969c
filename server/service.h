#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/shared_vector.h"
#include "base/status.h"
#include "scheduler/request.h"

namespace moed {

// The seam between the doors (HTTP, gRPC) and the daemon: no wire types on either side. Doors fill GenerationParams
// from their own wire; validation, template, tokens and queueing happen behind Service::start, the same for both.

struct PromptInput {
  std::string text;
  std::vector<int64_t> ids;
  bool is_ids = false;
};

// One call of a door, unchecked but for JSON or protobuf types. Unset fields take the model's generation_config.json,
// then OpenAI's default.
struct GenerationParams {
  bool chat = false;
  std::string request_id;  // for the log
  std::string model;       // empty: ours

  std::string messages_json;                // chat: OpenAI's array
  std::string template_kwargs_json = "{}";  // chat: chat_template_kwargs, an object
  bool add_generation_prompt = true;        // chat
  bool continue_final_message = false;      // chat
  std::vector<PromptInput> prompts;         // completions: at least one
  std::optional<bool> add_special_tokens;   // unset: chat false, completions true
  std::optional<int64_t> truncate_prompt_tokens;

  std::optional<double> temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty;
  std::optional<int64_t> top_k, seed, max_tokens, min_tokens;
  const char* max_tokens_field = "max_tokens";  // what the door calls it, for errors
  int64_t n = 1;
  std::vector<std::string> stop;
  bool include_stop_str_in_output = false;
  std::vector<int64_t> stop_token_ids;
  bool ignore_eos = false;
  bool skip_special_tokens = true;
  std::vector<std::pair<int64_t, double>> logit_bias;
  std::optional<std::vector<int64_t>> allowed_token_ids;
  std::vector<std::string> bad_words;
  std::optional<int64_t> logprobs;          // unset: none; else how many alternatives beside the chosen token
  const char* logprobs_field = "logprobs";  // what the door calls that number, for errors
  std::optional<int64_t> prompt_logprobs;   // the same for prompt tokens; does not read the prefix cache
  bool echo = false;              // completions: the prompt's text (and scores, when logprobs is set) comes first
  bool return_token_ids = false;  // deltas carry the prompt's ids
  int64_t priority = 0;
};

// A token as clients see it.
struct TokenText {
  int32_t token = 0;
  std::string bytes;             // raw bytes; may be a part of a UTF-8 character
  std::optional<float> logprob;  // set when logprobs were asked for (never for a prompt's first token)
  struct Alternative {
    int32_t token = 0;
    std::string bytes;
    float logprob = 0.0F;
  };
  std::vector<Alternative> top;  // best first; holds the chosen token when it is among them
};

// What became certain of one choice since the last poll. Text that may begin a stop string is held back, its tokens
// with it.
struct Delta {
  int32_t choice = 0;             // prompt index * n + i
  std::string text;               // complete UTF-8
  std::vector<TokenText> tokens;  // those whose text this is
  // Accepted since the choice's last delta, whatever became of their text: held ones, the stop token, those behind a
  // cut.
  std::vector<int32_t> token_ids;
  int32_t num_tokens = 0;  // accepted so far for this choice, held ones included: for continuous usage
  FinishReason finish = FinishReason::kNone;  // the choice's last delta
  std::string stop_text;                      // the stop string that ended it, or empty
  int32_t stop_token = -1;                    // the stop token id that ended it, or -1
  bool has_prompt = false;  // the first delta of a choice when echo, prompt_logprobs or return_token_ids was asked for
  std::string prompt_text;
  SharedVector<TokenText> prompt_tokens;  // one list for all choices of a prompt
  std::vector<int32_t> prompt_token_ids;  // with return_token_ids
};

struct Usage {
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;
  int64_t completion_tokens = 0;
};

// One call under way. poll(), usage() and the destructor belong to the door's own thread (one at a time); cancel() to
// any. A Generation that dies before it is done cancels.
class Generation {
 public:
  enum class Phase : uint8_t { kPreparing, kRefused, kRunning, kDone, kFailed };
  struct Update {
    Phase phase = Phase::kPreparing;
    Status status;              // kRefused: why, before anything was generated; kFailed: after
    std::vector<Delta> deltas;  // in order; empty most of the time
  };
  virtual ~Generation() = default;
  virtual Update poll() = 0;
  virtual Usage usage() const = 0;
  virtual int32_t num_choices() const = 0;  // prompts * n; known from kRunning on
  virtual void cancel() = 0;
};

enum class ServerState : uint8_t { kLoading, kReady, kDraining };

struct Health {
  ServerState state = ServerState::kLoading;
  bool alive = true;  // the serving thread's heartbeat is fresh
  int64_t loaded_bytes = 0;
  int64_t total_bytes = 0;
};

struct ModelInfo {
  std::vector<std::string> names;  // served names, the first is ours by default
  std::string root;                // the folder's name
  int32_t max_model_len = 0;
  int64_t created_s = 0;  // Unix time
};

struct TokenizeParams {
  std::string model;
  bool chat = false;
  std::string text;
  std::string messages_json;
  bool add_generation_prompt = true;
  std::optional<bool> add_special_tokens;
  std::string template_kwargs_json = "{}";
  std::function<bool()> abandoned;  // may be empty; true: nobody waits, the work is skipped. From the pool's thread
};

struct TokenizeResult {
  std::vector<int32_t> tokens;
  int32_t max_model_len = 0;
};

struct Loads {
  int64_t running = 0;
  int64_t waiting = 0;
  double kv_usage = 0.0;
};

// The daemon, as doors see it. Thread-safe.
class Service {
 public:
  virtual ~Service() = default;
  // Returns at once. `wake` is called from any thread whenever poll() may have news, never while a lock is held that
  // poll() needs; it must not block (post to a strand). It may be called once more after the Generation died.
  virtual std::shared_ptr<Generation> start(GenerationParams params, std::function<void()> wake) = 0;
  // `done` is called once, from a thread of the text pool.
  virtual void tokenize(TokenizeParams params, std::function<void(StatusOr<TokenizeResult>)> done) = 0;
  virtual void detokenize(std::string model, std::vector<int64_t> tokens,
                          std::function<void(StatusOr<std::string>)> done) = 0;
  virtual Health health() const = 0;
  virtual ModelInfo model() const = 0;
  virtual Loads loads() const = 0;
  // kOk, or kNotFound with detail "model_not_found", listing ours. Empty: ours.
  virtual Status check_model(const std::string& name) const = 0;
  virtual std::string info_json() const = 0;
  virtual std::string metrics_text() const = 0;  // Prometheus text format
  // True when no key is set, or when `presented` (the bearer token) is one of the keys; compared as digests, in
  // constant time.
  virtual bool authorized(std::string_view presented) const = 0;
};

}  // namespace moed
