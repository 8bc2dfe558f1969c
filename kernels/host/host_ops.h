#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "base/function_ref.h"
#include "base/thread_pool.h"
#include "kernels/host/kernel_table.h"
#include "kernels/host/onednn.h"
#include "kernels/ops.h"
#include "kernels/sampling.h"

namespace moed {

// Query vectors that share one reading of a chunk, unless one row has more: enough to make its transposition cheap, few
// enough to stay in L1.
constexpr int32_t kTileVectors = 32;

// The ops of the host device: checks shapes, cuts the work over the pool's threads, calls the kernels of one ISA.
class HostOps final : public Ops {
 public:
  // kernels and pool must outlive it. use_onednn: products of many rows may go there.
  HostOps(const KernelTable& kernels, ThreadPool& pool, bool use_onednn)
      : kernels_(kernels), pool_(pool), use_onednn_(use_onednn) {}

  Status reserve(const OpLimits& limits) override;
  void embed(std::span<const int32_t> tokens, Matrix<const Bf16> table, Matrix<float> out, Stream& stream) override;
  void rms_norm(Matrix<const float> x, std::span<const int32_t> rows, const float* weight, float eps, Matrix<Bf16> out,
                Stream& stream) override;
  void linear(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y,
              Stream& stream) override;
  void rope_append(const RopeAppend& args, Stream& stream) override;
  void attention(const Attention& args, Stream& stream) override;
  void route(const Route& args, Stream& stream) override;
  void group(const Group& args, Stream& stream) override;
  void expert_ffn(const ExpertFfn& args, Stream& stream) override;
  void combine(const Combine& args, Stream& stream) override;
  void sample(const Sample& args, Stream& stream) override;
  void move(Matrix<const Bf16> from, Matrix<Bf16> to, Stream& stream) override;
  // Device::on_host_work(); of linear() and expert_ffn(), which alone take long.
  void on_work(std::function<void()> tick) { tick_ = std::move(tick); }
  // Must die before these ops.
  std::unique_ptr<HostAttention> make_sliced_attention();

 private:
  class SlicedAttention;
  // Rows of one sequence against chunks [chunk_begin, chunk_end): all that they see (split_offset < 0), or one, whose
  // partials for all KV heads lie at AttentionRun::partials[split_offset].
  struct AttentionTask {
    int32_t span = 0;
    int32_t row = 0;  // within the span
    int32_t num_rows = 0;
    int32_t chunk_begin = 0;
    int32_t chunk_end = 0;
    int64_t split_offset = -1;
  };
  struct SplitTile {
    int32_t first_task;  // its chunks are num_chunks tasks in a row
    int32_t num_chunks;
  };
  // One call of attention, cut: what has been planned of it and where the partials of its split tiles lie.
  struct AttentionRun {
    Attention args;
    std::vector<AttentionTask> tasks;
    std::vector<SplitTile> splits;
    std::vector<float> partials;
    int64_t partials_used = 0;
    // The first tile that is not planned yet.
    size_t next_span = 0;
    int32_t next_row = 0;

    // Units of work: a task or a split tile, and a KV head.
    int64_t num_computed() const { return static_cast<int64_t>(tasks.size()) * args.kv.num_kv_heads; }
    int64_t num_merged() const { return static_cast<int64_t>(splits.size()) * args.kv.num_kv_heads; }
  };
  // The pairs of one expert in one call of expert_ffn.
  struct Work {
    BlobView blob;
    int32_t begin = 0;  // of its rows in x_rows_, scratch and y_rows_
    int32_t end = 0;
    int64_t first_task = 0;  // of the phase that runs
    int32_t columns = 0;     // of each task
    bool wide = false;       // its blocks of many rows go to oneDNN
  };
  struct ChunkOut {
    int32_t head;
    int32_t chunk;
    AttentionPartial out;
  };
  // What one thread needs while it computes.
  struct Scratch {
    std::vector<float> gate;
    std::vector<float> up;
    std::vector<float*> gate_rows;
    std::vector<float*> up_rows;
    std::vector<uint32_t> transposed_k;
    std::vector<float> scores;
    std::vector<float> partials;  // two of them: peaks, totals, sums
    std::vector<const Bf16*> q_rows;
    std::vector<int32_t> visible;
    std::vector<const Bf16*> k_blocks;
    std::vector<const Bf16*> v_blocks;
    std::vector<float> row;
    std::vector<float> choice_scores;
    std::vector<float> group_scores;
    SamplingScratch sampling;
  };

