#include "server/bench_loop.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/lane_estimate.h"
#include "plan/bound.h"

namespace moed {
namespace {

constexpr int64_t kTokensMax = int64_t{1} << 24;
constexpr int32_t kClientsMax = 65'536;

struct Client {
  double arrival_us = 0.0;
  double first_us = 0.0;
  double last_us = 0.0;
  int32_t tokens = 0;
  int32_t requests = 0;  // of which a first token came
  bool idle = true;
};

BenchLatency latency(std::vector<double> us) {
  if (us.empty()) return {};
  std::sort(us.begin(), us.end());
  double sum = 0.0;
  for (const double one : us) sum += one;
  return {sum / static_cast<double>(us.size()) / 1e3, us[us.size() / 2] / 1e3, us.back() / 1e3};
}

void add(StepTimes& sum, const StepTimes& times) {
  sum.total_us += times.total_us;
  sum.attention_us += times.attention_us;
  sum.experts_us += times.experts_us;
  sum.dense_us += times.dense_us;
  sum.sample_us += times.sample_us;
}

class BenchLoop {
 public:
  BenchLoop(const BenchInputs& inputs, const BenchWorkload& workload)
      : inputs_(inputs),
        workload_(workload),
        engine_(inputs.opened.engine()),
        scheduler_(inputs.scheduler),
        tracker_(inputs.prior),
        num_requests_(workload.requests > 0 ? workload.requests : workload.clients),
        random_(workload.seed),
        clients_(std::min(workload.clients, num_requests_)) {}

  StatusOr<BenchResult> run() {
    result_.begin = counts();
    for (size_t client = 0; client < clients_.size(); ++client) MOED_RETURN_IF_ERROR(send(client));
    while (!scheduler_.idle()) {
      if (!bulk_.alive()) begin(PassKind::kBulk);
      if (begin(PassKind::kInteractive)) {
        while (engine_.advance(interactive_)) {
        }
        MOED_RETURN_IF_ERROR(commit(PassKind::kInteractive));
      }
      for (int32_t layer = 0; bulk_.alive() && layer < inputs_.yield_layers; ++layer) {
        if (!engine_.advance(bulk_)) MOED_RETURN_IF_ERROR(commit(PassKind::kBulk));
      }
    }
    result_.end = counts();
    if (!steady_ended_) result_.steady_end = steady_begun_ ? result_.end : result_.steady_begin;
    result_.first_token = latency(first_us_);
    result_.token = latency(token_us_);
    result_.token_beside_long = latency(beside_us_);
    result_.preemptions = scheduler_.stats().num_preemptions;
    return result_;
  }

 private:
  static constexpr RequestId kLongRequest = -1;

  int64_t now_us() const { return std::llround(inputs_.opened.now_us()); }
  Pass& pass(PassKind kind) { return kind == PassKind::kBulk ? bulk_ : interactive_; }

  BenchCounts counts() const {
    BenchCounts now = sums_;
    now.at_us = inputs_.opened.now_us();
    now.device = inputs_.opened.totals();
    now.engine = engine_.stats();
    return now;
  }

  Status add_request(RequestId id, int32_t prompt_tokens, int32_t new_tokens) {
    RequestSpec spec;
    spec.id = id;
    // SplitMix64's steps; prompts differ, so that the prefix cache finds nothing.
    for (int32_t i = 0; i < prompt_tokens; ++i) {
      random_ += 0x9e3779b97f4a7c15ULL;
      const uint64_t mixed = (random_ ^ (random_ >> 30)) * 0xbf58476d1ce4e5b9ULL;
      spec.prompt.push_back(static_cast<int32_t>((mixed >> 32) % static_cast<uint64_t>(inputs_.model.vocab_size)));
    }
    spec.sampling.temperature = 0.0F;
    spec.max_tokens = new_tokens;
    spec.ignore_eos = true;
    spec.arrival_us = now_us();
    RequestLimits limits;
    limits.vocab_size = inputs_.model.vocab_size;
    limits.max_model_len = inputs_.scheduler.max_model_len;
    limits.n_max = 1;
    limits.new_tokens_max = inputs_.scheduler.max_model_len;
    MOED_ASSIGN_OR_RETURN(Request request, Request::make(std::move(spec), limits));
    return scheduler_.add(std::move(request));
  }

  Status send(size_t client) {
    clients_[client] = {.arrival_us = inputs_.opened.now_us(), .requests = clients_[client].requests, .idle = false};
    ++num_sent_;
    return add_request(static_cast<RequestId>(client), workload_.prompt_tokens, workload_.new_tokens);
  }

  bool begin(PassKind kind) {
    const auto sequences = scheduler_.schedule(kind, tracker_.model(), now_us());
    if (sequences.empty()) return false;
    for (const BlockCopy& copy : scheduler_.block_copies()) engine_.copy_block(copy.pool, copy.from, copy.to);
    const StepShape shape = scheduler_.shape(kind);
    attended_tokens_.clear();
    for (const StepSequence& sequence : sequences) {
      StepShape one;
      one.add(sequence.num_cached, sequence.num_new, sequence.sampling != nullptr);
      attended_tokens_.push_back(one.attended_tokens);
    }
    const Planning& planning = inputs_.planning;
    const StepPlan plan = planning.policy->plan({.shape = shape,
                                                 .attended_tokens = attended_tokens_,
                                                 .config = inputs_.model,
                                                 .residency = planning.residency,
                                                 .rates = planning.rates,
                                                 .halves = planning.halves});
    if (inputs_.opened.is_simulated()) add_bound(sequences, shape);
    pass(kind) = engine_.begin(sequences, plan);
    ++sums_.passes[static_cast<size_t>(kind)];
    sums_.rows += shape.num_rows;
    return true;
  }

