#pragma once

#include <cstdint>
#include <vector>

#include "engine/hybrid_engine.h"
#include "engine/running_pass.h"
#include "engine/sampler.h"
#include "model/weights.h"

namespace moed {

// Final norm and head of the rows that need logits, some rows at a time so that memory stays bounded, and what is
// chosen from them: the next token of each sequence that samples, and scores of prompt tokens. A device with memory of
// its own samples where its logits are; only rows that ask for more than a draw cross to the host. Those are shared out
// among the host's compute threads; which thread takes one changes nothing. Serving thread only.
class Head {
 public:
  // Rows whose logits stand in memory at once: where the host chooses, and where the device draws, which reads the
  // head's weights the less often.
  static constexpr int32_t kRowsMax = 64;
  static constexpr int32_t kDrawnRowsMax = 256;
  // Errors: kResourceExhausted with the bytes asked for.
  static StatusOr<Head> make(const ModelConfig& model, const DenseViews& weights, int32_t rows_max, Device& device,
                             Stream& stream);
  // What make() takes.
  static EngineBytes bytes(const ModelConfig& model, int32_t rows_max, bool device_is_host);

  // Outputs in the order of begin(). REQUIRES: all layers have run.
  std::vector<SequenceOutput> run(RunningPass& pass, HostLane& lane);

 private:
  // A row whose logits are needed: for the token that follows (score_of < 0) or to score that token.
  struct Task {
    int32_t row = 0;  // in the pass's buffers
    size_t output = 0;
    const StepSequence* sequence = nullptr;
    int32_t score_of = -1;
    bool on_device = false;  // the op `sample` chooses
  };
  struct Ordered {
    const Member* member = nullptr;
    int32_t row_begin = 0;  // in the pass's buffers
  };

  Head() = default;
  float* logits() const { return (host_logits_.data() == nullptr ? logits_memory_ : host_logits_).as<float>(); }
  void plan(const RunningPass& pass, std::vector<SequenceOutput>& outputs);
  // Logits of the tasks, those of the first num_crossing on their way to the host, tokens of the others chosen.
  void compute(RunningPass& pass, std::span<const Task> tasks, size_t num_crossing);
  // By the device, of logits in its memory.
  void sample(std::span<const Task> tasks, Matrix<const float> block);
  // The block's first rows over the link, in chunks, an event each; one event where there are none.
  void bring(Matrix<const float> block, size_t num_crossing);
  // tasks[begin, end), whose logits are there.
  void choose(std::span<const Task> tasks, size_t begin, size_t end);
  // What the device chose for tasks[num_crossing, ...).
  void read_tokens(std::span<const Task> tasks, size_t num_crossing);
  void take(std::span<const Task> tasks, std::vector<SequenceOutput>& outputs);
  // How many of the rows that cross the link come together, while the host chooses tokens of those before.
  size_t chunk_rows(size_t num_rows) const;

  const ModelConfig* model_ = nullptr;
  const DenseViews* weights_ = nullptr;
  Device* device_ = nullptr;
  Ops* ops_ = nullptr;
  Stream* stream_ = nullptr;
  std::vector<std::unique_ptr<Event>> arrived_;  // a chunk each
  Buffer rows_memory_;                           // [drawn_rows_max_] row indices, mapped
  Buffer normed_memory_;                         // [drawn_rows_max_, hidden] bf16
  Buffer logits_memory_;                         // [drawn_rows_max_, vocab] fp32
  Buffer host_logits_;  // [rows_max_, vocab], pinned; empty where the device is the host, which reads the others
  // Empty where the device is the host.
  Buffer samples_memory_;       // [drawn_rows_max_] SampleRow, mapped
  Buffer tokens_memory_;        // [drawn_rows_max_], mapped
  int32_t rows_max_ = 0;        // of a block in which some cross
  int32_t drawn_rows_max_ = 0;  // of one in which none does
  int32_t pass_rows_max_ = 0;
  std::vector<Ordered> members_;
  std::vector<Task> tasks_;                // those of the host first
  std::vector<ScoredToken> chosen_;        // of a block of tasks
  std::vector<SamplerScratch> scratches_;  // one a host thread
};

}  // namespace moed
