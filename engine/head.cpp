#include "engine/head.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace moed {
namespace {

// Logits come over the link in so many pieces at most, of so many rows at least.
constexpr size_t kChunksMax = 4;
constexpr size_t kChunkRowsMin = 8;

SampleContext context_of(const StepSequence& sequence) {
  return {sequence.tokens, sequence.num_prompt, *sequence.sampling, sequence.allowed};
}

}  // namespace

EngineBytes Head::bytes(const ModelConfig& model, int32_t rows_max, bool device_is_host) {
  const int64_t crossing = std::min(rows_max, kRowsMax);
  const int64_t rows = device_is_host ? crossing : std::min(rows_max, kDrawnRowsMax);
  const int64_t logits_row = model.vocab_size * int64_t{sizeof(float)};
  EngineBytes bytes{.device_bytes = rows * (model.hidden_size * int64_t{sizeof(Bf16)} + logits_row),
                    .host_bytes = rows * int64_t{sizeof(int32_t)}};
  if (!device_is_host) bytes.host_bytes += crossing * logits_row + rows * int64_t{sizeof(SampleRow) + sizeof(int32_t)};
  return bytes;
}

StatusOr<Head> Head::make(const ModelConfig& model, const DenseViews& weights, int32_t rows_max, Device& device,
                          Stream& stream) {
  Head head;
  head.model_ = &model;
  head.weights_ = &weights;
  head.device_ = &device;
  head.ops_ = &device.ops();
  head.scratches_.resize(device.num_host_threads());
  head.stream_ = &stream;
  for (size_t i = 0; i < (device.is_host() ? 1 : kChunksMax); ++i) head.arrived_.push_back(device.make_event());
  head.rows_max_ = std::min(rows_max, kRowsMax);
  head.drawn_rows_max_ = device.is_host() ? head.rows_max_ : std::min(rows_max, kDrawnRowsMax);
  head.pass_rows_max_ = rows_max;
  const int64_t rows = head.drawn_rows_max_;
  MOED_ASSIGN_OR_RETURN(head.rows_memory_, device.allocate(rows * int64_t{sizeof(int32_t)}, Memory::kMapped));
  MOED_ASSIGN_OR_RETURN(head.normed_memory_,
                        device.allocate(rows * model.hidden_size * int64_t{sizeof(Bf16)}, Memory::kDevice));
  const int64_t logits_row = model.vocab_size * int64_t{sizeof(float)};
  MOED_ASSIGN_OR_RETURN(head.logits_memory_, device.allocate(rows * logits_row, Memory::kDevice));
  if (!device.is_host()) {
    MOED_ASSIGN_OR_RETURN(head.host_logits_, device.allocate(head.rows_max_ * logits_row, Memory::kPinned));
    MOED_ASSIGN_OR_RETURN(head.samples_memory_, device.allocate(rows * int64_t{sizeof(SampleRow)}, Memory::kMapped));
    MOED_ASSIGN_OR_RETURN(head.tokens_memory_, device.allocate(rows * int64_t{sizeof(int32_t)}, Memory::kMapped));
  }
  return head;
}

std::vector<SequenceOutput> Head::run(RunningPass& pass, HostLane& lane) {
  std::vector<SequenceOutput> outputs;
  plan(pass, outputs);
  const std::span<const Task> tasks(tasks_);
  for (size_t begin = 0; begin < tasks.size();) {
    const auto rows_max = static_cast<size_t>(tasks[begin].on_device ? drawn_rows_max_ : rows_max_);
    const auto block = tasks.subspan(begin, std::min(tasks.size() - begin, rows_max));
    begin += block.size();
    const auto num_crossing = static_cast<size_t>(
        std::count_if(block.begin(), block.end(), [](const Task& task) { return !task.on_device; }));
    compute(pass, block, num_crossing);
    chosen_.resize(block.size());
    const size_t rows = chunk_rows(num_crossing);
    for (size_t first = 0; first < num_crossing; first += rows) {
      lane.wait(*arrived_[first / rows], pass);
      pass.clock().mark(Lane::kDense);
      lane.pump();
      choose(block, first, std::min(first + rows, num_crossing));
      lane.pump();
      pass.clock().mark(Lane::kSample);
    }
    if (num_crossing == 0) lane.wait(*arrived_[0], pass);
    read_tokens(block, num_crossing);
    take(block, outputs);
  }
  return outputs;
}

void Head::plan(const RunningPass& pass, std::vector<SequenceOutput>& outputs) {
  members_.clear();
  for (const Half& half : pass.halves()) {
    for (const Member& member : half.members) members_.push_back({&member, half.row_begin + member.row_begin});
  }
  std::sort(members_.begin(), members_.end(),
            [](const Ordered& a, const Ordered& b) { return a.member->order < b.member->order; });
  tasks_.clear();
  for (const auto& [member, row_begin] : members_) {
    const StepSequence& sequence = member->sequence;
    for (int32_t row = 0; sequence.prompt_logprobs && row < sequence.num_new; ++row) {
      const int32_t next = sequence.num_cached + row + 1;
      if (next >= sequence.num_prompt) break;
      tasks_.push_back({row_begin + row, outputs.size(), &sequence, sequence.tokens[next]});
    }
    if (sequence.sampling != nullptr) {
      tasks_.push_back({row_begin + sequence.num_new - 1, outputs.size(), &sequence, -1,
                        !device_->is_host() && only_draws(context_of(sequence))});
    }
    SequenceOutput& output = outputs.emplace_back();
    output.id = sequence.id;
  }
  // Scores of a prompt keep their order.
  std::stable_partition(tasks_.begin(), tasks_.end(), [](const Task& task) { return !task.on_device; });
}