  void add_bound(std::span<const StepSequence> sequences, const StepShape& shape) {
    int64_t host_tokens = 0;
    for (const StepSequence& sequence : sequences) {
      // Prompts attend on the device wherever their KV is to be.
      if (sequence.pool == Pool::kHost && sequence.num_new == 1) host_tokens += sequence.num_cached + 1;
    }
    const double host_share = static_cast<double>(host_tokens) / static_cast<double>(shape.context_tokens);
    const LeastWork work = least_work(inputs_.model, shape, inputs_.planning, host_share);
    const Bound bound = closed_form_bound(inputs_.opened.profile(), work);
    sums_.bound_us += bound.us();
    sums_.part_bounds_us[0] += bound.link_us;
    sums_.part_bounds_us[1] += bound.host_us;
    sums_.part_bounds_us[2] += bound.device_us;
  }

  Status commit(PassKind kind) {
    const StepShape shape = scheduler_.shape(kind);
    const StepOutput output = engine_.finish(std::exchange(pass(kind), Pass()));
    tracker_.observe(shape, output.times.total_us);
    add(sums_.lanes, lane_estimate_.of(output.times));
    for (const TokenEvent& event : scheduler_.commit(kind, output)) MOED_RETURN_IF_ERROR(take(event));
    if (!steady_begun_ &&
        std::all_of(clients_.begin(), clients_.end(), [](const Client& c) { return c.requests > 0; })) {
      steady_begun_ = true;
      result_.steady_begin = counts();
    }
    if (steady_begun_ && !steady_ended_ &&
        std::any_of(clients_.begin(), clients_.end(), [](const Client& c) { return c.idle; })) {
      steady_ended_ = true;
      result_.steady_end = counts();
    }
    if (workload_.long_prompt_tokens > 0 && !long_sent_ &&
        std::all_of(clients_.begin(), clients_.end(),
                    [&](const Client& c) { return c.tokens >= workload_.long_after_tokens; })) {
      long_sent_ = true;
      long_arrival_us_ = inputs_.opened.now_us();
      MOED_RETURN_IF_ERROR(add_request(kLongRequest, workload_.long_prompt_tokens, 1));
    }
    if (inputs_.passed) inputs_.passed(steady_begun_);
    return {};
  }

  Status take(const TokenEvent& event) {
    const double at_us = inputs_.opened.now_us();
    if (event.request == kLongRequest) {
      long_end_us_ = at_us;
      result_.long_prompt_ms = (at_us - long_arrival_us_) / 1e3;
      return {};
    }
    Client& client = clients_[static_cast<size_t>(event.request)];
    if (event.has_token) {
      ++sums_.new_tokens;
      if (client.tokens++ == 0) {
        client.first_us = at_us;
        ++client.requests;
        sums_.prompt_tokens += workload_.prompt_tokens;
        first_us_.push_back(at_us - client.arrival_us);
      } else if (long_sent_ && client.last_us < long_end_us_) {
        beside_us_.push_back(at_us - client.last_us);
      }
      client.last_us = at_us;
    }
    if (event.finish == FinishReason::kNone) return {};
    if (client.tokens > 1) token_us_.push_back((client.last_us - client.first_us) / (client.tokens - 1));
    if (num_sent_ < num_requests_) return send(static_cast<size_t>(event.request));
    clients_[static_cast<size_t>(event.request)].idle = true;
    return {};
  }

  const BenchInputs& inputs_;
  const BenchWorkload& workload_;
  Engine& engine_;
  Scheduler scheduler_;
  Tracker tracker_;
  LaneEstimate lane_estimate_;
  const int32_t num_requests_;
  uint64_t random_;
  std::vector<Client> clients_;
  int32_t num_sent_ = 0;
  Pass interactive_;
  Pass bulk_;
  std::vector<int64_t> attended_tokens_;
  BenchCounts sums_;
  BenchResult result_;
  bool steady_begun_ = false;
  bool steady_ended_ = false;
  bool long_sent_ = false;
  double long_arrival_us_ = 0.0;
  double long_end_us_ = std::numeric_limits<double>::infinity();
  std::vector<double> first_us_;
  std::vector<double> token_us_;
  std::vector<double> beside_us_;
};

Status check(int64_t value, int64_t least, int64_t most, const char* field) {
  if (value >= least && value <= most) return {};
  return invalid_argument(std::string("--") + field + " is " + std::to_string(value) + ", but must be from " +
                              std::to_string(least) + " to " + std::to_string(most),
                          field);
}

}  // namespace

StatusOr<BenchResult> run_bench(const BenchInputs& inputs, const BenchWorkload& workload) {
  MOED_RETURN_IF_ERROR(check(workload.clients, 1, kClientsMax, "clients"));
  MOED_RETURN_IF_ERROR(check(workload.requests, 0, kTokensMax, "requests"));
  MOED_RETURN_IF_ERROR(check(workload.prompt_tokens, 1, kTokensMax, "prompt"));
  MOED_RETURN_IF_ERROR(check(workload.new_tokens, 1, kTokensMax, "new"));
  MOED_RETURN_IF_ERROR(check(workload.long_prompt_tokens, 0, kTokensMax, "long-prompt"));
  if (workload.long_prompt_tokens > 0) {
    MOED_RETURN_IF_ERROR(check(workload.long_after_tokens, 1, workload.new_tokens, "long-after"));
  }
  MOED_RETURN_IF_ERROR(validate(inputs.scheduler));
  return BenchLoop(inputs, workload).run();
}

}  // namespace moed
