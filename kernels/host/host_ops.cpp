#include "kernels/host/host_ops.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <string>
#include <utility>

#include "base/check.h"

namespace moed {
namespace {

// Rows of an x block whose gate and up sums one thread holds at once.
constexpr int32_t kFfnRows = OneDnn::kRows;
// Columns of a oneDNN call: below some 100 its fixed cost shows.
constexpr int32_t kWideColumnsMin = 96;
constexpr int32_t kWideColumnsMax = 256;
// A task streams about this much of the weights: long enough to pay for handing it out, short enough to balance.
constexpr int64_t kTaskBytes = int64_t{96} << 10;
constexpr int32_t kTaskColumnsMin = 16;
constexpr int32_t kTaskColumnsMax = 64;
// Elements that one task of the row-wise ops touches.
constexpr int64_t kTaskElements = 8192;
// From tick to tick, if work comes in pieces that are shorter.
constexpr std::chrono::microseconds kTickTime{100};

// Rows of W in one task; a multiple of 8, so that only the last task has odd tiles.
int32_t task_columns(int32_t k, int32_t n, int threads) {
  const int64_t by_bytes = kTaskBytes / (int64_t{2} * k);
  const int64_t by_threads = n / (int64_t{4} * threads);
  const int64_t columns = std::clamp<int64_t>(std::min(by_bytes, by_threads), kTaskColumnsMin, kTaskColumnsMax);
  return static_cast<int32_t>(columns / 8 * 8);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Status HostOps::reserve(const OpLimits& limits) {
  limits_ = limits;
  try {
    reserve_scratch(limits);
  } catch (const std::bad_alloc&) {
    return Status(StatusCode::kResourceExhausted, "cannot allocate the workspaces of the kernels for " +
                                                      std::to_string(limits.rows) + " rows and " +
                                                      std::to_string(limits.context_tokens) + " tokens of context");
  }
  return {};
}

void HostOps::reserve_scratch(const OpLimits& limits) {
  const int64_t chunks = divide_up(limits.context_tokens, kChunkPositions);
  const int64_t pairs = int64_t{limits.rows} * (limits.choices + 1);
  const int64_t vectors_max = std::max(kTileVectors, limits.num_heads);
  scratch_.resize(pool_.num_threads());
  for (Scratch& scratch : scratch_) {
    for (auto* sums : {&scratch.gate, &scratch.up}) sums->resize(kFfnRows * kWideColumnsMax);
    scratch.gate_rows.clear();
    scratch.up_rows.clear();
    for (int32_t row = 0; row < kFfnRows; ++row) {
      scratch.gate_rows.push_back(scratch.gate.data() + row * kWideColumnsMax);
      scratch.up_rows.push_back(scratch.up.data() + row * kWideColumnsMax);
    }
    scratch.transposed_k.resize(int64_t{kChunkPositions} * divide_up(limits.head_dim, 2));
    scratch.scores.resize(vectors_max * kChunkPositions);
    scratch.partials.resize(int64_t{2} * vectors_max * (limits.head_dim + 2));
    scratch.q_rows.resize(vectors_max);
    scratch.visible.resize(vectors_max);
    scratch.k_blocks.resize(kChunkPositions / 16);
    scratch.v_blocks.resize(kChunkPositions / 16);
    scratch.row.resize(limits.head_dim);
    scratch.choice_scores.resize(limits.num_experts);
    scratch.group_scores.resize(limits.num_experts);
    scratch.sampling.reserve(limits.vocab);
  }
  x_rows_.resize(pairs);
  scratch_rows_.resize(pairs);
  y_rows_.resize(pairs);
  works_.reserve(std::max(1, limits.num_experts));
  group_ends_.resize(limits.num_experts);
  const bool wide = use_onednn_ && OneDnn::is_built() && limits.rows >= OneDnn::kRows;
  const int32_t k_max = std::max({limits.hidden, limits.intermediate, limits.num_heads * limits.head_dim});
  onednn_ = wide ? std::make_unique<OneDnn>(pool_.num_threads(), k_max, kWideColumnsMax) : nullptr;
  logits_.resize(int64_t{limits.rows} * limits.num_experts);
  shared_logits_.resize(limits.rows);
  // Long contexts of few rows are split by chunks until these partials are used up; what is left runs unsplit.
  reserve_run(attention_run_, pool_.num_threads() == 1 ? 0 : int64_t{32} * pool_.num_threads() * chunks);
  reserve_sliced();
}

void HostOps::for_rows(int64_t rows, int64_t cost_of_row, FunctionRef<void(int64_t row, int thread)> fn) {
  const int64_t rows_a_task = std::clamp<int64_t>(kTaskElements / std::max<int64_t>(cost_of_row, 1), 1, 64);
  pool_.run(divide_up(rows, rows_a_task), [&](int64_t task, int thread) {
    const int64_t end = std::min(rows, (task + 1) * rows_a_task);
    for (int64_t row = task * rows_a_task; row < end; ++row) fn(row, thread);
  });
}

void HostOps::work_done(int thread) {
  if (thread != 0 || !tick_) return;
  const auto now = std::chrono::steady_clock::now();
  if (now - ticked_ < kTickTime) return;
  ticked_ = now;
  tick_();
}

void HostOps::embed(std::span<const int32_t> tokens, Matrix<const Bf16> table, Matrix<float> out, Stream&) {
  const auto num_tokens = static_cast<int64_t>(tokens.size());
  MOED_CHECK(num_tokens <= out.rows && table.cols == out.cols)
      << "embed: " << num_tokens << " tokens, out " << out.rows;
  for_rows(num_tokens, table.cols, [&](int64_t row, int) {
    MOED_CHECK(tokens[row] >= 0 && tokens[row] < table.rows) << "token " << tokens[row] << " of " << table.rows;
    kernels_.to_float(table.row(tokens[row]), table.cols, out.row(row));
  });
}

void HostOps::rms_norm(Matrix<const float> x, std::span<const int32_t> rows, const float* weight, float eps,
                       Matrix<Bf16> out, Stream&) {
  const int64_t count = rows.empty() ? x.rows : static_cast<int64_t>(rows.size());
  MOED_CHECK(count <= out.rows && x.cols == out.cols) << "rms_norm: " << count << " rows into " << out.rows;
  for_rows(count, x.cols, [&](int64_t row, int) {
    const float* from = x.row(rows.empty() ? row : rows[row]);
    const float mean = kernels_.sum_squares(from, x.cols) / static_cast<float>(x.cols);
    kernels_.scale_to_bf16(from, 1.0F / std::sqrt(mean + eps), weight, x.cols, out.row(row));
  });
}

void HostOps::linear(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y, Stream&) {
  MOED_CHECK(x.cols == weights.in && y.cols == weights.out && x.rows == y.rows)
      << "linear: x [" << x.rows << ", " << x.cols << "], W [" << weights.out << ", " << weights.in << "], y ["
      << y.rows << ", " << y.cols << "]";
  MOED_CHECK(x.rows <= limits_.rows) << x.rows << " rows, reserved for " << limits_.rows;
  for (int32_t row = 0; row < x.rows; ++row) {
    x_rows_[row] = x.row(row);
    y_rows_[row] = y.row(row);
  }
  product(x.rows, weights, accumulate);
}

int32_t HostOps::columns_for(int32_t rows, int32_t k, int32_t n) const {
  if (onednn_ == nullptr || rows < OneDnn::kRows) return task_columns(k, n, pool_.num_threads());
  const int32_t by_threads = static_cast<int32_t>(divide_up(n, int64_t{2} * pool_.num_threads()));
  return std::clamp(by_threads / 32 * 32, kWideColumnsMin, kWideColumnsMax);
}

bool HostOps::prepare_wide(int32_t rows, int32_t k, int32_t n, int32_t columns) {
  if (onednn_ == nullptr || rows < OneDnn::kRows) return false;
  const int32_t last = n % columns;
  return (n < columns || onednn_->prepare(k, columns)) && (last == 0 || onednn_->prepare(k, last));
}

void HostOps::run_block(const DotBlock& block, bool wide, bool x_gathered, int thread) {
  if (wide && block.m == OneDnn::kRows) {
    onednn_->run(block, x_gathered, thread);
  } else {
    kernels_.dot_block(block);
  }
}

void HostOps::product(int32_t rows, const LinearWeights& weights, bool accumulate) {
  if (rows == 0) return;
  const int threads = pool_.num_threads();
  const int32_t columns = columns_for(rows, weights.in, weights.out);
  const bool wide = prepare_wide(rows, weights.in, weights.out, columns);
  const int64_t column_blocks = divide_up(weights.out, columns);
  // Own kernels: rows are cut only when the columns alone do not occupy all threads, for each cut reads the weights
  // once more.
  const int64_t cuts = std::clamp<int64_t>(divide_up(int64_t{3} * threads, column_blocks), 1, divide_up(rows, 24));
  const int32_t rows_a_block = wide ? OneDnn::kRows : static_cast<int32_t>(divide_up(rows, cuts));
  const int64_t row_blocks = divide_up(rows, rows_a_block);
  pool_.run(column_blocks * row_blocks, [&](int64_t task, int thread) {
    const auto column = static_cast<int32_t>(task / row_blocks) * columns;
    const auto row = static_cast<int32_t>(task % row_blocks) * rows_a_block;
    DotBlock block;
    block.x = x_rows_.data() + row;
    block.y = y_rows_.data() + row;
    block.m = std::min(rows_a_block, rows - row);
    block.w = weights.weight + int64_t{column} * weights.in;
    block.n = std::min(columns, weights.out - column);
    block.k = weights.in;
    block.y_begin = column;
    block.bias = weights.bias == nullptr ? nullptr : weights.bias + column;
    block.accumulate = accumulate;
    run_block(block, wide, false, thread);
    work_done(thread);
  });
}

void HostOps::group(const Group& args, Stream&) {
  MOED_CHECK(args.num_experts <= limits_.num_experts)
      << args.num_experts << " experts, reserved for " << limits_.num_experts;
  MOED_CHECK(args.experts.cols <= args.choices) << "group: top " << args.experts.cols << " of " << args.choices;
  int32_t* ends = group_ends_.data();
  std::fill(ends, ends + args.num_experts, 0);
  for (int32_t row = 0; row < args.experts.rows; ++row) {
    for (int32_t choice = 0; choice < args.experts.cols; ++choice) {
      const int32_t expert = args.experts.row(row)[choice];
      MOED_CHECK(expert >= 0 && expert < args.num_experts) << "group: expert " << expert << " of " << args.num_experts;
      ++ends[expert];
    }
  }
  int32_t sum = 0;
  for (int32_t expert = 0; expert < args.num_experts; ++expert) {
    args.offsets[expert] = sum;
    sum += std::exchange(ends[expert], sum);
  }
  args.offsets[args.num_experts] = sum;
  for (int32_t row = 0; row < args.experts.rows; ++row) {
    for (int32_t choice = 0; choice < args.experts.cols; ++choice) {
      args.pairs[ends[args.experts.row(row)[choice]]++] = row * args.choices + choice;
    }
  }
  if (args.host_offsets != nullptr) std::copy_n(args.offsets, args.num_experts + 1, args.host_offsets);
  if (args.host_pairs != nullptr) std::copy_n(args.pairs, sum, args.host_pairs);
}

int64_t HostOps::cut_works(bool down) {
  int64_t tasks = 0;
  for (Work& work : works_) {
    const BlobShape& shape = work.blob.shape;
    const int32_t rows = work.end - work.begin;
    const int32_t k = down ? shape.intermediate : shape.hidden;
    const int32_t n = down ? shape.hidden : shape.intermediate;
    work.first_task = tasks;
    work.columns = columns_for(rows, k, n);
    work.wide = prepare_wide(rows, k, n, work.columns);
    tasks += divide_up(n, work.columns);
  }
  return tasks;
}

const HostOps::Work& HostOps::work_of(int64_t task) const {
  const auto after = std::upper_bound(works_.begin(), works_.end(), task,
                                      [](int64_t wanted, const Work& work) { return wanted < work.first_task; });
  return *std::prev(after);
}

void HostOps::list_works(const ExpertFfn& args) {
  const auto num_experts = static_cast<int32_t>(args.blobs.size());
  const int32_t num_pairs = num_experts == 0 ? 0 : args.offsets[num_experts];
  MOED_CHECK(num_experts <= std::max(1, limits_.num_experts))
      << num_experts << " experts, reserved for " << limits_.num_experts;
  MOED_CHECK(num_pairs <= args.pairs_max && args.pairs_max <= args.scratch.rows &&
             static_cast<size_t>(args.pairs_max) <= x_rows_.size())
      << num_pairs << " pairs, at most " << args.pairs_max << ", scratch for " << args.scratch.rows << ", reserved for "
      << x_rows_.size();
  works_.clear();
  for (int32_t expert = 0; expert < num_experts; ++expert) {
    const int32_t begin = args.offsets[expert];
    const int32_t end = args.offsets[expert + 1];
    MOED_CHECK(begin >= 0 && begin <= end && end <= num_pairs)
        << "pairs of expert " << expert << ": [" << begin << ", " << end << ") of " << num_pairs;
    if (args.blobs[expert] == nullptr || begin == end) continue;
    works_.push_back({.blob = {args.blobs[expert], args.shape}, .begin = begin, .end = end});
    for (int32_t i = begin; i < end; ++i) {
      const int32_t pair = args.pairs[i];
      MOED_CHECK(pair >= 0 && pair < args.y.rows && pair / args.choices < args.x.rows)
          << "pair " << pair << " of " << args.y.rows;
      x_rows_[i] = args.x.row(pair / args.choices);
      scratch_rows_[i] = args.scratch.row(i);
      y_rows_[i] = args.y.row(pair);
    }
  }
}

void HostOps::expert_ffn(const ExpertFfn& args, Stream&) {
  const BlobShape& shape = args.shape;
  MOED_CHECK(shape.hidden == args.x.cols && shape.hidden == args.y.cols && shape.intermediate <= args.scratch.cols)
      << "experts [" << shape.hidden << ", " << shape.intermediate << "] with x of " << args.x.cols << ", y of "
      << args.y.cols << ", scratch of " << args.scratch.cols;
  list_works(args);
  pool_.run(cut_works(false), [&](int64_t task, int thread) {
    const Work& work = work_of(task);
    gate_up(args, work, static_cast<int32_t>(task - work.first_task) * work.columns, thread);
  });
  pool_.run(cut_works(true), [&](int64_t task, int thread) {
    const Work& work = work_of(task);
    down(work, static_cast<int32_t>(task - work.first_task) * work.columns, thread);
  });
}

// scratch = bf16(silu(gate x) * up x) for a task's columns from `begin` and all rows of the work.
void HostOps::gate_up(const ExpertFfn& args, const Work& work, int32_t begin, int thread) {
  const BlobView& blob = work.blob;
  const int32_t count = std::min(work.columns, blob.shape.intermediate - begin);
  Scratch& scratch = scratch_[thread];
  for (int32_t row = work.begin; row < work.end; row += kFfnRows) {
    DotBlock block;
    block.x = x_rows_.data() + row;
    block.m = std::min(kFfnRows, work.end - row);
    block.k = blob.shape.hidden;
    block.n = count;
    block.w = blob.gate() + int64_t{begin} * block.k;
    block.y = scratch.gate_rows.data();
    run_block(block, work.wide, false, thread);
    block.w = blob.up() + int64_t{begin} * block.k;
    block.y = scratch.up_rows.data();
    run_block(block, work.wide, true, thread);
    for (int32_t i = 0; i < block.m; ++i) {
      kernels_.silu_mul(scratch.gate_rows[i], scratch.up_rows[i], count, args.scratch.row(row + i) + begin);
    }
    work_done(thread);
  }
}

// y = down(scratch) for a task's columns from `begin` and all rows of the work.
void HostOps::down(const Work& work, int32_t begin, int thread) {
  const BlobView& blob = work.blob;
  for (int32_t row = work.begin; row < work.end; row += kFfnRows) {
    DotBlock block;
    block.x = scratch_rows_.data() + row;
    block.y = y_rows_.data() + row;
    block.m = std::min(kFfnRows, work.end - row);
    block.k = blob.shape.intermediate;
    block.w = blob.down() + int64_t{begin} * block.k;
    block.n = std::min(work.columns, blob.shape.hidden - begin);
    block.y_begin = begin;
    run_block(block, work.wide, false, thread);
    work_done(thread);
  }
}

void HostOps::combine(const Combine& args, Stream&) {
  const Matrix<float>& residual = args.residual;
  const bool split = args.host_y.data != nullptr;
  MOED_CHECK(args.y.rows >= int64_t{residual.rows} * args.choices && args.y.cols == residual.cols)
      << "combine: y [" << args.y.rows << ", " << args.y.cols << "], residual [" << residual.rows << ", "
      << residual.cols << "], " << args.choices << " choices";
  MOED_CHECK(!split ||
             (args.host_y.rows >= int64_t{residual.rows} * args.choices && args.host_y.cols == residual.cols &&
              args.experts.rows >= residual.rows && args.experts.cols <= args.choices))
      << "combine: host_y [" << args.host_y.rows << ", " << args.host_y.cols << "], experts [" << args.experts.rows
      << ", " << args.experts.cols << "]";
  for_rows(residual.rows, int64_t{residual.cols} * args.choices, [&](int64_t row, int) {
    for (int32_t choice = 0; choice < args.choices; ++choice) {
      const float weight = args.weights.data == nullptr ? 1.0F : args.weights.row(row)[choice];
      const bool on_host = split && choice < args.experts.cols &&
                           args.host_blobs[static_cast<size_t>(args.experts.row(row)[choice])] != nullptr;
      const float* from = (on_host ? args.host_y : args.y).row(row * args.choices + choice);
      kernels_.add_scaled(from, weight, residual.cols, residual.row(row));
    }
  });
}

void HostOps::sample(const Sample& args, Stream&) {
  const auto rows = static_cast<int64_t>(args.rows.size());
  MOED_CHECK(rows <= args.logits.rows && args.logits.cols <= limits_.vocab)
      << "sample: " << rows << " rows, logits [" << args.logits.rows << ", " << args.logits.cols << "], reserved for "
      << limits_.vocab;
  for_rows(rows, args.logits.cols, [&](int64_t row, int thread) {
    const std::span<const float> logits(args.logits.row(row), static_cast<size_t>(args.logits.cols));
    args.tokens[row] = sample_logits(logits, args.rows[static_cast<size_t>(row)], scratch_[thread].sampling);
  });
}

void HostOps::move(Matrix<const Bf16> from, Matrix<Bf16> to, Stream&) {
  MOED_CHECK(from.rows == to.rows && from.cols == to.cols)
      << "move: [" << from.rows << ", " << from.cols << "] to [" << to.rows << ", " << to.cols << "]";
  for_rows(from.rows, from.cols, [&](int64_t row, int) { std::copy_n(from.row(row), from.cols, to.row(row)); });
}

void HostOps::rope_append(const RopeAppend& args, Stream&) {
  const int32_t dim = args.kv.head_dim;
  const int32_t num_kv_heads = args.kv.num_kv_heads;
  MOED_CHECK(args.qkv.cols == (args.num_heads + 2 * num_kv_heads) * dim && args.rotary_dim <= dim &&
             args.rotary_dim % 2 == 0 && dim <= limits_.head_dim)
      << "rope_append: qkv of " << args.qkv.cols << ", " << args.num_heads << " + 2 * " << num_kv_heads << " heads of "
      << dim << ", rotary " << args.rotary_dim;
  MOED_CHECK(static_cast<int64_t>(args.positions.size()) >= args.qkv.rows &&
             static_cast<int64_t>(args.slots.size()) >= args.qkv.rows)
      << "rope_append: fewer positions or slots than rows";
  for_rows(args.qkv.rows, int64_t{4} * args.qkv.cols, [&](int64_t row, int thread) {
    RopeHead head;
    head.head_dim = dim;
    head.clip = args.clip;
    head.rotary_dim = args.rotary_dim;
    head.cos_sin = args.cos_sin + int64_t{args.positions[row]} * args.rotary_dim;
    head.scratch = scratch_[thread].row.data();
    const auto turn = [&](const float* x, int32_t heads, const float* norm, auto&& target) {
      const bool whole = args.norm == RopeAppend::Norm::kWhole;
      if (whole) head.inverse_rms = inverse_rms(x, heads * dim, args.eps);
      for (int32_t i = 0; i < heads; ++i) {
        head.x = x + i * dim;
        if (args.norm == RopeAppend::Norm::kPerHead) head.inverse_rms = inverse_rms(head.x, dim, args.eps);
        head.norm = args.norm == RopeAppend::Norm::kNone ? nullptr : norm + (whole ? i * dim : 0);
        head.out = target(i);
        kernels_.rope_head(head);
      }
    };
    const float* q = args.qkv.row(row);
    turn(q, args.num_heads, args.q_norm, [&](int32_t i) { return args.q.row(row) + i * dim; });
    const int64_t slot = args.slots[row];
    if (slot < 0) return;
    const auto block = static_cast<int32_t>(slot / args.kv.block_tokens);
    const int64_t offset = slot % args.kv.block_tokens * dim;
    const float* k = q + args.num_heads * dim;
    turn(k, num_kv_heads, args.k_norm, [&](int32_t i) { return args.kv.k(block, i) + offset; });
    head.norm = nullptr;
    head.rotary_dim = 0;
    for (int32_t i = 0; i < num_kv_heads; ++i) {
      head.x = k + (num_kv_heads + i) * dim;
      head.out = args.kv.v(block, i) + offset;
      kernels_.rope_head(head);
    }
  });
}

float HostOps::inverse_rms(const float* x, int32_t n, float eps) const {
  return 1.0F / std::sqrt(kernels_.sum_squares(x, n) / static_cast<float>(n) + eps);
}

}  // namespace moed