  void reserve_scratch(const OpLimits& limits);
  // Cuts [0, rows) into tasks of about equal cost and runs fn(row, thread).
  void for_rows(int64_t rows, int64_t cost_of_row, FunctionRef<void(int64_t row, int thread)> fn);
  // Between pieces of work of a thread: ticks when it is the serving thread and the last tick is a while ago.
  void work_done(int thread);
  // y = x W^T over all rows; x_rows_ and y_rows_ are set.
  void product(int32_t rows, const LinearWeights& weights, bool accumulate);
  // True when blocks of OneDnn::kRows rows of this shape, cut into `columns`, go to oneDNN.
  bool prepare_wide(int32_t rows, int32_t k, int32_t n, int32_t columns);
  int32_t columns_for(int32_t rows, int32_t k, int32_t n) const;
  // The block by oneDNN where it fits, else by the ISA's own kernel.
  void run_block(const DotBlock& block, bool wide, bool x_gathered, int thread);
  // Lists the experts that have a blob and rows.
  void list_works(const ExpertFfn& args);
  void gate_up(const ExpertFfn& args, const Work& work, int32_t begin, int thread);
  void down(const Work& work, int32_t begin, int thread);
  float inverse_rms(const float* x, int32_t n, float eps) const;
  // Cuts a phase into tasks; returns how many there are.
  int64_t cut_works(bool down);
  const Work& work_of(int64_t task) const;
  void choose_experts(const Route& args, int64_t row, int thread);
  void keep_best_groups(const Route& args, Scratch& scratch) const;
  void reserve_sliced();
  void reserve_run(AttentionRun& run, int64_t vectors) const;
  void begin_attention(AttentionRun& run, const Attention& args) const;
  // Plans tiles, split by chunks where `splits` says so of (rows, chunks) and there is room. full_stops: ends before a
  // tile for which there is none; else it stays whole. False: there was nothing left to plan.
  bool plan_attention(AttentionRun& run, bool full_stops,
                      FunctionRef<bool(int32_t num_rows, int32_t num_chunks)> splits) const;
  void plan_tile(AttentionRun& run, AttentionTask task, bool split) const;
  void compute_unit(AttentionRun& run, int64_t unit, int thread);
  void run_whole_tile(const Attention& args, const AttentionTask& task, int32_t head, int thread);
  void merge_unit(AttentionRun& run, int64_t unit);
  void compute_chunk(const Attention& args, const AttentionTask& task, const ChunkOut& where, int thread);
  void write_attention(const Attention& args, const AttentionTask& task, int32_t head, const AttentionPartial& done);

  const KernelTable& kernels_;
  ThreadPool& pool_;
  const bool use_onednn_;
  std::function<void()> tick_;
  std::chrono::steady_clock::time_point ticked_;
  std::unique_ptr<OneDnn> onednn_;  // null: own kernels only
  OpLimits limits_;
  std::vector<Scratch> scratch_;           // [threads]
  std::vector<const Bf16*> x_rows_;        // [rows * choices + rows]
  std::vector<const Bf16*> scratch_rows_;  // as many: rows of ExpertFfn::scratch
  std::vector<float*> y_rows_;             // as many
  std::vector<Work> works_;                // of the call that runs
  std::vector<int32_t> group_ends_;        // [experts]
  std::vector<float> logits_;              // [rows, experts]
  std::vector<float> shared_logits_;       // [rows]
  AttentionRun attention_run_;
  std::vector<SlicedAttention*> sliced_;  // those alive
};

}  // namespace moed
