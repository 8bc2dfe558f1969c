// A scheduler and a fake engine live through seeded worlds: arrivals, lengths, priorities, choices, cancels in every
// phase, one KV pool or two, shortage of blocks and rows, interactive passes between the layers of bulk ones. After
// each step the scheduler's invariants are checked; each token is compared with the one that its own tokens alone
// demand.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/scheduler/harness.h"

namespace moed {
namespace {

constexpr int64_t kEventsWanted = 1'000'000;
constexpr int32_t kPromptFamilies = 4;

// What one world is like; drawn from its seed.
struct World {
  SchedulerConfig config;
  StepModel model;
  int32_t num_layers = 2;
  int32_t prompt_max = 0;
  int32_t new_tokens_max = 0;
  int32_t arrival_percent = 0;  // of steps
  int32_t cancel_percent = 0;
  int32_t num_steps = 0;
};

struct Tally {
  int64_t events = 0;  // arrivals, refusals, cancels, drops, passes begun and committed, token events
  int64_t tokens = 0;
  int64_t requests = 0;
  int64_t refusals = 0;
  int64_t cancels_queued = 0;
  int64_t cancels_running = 0;
  int64_t cancels_live = 0;
  int64_t preemptions = 0;
  int64_t copies = 0;
  int64_t cached_tokens = 0;
  int64_t riding = 0;  // decode rows in bulk passes
  int64_t device_steps = 0;
  int64_t mixed_passes = 0;  // with sequences of both pools
  int64_t pool_changes = 0;  // a sequence that started again in the other pool
};

class Simulation {
 public:
  Simulation(uint64_t seed, Tally& tally)
      : random_(seed),
        tally_(tally),
        world_(draw_world()),
        scheduler_(world_.config),
        engine_({.num_layers = world_.num_layers,
                 .rows_max = world_.config.pass_rows_max,
                 .num_blocks = world_.config.num_blocks,
                 .device_blocks = world_.config.device_blocks,
                 .block_tokens = world_.config.block_tokens,
                 .vocab_size = kVocab}) {}

