#include "engine/head.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace moed {

int64_t Head::bytes(const ModelConfig& model, int32_t rows_max) {
  const int64_t rows = std::min(rows_max, kRowsMax);
  return rows * (int64_t{sizeof(int32_t)} + int64_t{model.hidden_size} * int64_t{sizeof(Bf16)} +
                 int64_t{model.vocab_size} * int64_t{sizeof(float)});
}

StatusOr<Head> Head::make(const ModelConfig& model, const DenseWeights& weights, int32_t rows_max, Device& device,
                          Stream& stream) {
  Head head;
  head.model_ = &model;
  head.weights_ = &weights;
  head.device_ = &device;
  head.ops_ = &device.ops();
  head.scratches_.resize(device.num_host_threads());
  head.stream_ = &stream;
  head.done_ = device.make_event();
  head.rows_max_ = std::min(rows_max, kRowsMax);
  head.pass_rows_max_ = rows_max;
  const int64_t rows = head.rows_max_;
  MOED_ASSIGN_OR_RETURN(head.rows_memory_, device.allocate(rows * int64_t{sizeof(int32_t)}, Memory::kMapped));
  MOED_ASSIGN_OR_RETURN(head.normed_memory_,
                        device.allocate(rows * model.hidden_size * int64_t{sizeof(Bf16)}, Memory::kDevice));
  MOED_ASSIGN_OR_RETURN(head.logits_memory_,
                        device.allocate(rows * model.vocab_size * int64_t{sizeof(float)}, Memory::kMapped));
  return head;
}

std::vector<SequenceOutput> Head::run(RunningPass& pass) {
  std::vector<SequenceOutput> outputs;
  plan(pass, outputs);
  const std::span<const Task> tasks(tasks_);
  for (size_t begin = 0; begin < tasks.size(); begin += static_cast<size_t>(rows_max_)) {
    const auto block = tasks.subspan(begin, std::min(tasks.size() - begin, static_cast<size_t>(rows_max_)));
    compute(pass, block);
    pass.clock().mark(Lane::kDense);
    choose(block, outputs);
    pass.clock().mark(Lane::kSample);
  }
  return outputs;
}

void Head::plan(const RunningPass& pass, std::vector<SequenceOutput>& outputs) {
  tasks_.clear();
  for (const Half& half : pass.halves()) {
    for (const Member& member : half.members) {
      const StepSequence& sequence = member.sequence;
      const int32_t row_begin = half.row_begin + member.row_begin;
      for (int32_t row = 0; sequence.prompt_logprobs && row < sequence.num_new; ++row) {
        const int32_t next = sequence.num_cached + row + 1;
        if (next >= sequence.num_prompt) break;
        tasks_.push_back({row_begin + row, outputs.size(), &sequence, sequence.tokens[next]});
      }
      if (sequence.sampling != nullptr) {
        tasks_.push_back({row_begin + sequence.num_new - 1, outputs.size(), &sequence, -1});
      }
      SequenceOutput& output = outputs.emplace_back();
      output.id = sequence.id;
    }
  }
}

void Head::compute(const RunningPass& pass, std::span<const Task> tasks) {
  auto* rows = rows_memory_.as<int32_t>();
  device_->host_access(rows, static_cast<int64_t>(tasks.size() * sizeof(*rows)), Access::kWrite);
  for (size_t i = 0; i < tasks.size(); ++i) rows[i] = tasks[i].row;
  const auto num_rows = static_cast<int32_t>(tasks.size());
  const Matrix<Bf16> normed(normed_memory_.as<Bf16>(), num_rows, model_->hidden_size);
  const Matrix<float> logits(logits_memory_.as<float>(), num_rows, model_->vocab_size);
  const RowViews all = pass.buffers().rows(0, pass_rows_max_);
  ops_->rms_norm(all.residual, {rows, tasks.size()}, weights_->final_norm(), model_->rms_norm_eps, normed, *stream_);
  ops_->linear(normed, {weights_->head(), nullptr, model_->hidden_size, model_->vocab_size}, false, logits, *stream_);
  stream_->record(*done_);
  const Status joined = done_->join();
  MOED_CHECK(joined.ok()) << joined.message();
}

void Head::choose(std::span<const Task> tasks, std::vector<SequenceOutput>& outputs) {
  const auto vocab = static_cast<size_t>(model_->vocab_size);
  device_->host_access(logits_memory_.data(), static_cast<int64_t>(tasks.size() * vocab * sizeof(float)),
                       Access::kUpdate);
  chosen_.resize(tasks.size());
  device_->run_host(static_cast<int64_t>(tasks.size()), [&](int64_t i, int thread) {
    const StepSequence& sequence = *tasks[i].sequence;
    const std::span<float> logits(logits_memory_.as<float>() + static_cast<size_t>(i) * vocab, vocab);
    SamplerScratch& scratch = scratches_[thread];
    if (tasks[i].score_of >= 0) {
      chosen_[i] = score_token(logits, tasks[i].score_of, sequence.num_prompt_top, scratch);
    } else {
      const SampleContext context{sequence.tokens, sequence.num_prompt, *sequence.sampling, sequence.allowed};
      chosen_[i] = sample_token(logits, context, scratch);
    }
  });
  for (size_t i = 0; i < tasks.size(); ++i) {
    SequenceOutput& output = outputs[tasks[i].output];
    if (tasks[i].score_of >= 0) {
      output.prompt_scores.push_back(std::move(chosen_[i]));
    } else {
      output.sampled = std::move(chosen_[i]);
    }
  }
}

}  // namespace moed
