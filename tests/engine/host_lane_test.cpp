#include "engine/host_lane.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "model/architectures.h"
#include "tests/engine/engine_box.h"
#include "tests/engine/late_device.h"

namespace moed {
namespace {

class WatchedEvent;

struct Watch {
  std::vector<WatchedEvent*> queries;  // events of halves that wait for their queries
  WatchedEvent* newest = nullptr;
  int64_t num_recorded = 0;
  int num_slices = 0;  // attention that was begun
  int num_slept_past = 0;
};

class WatchedEvent final : public Event {
 public:
  WatchedEvent(std::unique_ptr<Event> event, Watch& watch) : inner(std::move(event)), watch_(watch) {
    watch.newest = this;
  }
  ~WatchedEvent() override { std::erase(watch_.queries, this); }
  bool done() const override { return done_ = done_ || inner->done(); }
  // Whoever sleeps until here sleeps past the queries that come first.
  Status join() override {
    const auto comes_first = [this](const WatchedEvent* queries) { return queries->open() && queries->at_ < at_; };
    if (open()) watch_.num_slept_past += static_cast<int>(std::ranges::count_if(watch_.queries, comes_first));
    done_ = true;
    return inner->join();
  }
  double us_since(const Event& earlier) const override {
    return inner->us_since(*static_cast<const WatchedEvent&>(earlier).inner);
  }
  void recorded() {
    at_ = ++watch_.num_recorded;
    done_ = false;
  }
  const std::unique_ptr<Event> inner;

 private:
  bool open() const { return at_ > 0 && !done_; }
  Watch& watch_;
  int64_t at_ = 0;  // 0: not recorded
  mutable bool done_ = false;
};

class WatchedStream final : public Stream {
 public:
  explicit WatchedStream(std::unique_ptr<Stream> stream) : inner(std::move(stream)) {}
  void copy(void* target, const void* source, int64_t bytes) override { inner->copy(target, source, bytes); }
  void record(Event& event) override {
    static_cast<WatchedEvent&>(event).recorded();
    inner->record(*static_cast<WatchedEvent&>(event).inner);
  }
  void wait(const Event& event) override { inner->wait(*static_cast<const WatchedEvent&>(event).inner); }
  const std::unique_ptr<Stream> inner;
};

// The host device that runs late, with an eye on what the host waits for.
class WatchedDevice final : public Device {
 public:
  explicit WatchedDevice(Watch& watch) : watch_(watch), inner_(late_device(opened("cpu", {.num_threads = 1}))) {}
  std::string_view description() const override { return inner_->description(); }
  bool is_host() const override { return false; }
  StatusOr<Buffer> allocate(int64_t bytes, Memory memory) override { return inner_->allocate(bytes, memory); }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<WatchedStream>(inner_->make_stream()); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<WatchedEvent>(inner_->make_event(), watch_); }
  std::unique_ptr<Event> make_timed_event() override {
    return std::make_unique<WatchedEvent>(inner_->make_timed_event(), watch_);
  }
  // Late ops take no notice of their stream.
  Ops& ops() override { return inner_->ops(); }
  Ops& host_ops() override { return inner_->host_ops(); }
  Stream& host_stream() override { return inner_->host_stream(); }
  // A half makes the event of its queries, then its attention.
  std::unique_ptr<HostAttention> make_host_attention() override {
    watch_.queries.push_back(watch_.newest);
    return std::make_unique<CountedAttention>(inner_->make_host_attention(), watch_);
  }

 private:
  class CountedAttention final : public HostAttention {
   public:
    CountedAttention(std::unique_ptr<HostAttention> inner, Watch& watch) : inner_(std::move(inner)), watch_(watch) {}
    void begin(const Attention& args) override { inner_->begin(args); }
    void run(double slice_us) override {
      ++watch_.num_slices;
      inner_->run(slice_us);
    }
    bool done() const override { return inner_->done(); }

   private:
    std::unique_ptr<HostAttention> inner_;
    Watch& watch_;
  };
  void release(std::byte*, int64_t, Memory) override { FAIL() << "a buffer belongs to the device that made it"; }

  Watch& watch_;
  std::unique_ptr<Device> inner_;
};

// Without copies to feed the host may sleep, but not while a half's attention could be computed.
TEST(HostLane, SleepsOnlyUntilTheNextQueries) {
  const Model model = parse_tiny(tiny_models()[0]);
  const auto source = dummy_weights(model, 3);
  Watch watch;
  {
    EngineBox box(model, *source, std::make_unique<WatchedDevice>(watch),
                  {.rows_max = 40, .sequences_max = 4, .max_model_len = 128, .kv_blocks = 16, .block_tokens = 16});
    const std::vector<int32_t> tokens(8, 1);
    const std::vector<std::vector<int32_t>> blocks = {{0}, {1}};
    std::vector<StepSequence> sequences(2);
    for (int32_t i = 0; i < 2; ++i) {
      sequences[i].tokens = tokens;
      sequences[i].id = i;
      sequences[i].num_prompt = sequences[i].num_new = static_cast<int32_t>(tokens.size());
      sequences[i].blocks = blocks[i];
      sequences[i].pool = Pool::kHost;
    }
    Pass pass = box.engine().begin(sequences, box.plan(1));
    while (box.engine().advance(pass)) {
    }
    box.engine().finish(std::move(pass));
  }
  EXPECT_GE(watch.num_slices, 2 * model.config.num_layers);
  EXPECT_EQ(watch.num_slept_past, 0);
}

}  // namespace
}  // namespace moed