  void run() {
    for (int32_t step = 0; step < world_.num_steps && !failed(); ++step) {
      if (chance(world_.arrival_percent)) arrive();
      if (chance(world_.cancel_percent)) cancel();
      turn();
    }
    int32_t rounds = 0;
    while (!scheduler_.idle() && !failed()) {
      ASSERT_LT(++rounds, 200'000) << "it never ends";
      turn();
    }
    if (failed()) return;
    EXPECT_EQ(scheduler_.stats().blocks_used(), 0);
    EXPECT_EQ(scheduler_.stats().num_running, 0);
    EXPECT_EQ(scheduler_.stats().num_waiting, 0);
    EXPECT_EQ(engine_.num_alive(), 0);
    for (const auto& [id, client] : clients_) EXPECT_EQ(client.num_open, 0) << "request " << id << " has not ended";
    tally_.pool_changes += num_pool_changes_;
    tally_.preemptions += scheduler_.stats().num_preemptions;
    tally_.copies += engine_.num_blocks_copied();
  }

 private:
  struct Choice {
    std::vector<int32_t> tokens;  // prompt, then what came
    int32_t num_events = 0;
    bool ended = false;
  };
  struct Client {
    RequestSpec spec;  // as Request::make returned it
    std::vector<Choice> choices;
    int32_t num_open = 0;
  };

  bool failed() const { return testing::Test::HasFailure(); }
  int32_t between(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(random_); }
  bool chance(int32_t percent) { return between(1, 100) <= percent; }

  World draw_world() {
    World world;
    const int32_t block_tokens = 1 << between(0, 4);
    const auto kv = static_cast<KvPlacement>(std::min(between(0, 3), 2));  // half of them split
    const int32_t num_blocks = between(6, 160);
    const int32_t device_blocks = between(6, kv == KvPlacement::kSplit ? 60 : 160);
    world.config = {.block_tokens = block_tokens,
                    .num_blocks = kv == KvPlacement::kDevice ? 0 : num_blocks,
                    .device_blocks = kv == KvPlacement::kHost ? 0 : device_blocks,
                    .kv = kv,
                    .pass_rows_max = between(2, 64),
                    .sequences_max = between(1, 24),
                    .queue_max = between(1, 40),
                    .queue_tokens_max = chance(30) ? between(20, 600) : 0,
                    .bulk_rows_min = between(1, 24),
                    .reserve_blocks = between(0, 3),
                    .prefix_cache = chance(75)};
    world.model = StepModel(between(0, 100), between(0, 10), 0.001 * between(0, 10));
    world.num_layers = between(1, 4);
    const auto pool_tokens =
        static_cast<int32_t>(std::max(world.config.num_blocks, world.config.device_blocks)) * block_tokens;
    world.prompt_max = std::min(between(1, 150), pool_tokens);
    world.new_tokens_max = std::min(between(1, 60), pool_tokens);
    world.arrival_percent = between(5, 90);
    world.cancel_percent = chance(30) ? 0 : between(1, 25);
    world.num_steps = between(100, 500);
    return world;
  }

  // Prompts of a family begin alike for a random while, so that the prefix cache has something to find.
  std::vector<int32_t> draw_prompt() {
    const int32_t family = between(0, kPromptFamilies - 1);
    const int32_t length = between(1, world_.prompt_max);
    const int32_t common = between(0, length);
    std::vector<int32_t> prompt(length);
    for (int32_t i = 0; i < length; ++i)
      prompt[i] = i < common ? (family * 7 + i * i) % kVocab : between(0, kVocab - 1);
    return prompt;
  }

  void arrive() {
    RequestSpec spec = make_spec(++last_id_, draw_prompt(), between(0, world_.new_tokens_max));
    spec.arrival_us = chance(90) ? last_id_ : between(0, static_cast<int32_t>(last_id_));
    spec.priority = chance(70) ? 0 : between(-2, 2);
    spec.n = chance(75) ? 1 : between(2, 5);
    spec.prompt_logprobs = chance(10) || spec.max_tokens == 0;
    spec.sampling.seed = chance(50) ? 1 : random_();
    spec.ignore_eos = chance(20);
    spec.eos_token_ids = {0};
    if (chance(30)) spec.stop_token_ids = {between(0, kVocab - 1), between(0, kVocab - 1)};
    if (chance(20)) spec.sampling.min_tokens = between(0, spec.max_tokens);
    if (chance(10)) spec.sampling.num_logprobs = between(0, 3);
    StatusOr<Request> request = Request::make(spec, test_limits());
    ASSERT_TRUE(request.ok()) << request.status().message();
    spec = request->spec();
    ++tally_.events;
    if (!scheduler_.add(std::move(request).value()).ok()) {
      ++tally_.refusals;
      return;
    }
    ++tally_.requests;
    Client& client = clients_[spec.id];
    client.choices.assign(spec.n, {.tokens = spec.prompt});
    client.num_open = spec.n;
    client.spec = std::move(spec);
    open_.push_back(last_id_);
  }

  void cancel() {
    if (open_.empty()) return;
    const RequestId id = open_[between(0, static_cast<int32_t>(open_.size()) - 1)];
    Client& client = clients_.at(id);
    const int32_t choice = chance(50) ? -1 : between(0, client.spec.n - 1);
    const int64_t used = scheduler_.stats().blocks_used();
    const int32_t running = scheduler_.stats().num_running;
    const std::vector<LiveSequence> live = choice < 0 ? scheduler_.finish(id) : scheduler_.finish_choice(id, choice);
    ++tally_.events;
    for (int32_t c = 0; c < client.spec.n; ++c) {
      if ((choice < 0 || c == choice) && !client.choices[c].ended) end(client, c);
    }
    if (!live.empty()) {
      ++tally_.cancels_live;
    } else if (scheduler_.stats().num_running < running) {
      ++tally_.cancels_running;
      EXPECT_LE(scheduler_.stats().blocks_used(), used);
    } else {
      ++tally_.cancels_queued;
    }
    for (const LiveSequence& sequence : live) leave(sequence);
    scheduler_.check_invariants();
  }

  // The server drops at once; a few are left for commit() to find.
  void leave(const LiveSequence& sequence) {
    if (chance(10)) return;
    engine_.drop(pass(sequence.pass), sequence.id);
    scheduler_.dropped(sequence.id);
    ++tally_.events;
  }

  // As the serving loop: a bulk pass when there is none, an interactive pass, some layers of the bulk pass. Sometimes
  // less.
  void turn() {
    bool any = pass(PassKind::kBulk).alive() || pass(PassKind::kInteractive).alive();
    if (!pass(PassKind::kBulk).alive() && chance(90)) any |= begin(PassKind::kBulk);
    if (!pass(PassKind::kInteractive).alive() && chance(90)) any |= begin(PassKind::kInteractive);
    const int32_t layers = between(0, 2 * world_.num_layers);
    for (int32_t i = 0; i < layers; ++i) advance(chance(60) ? PassKind::kInteractive : PassKind::kBulk);
    if (any || scheduler_.idle() || failed()) return;
    // Nothing alive: one of the two kinds must have work, if only after a sequence has left the pool that it outgrew.
    for (int look = 0; look < 2; ++look) {
      if (begin(PassKind::kBulk) || begin(PassKind::kInteractive)) return;
    }
    FAIL() << "nothing can run, but requests wait";
  }

  bool begin(PassKind kind) {
    const auto steps = scheduler_.schedule(kind, world_.model, 0);
    scheduler_.check_invariants();
    if (steps.empty()) return false;
    for (const BlockCopy& copy : scheduler_.block_copies()) engine_.copy_block(copy.pool, copy.from, copy.to);
    for (const StepSequence& step : steps) tally_.riding += kind == PassKind::kBulk && step.num_new == 1 ? 1 : 0;
    count_pools(steps);
    EXPECT_LE(scheduler_.shape(kind).num_rows, world_.config.pass_rows_max);
    pass(kind) = engine_.begin(steps, StepPlan());
    ++tally_.events;
    return true;
  }

  void count_pools(std::span<const StepSequence> steps) {
    std::array<int64_t, 2> num_steps{};
    for (const StepSequence& step : steps) {
      ++num_steps[static_cast<size_t>(step.pool)];
      const auto [known, is_new] = pool_of_.emplace(step.id, step.pool);
      if (is_new || known->second == step.pool) continue;
      known->second = step.pool;
      // Only who was preempted may move.
      EXPECT_LE(++num_pool_changes_, scheduler_.stats().num_preemptions);
    }
    const auto [num_host, num_device] = num_steps;
    EXPECT_TRUE(num_device == 0 || world_.config.kv != KvPlacement::kHost);
    EXPECT_TRUE(num_host == 0 || world_.config.kv != KvPlacement::kDevice);
    tally_.device_steps += num_device;
    tally_.mixed_passes += num_host > 0 && num_device > 0 ? 1 : 0;
  }

  void advance(PassKind kind) {
    if (!pass(kind).alive() || engine_.advance(pass(kind))) return;
    const StepOutput output = engine_.finish(std::exchange(pass(kind), Pass()));
    ++tally_.events;
    for (const TokenEvent& event : scheduler_.commit(kind, output)) receive(event);
    scheduler_.check_invariants();
  }

  void receive(const TokenEvent& event) {
    ++tally_.events;
    Client& client = clients_.at(event.request);
    ASSERT_LT(event.choice, client.spec.n);
    Choice& choice = client.choices[event.choice];
    ASSERT_FALSE(choice.ended) << "request " << event.request << ": an event after the end";
    if (choice.num_events++ == 0) check_first(client, event);
    const RequestSpec& spec = client.spec;
    const auto num_prompt = static_cast<int32_t>(spec.prompt.size());
    ASSERT_EQ(event.has_token, spec.max_tokens > 0);
    if (event.has_token) {
      ++tally_.tokens;
      SamplingParams sampling = spec.sampling;
      sampling.seed += event.choice;
      // Lost, repeated or foreign tokens all fail here: this one must follow from those that came before.
      ASSERT_EQ(event.token.token, fake_next_token(choice.tokens, num_prompt, sampling, kVocab))
          << "request " << event.request << " choice " << event.choice << " token "
          << choice.tokens.size() - num_prompt;
      choice.tokens.push_back(event.token.token);
    }
    const auto is = [&](int32_t id) { return event.has_token && id == event.token.token; };
    const bool stops = std::ranges::any_of(spec.stop_token_ids, is) ||
                       (!spec.ignore_eos && std::ranges::any_of(spec.eos_token_ids, is));
    const bool full = static_cast<int32_t>(choice.tokens.size()) - num_prompt >= spec.max_tokens;
    const FinishReason wanted = stops ? FinishReason::kStop : full ? FinishReason::kLength : FinishReason::kNone;
    ASSERT_EQ(event.finish, wanted) << "request " << event.request;
    if (event.finish != FinishReason::kNone) end(client, event.choice);
  }

  void check_first(const Client& client, const TokenEvent& event) {
    const RequestSpec& spec = client.spec;
    tally_.cached_tokens += event.num_cached_tokens;
    ASSERT_LT(event.num_cached_tokens, static_cast<int32_t>(spec.prompt.size()));
    ASSERT_EQ(event.num_cached_tokens % world_.config.block_tokens, 0);
    if (!spec.prompt_logprobs || event.choice != 0) {
      ASSERT_TRUE(event.prompt_scores.empty());
      return;
    }
    ASSERT_EQ(event.prompt_scores.size(), spec.prompt.size() - 1);
    for (size_t i = 0; i < event.prompt_scores.size(); ++i) {
      ASSERT_EQ(event.prompt_scores[i].token, spec.prompt[i + 1]);
      ASSERT_EQ(event.prompt_scores[i].logprob, fake_logprob(std::span<const int32_t>(spec.prompt).first(i + 2)));
    }
  }

  void end(Client& client, int32_t choice) {
    client.choices[choice].ended = true;
    if (--client.num_open == 0) std::erase(open_, client.spec.id);
  }

  Pass& pass(PassKind kind) { return kind == PassKind::kBulk ? bulk_ : interactive_; }

  std::mt19937_64 random_;
  Tally& tally_;
  const World world_;
  Scheduler scheduler_;
  FakeEngine engine_;
  Pass interactive_;
  Pass bulk_;
  RequestId last_id_ = 0;
  std::map<RequestId, Client> clients_;
  std::vector<RequestId> open_;
  std::map<SequenceId, Pool> pool_of_;
  int64_t num_pool_changes_ = 0;
};

// A broken invariant ends the process before gtest can tell which world it was: the handler says so. All of it is safe
// in a signal handler, and the process still dies of SIGABRT.
volatile std::sig_atomic_t world_seed_length = 0;
char world_seed[64];

void tell_world(int signal) {
  const ssize_t written = write(STDERR_FILENO, world_seed, static_cast<size_t>(world_seed_length));
  static_cast<void>(written);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

// While it lives, an abort prints the seed.
class WorldUnderWay {
 public:
  explicit WorldUnderWay(uint64_t seed) {
    world_seed_length =
        std::snprintf(world_seed, sizeof world_seed, "repeat with MOED_SIM_SEED=%llu MOED_SIM_EVENTS=1\n",
                      static_cast<unsigned long long>(seed));
    before_ = std::signal(SIGABRT, tell_world);
  }
  ~WorldUnderWay() { std::signal(SIGABRT, before_); }
  WorldUnderWay(const WorldUnderWay&) = delete;
  WorldUnderWay& operator=(const WorldUnderWay&) = delete;

 private:
  void (*before_)(int) = SIG_DFL;
};

int64_t events_wanted() {
  const char* text = std::getenv("MOED_SIM_EVENTS");
  return text != nullptr ? std::atoll(text) : kEventsWanted;
}

TEST(SchedulerSimulationDeathTest, ABrokenInvariantTellsTheSeed) {
  const auto broken = [] {
    const WorldUnderWay world(4711);
    Harness harness(SchedulerConfig{.block_tokens = 4, .num_blocks = 8});
    harness.scheduler.commit(PassKind::kBulk, StepOutput());
  };
  EXPECT_EXIT(broken(), testing::KilledBySignal(SIGABRT),
              "no pass of that kind is live(.|\n)*repeat with MOED_SIM_SEED=4711 MOED_SIM_EVENTS=1");
}

TEST(SchedulerSimulation, AMillionEvents) {
  const char* first = std::getenv("MOED_SIM_SEED");
  uint64_t seed = first != nullptr ? std::strtoull(first, nullptr, 10) : 1;
  Tally tally;
  int64_t worlds = 0;
  for (; tally.events < events_wanted(); ++seed, ++worlds) {
    SCOPED_TRACE("MOED_SIM_SEED=" + std::to_string(seed));
    const WorldUnderWay world(seed);
    Simulation(seed, tally).run();
    ASSERT_FALSE(HasFailure()) << "repeat with MOED_SIM_SEED=" << seed << " MOED_SIM_EVENTS=1";
  }
  std::printf(
      "%lld worlds, %lld events: %lld requests, %lld refused, %lld tokens, cancels %lld queued %lld running %lld in "
      "passes, %lld preemptions, %lld block copies, %lld cached tokens, %lld rows rode in bulk passes; %lld steps on "
      "the "
      "device, %lld passes with both pools, %lld moved\n",
      static_cast<long long>(worlds), static_cast<long long>(tally.events), static_cast<long long>(tally.requests),
      static_cast<long long>(tally.refusals), static_cast<long long>(tally.tokens),
      static_cast<long long>(tally.cancels_queued), static_cast<long long>(tally.cancels_running),
      static_cast<long long>(tally.cancels_live), static_cast<long long>(tally.preemptions),
      static_cast<long long>(tally.copies), static_cast<long long>(tally.cached_tokens),
      static_cast<long long>(tally.riding), static_cast<long long>(tally.device_steps),
      static_cast<long long>(tally.mixed_passes), static_cast<long long>(tally.pool_changes));
  if (tally.events < kEventsWanted) return;
  // Every path must have been walked often, or the million means little.
  for (const int64_t count :
       {tally.refusals, tally.cancels_queued, tally.cancels_running, tally.cancels_live, tally.preemptions,
        tally.copies, tally.cached_tokens, tally.riding, tally.device_steps, tally.mixed_passes, tally.pool_changes}) {
    EXPECT_GT(count, 1000);
  }
}

}  // namespace
}  // namespace moed