size_t Head::chunk_rows(size_t num_rows) const {
  return std::max(kChunkRowsMin, (num_rows + arrived_.size() - 1) / arrived_.size());
}

void Head::compute(RunningPass& pass, std::span<const Task> tasks, size_t num_crossing) {
  auto* rows = rows_memory_.as<int32_t>();
  device_->host_access(rows, static_cast<int64_t>(tasks.size() * sizeof(*rows)), Access::kWrite);
  for (size_t i = 0; i < tasks.size(); ++i) rows[i] = tasks[i].row;
  const auto num_rows = static_cast<int32_t>(tasks.size());
  const Matrix<Bf16> normed(normed_memory_.as<Bf16>(), num_rows, model_->hidden_size);
  const Matrix<float> block(logits_memory_.as<float>(), num_rows, model_->vocab_size);
  const RowViews all = pass.buffers().rows(0, pass_rows_max_);
  ops_->rms_norm(all.residual, {rows, tasks.size()}, weights_->final_norm, model_->rms_norm_eps, normed, *stream_);
  ops_->linear(normed, {weights_->head, nullptr, model_->hidden_size, model_->vocab_size}, false, block, *stream_);
  if (num_crossing < tasks.size()) {
    pass.clock().mark(Lane::kDense);
    const auto begin = static_cast<int32_t>(num_crossing);
    sample(tasks.subspan(num_crossing), block.slice(begin, num_rows - begin));
    pass.clock().mark(Lane::kSample);
  }
  bring(block, num_crossing);
}

void Head::sample(std::span<const Task> tasks, Matrix<const float> block) {
  auto* rows = samples_memory_.as<SampleRow>();
  device_->host_access(rows, static_cast<int64_t>(tasks.size() * sizeof(*rows)), Access::kWrite);
  for (size_t i = 0; i < tasks.size(); ++i) rows[i] = draw_of(context_of(*tasks[i].sequence));
  ops_->sample({.logits = block, .rows = {rows, tasks.size()}, .tokens = tokens_memory_.as<int32_t>()}, *stream_);
}

void Head::bring(Matrix<const float> block, size_t num_crossing) {
  const size_t rows_a_chunk = chunk_rows(num_crossing);
  for (size_t first = 0; first < num_crossing; first += rows_a_chunk) {
    const size_t chunk = std::min(rows_a_chunk, num_crossing - first);
    const size_t offset = first * static_cast<size_t>(model_->vocab_size);
    if (logits() != block.data) {
      stream_->copy(logits() + offset, block.data + offset,
                    static_cast<int64_t>(chunk) * model_->vocab_size * int64_t{sizeof(float)});
    }
    stream_->record(*arrived_[first / rows_a_chunk]);
  }
  if (num_crossing == 0) stream_->record(*arrived_[0]);
}

void Head::choose(std::span<const Task> tasks, size_t begin, size_t end) {
  const auto vocab = static_cast<size_t>(model_->vocab_size);
  device_->host_access(logits() + begin * vocab, static_cast<int64_t>((end - begin) * vocab * sizeof(float)),
                       Access::kUpdate);
  device_->run_host(static_cast<int64_t>(end - begin), [&](int64_t task, int thread) {
    const size_t i = begin + static_cast<size_t>(task);
    const StepSequence& sequence = *tasks[i].sequence;
    const std::span<float> row(logits() + i * vocab, vocab);
    SamplerScratch& scratch = scratches_[thread];
    if (tasks[i].score_of >= 0) {
      chosen_[i] = score_token(row, tasks[i].score_of, sequence.num_prompt_top, scratch);
    } else {
      chosen_[i] = sample_token(row, context_of(sequence), scratch);
    }
  });
}

void Head::read_tokens(std::span<const Task> tasks, size_t num_crossing) {
  if (num_crossing == tasks.size()) return;
  const auto* tokens = tokens_memory_.as<int32_t>();
  device_->host_access(tokens, static_cast<int64_t>((tasks.size() - num_crossing) * sizeof(*tokens)), Access::kRead);
  for (size_t i = num_crossing; i < tasks.size(); ++i) {
    const int32_t token = tokens[i - num_crossing];
    MOED_CHECK(token < model_->vocab_size) << "sampled " << token;
    chosen_[i] = {.token = token < 0 ? kNoToken : token};
  }
}

void Head::take(std::span<const Task> tasks, std::vector<SequenceOutput>& outputs) {
  for (size_t i = 0; i < tasks.size(); ++i) {
    SequenceOutput& output = outputs[tasks[i].output];
    output.broken = output.broken || chosen_[i].token == kNoToken;
    if (tasks[i].score_of >= 0) {
      output.prompt_scores.push_back(std::move(chosen_[i]));
    } else {
      output.sampled = std::move(chosen_[i]);
    }
  }
}

}  // namespace moed
