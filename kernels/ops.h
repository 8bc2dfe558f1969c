#pragma once

#include <cstdint>
#include <limits>
#include <span>

#include "base/bf16.h"
#include "base/status.h"
#include "kernels/blob.h"
#include "kernels/device.h"

namespace moed {

// A row-major view. Row r begins at data + r * stride (elements). Does not own.
template <class T>
struct Matrix {
  T* data = nullptr;
  int32_t rows = 0;
  int32_t cols = 0;
  int64_t stride = 0;

  Matrix() = default;
  Matrix(T* data_, int32_t rows_, int32_t cols_) : data(data_), rows(rows_), cols(cols_), stride(cols_) {}
  Matrix(T* data_, int32_t rows_, int32_t cols_, int64_t stride_)
      : data(data_), rows(rows_), cols(cols_), stride(stride_) {}
  operator Matrix<const T>() const { return {data, rows, cols, stride}; }
  T* row(int64_t r) const { return data + r * stride; }
  Matrix slice(int32_t begin, int32_t count) const { return {row(begin), count, cols, stride}; }
};

// y = x W^T + bias. weight: [out, in], K (= in) contiguous, as checkpoints store it. bias: [out] or null.
struct LinearWeights {
  const Bf16* weight = nullptr;
  const float* bias = nullptr;
  int32_t in = 0;
  int32_t out = 0;
};

// One layer's paged KV pool. K of (block b, KV head h) is [block_tokens, head_dim] at base + b * block_stride + h *
// block_tokens * head_dim; V lies num_kv_heads * block_tokens * head_dim elements after K. Blocks from staging_begin on
// are those of a staging pool that all layers use in turn: block staging_begin lies at `staging`, the next behind it.
struct KvLayer {
  Bf16* base = nullptr;
  int64_t block_stride = 0;  // elements
  int32_t block_tokens = 0;  // 16
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  Bf16* staging = nullptr;  // null: there is none
  int32_t staging_begin = std::numeric_limits<int32_t>::max();

  bool is_staged(int32_t block) const { return block >= staging_begin; }
  Bf16* k(int32_t block, int32_t head) const {
    Bf16* first = is_staged(block) ? staging + (block - staging_begin) * block_stride : base + block * block_stride;
    return first + int64_t{head} * block_tokens * head_dim;
  }
  Bf16* v(int32_t block, int32_t head) const {
    return k(block, head) + int64_t{num_kv_heads} * block_tokens * head_dim;
  }
};

// Splits qkv, normalises, clips, turns, and appends K and V to the cache. Order as in transformers: norm, clip, rope.
struct RopeAppend {
  enum class Norm : uint8_t { kNone, kPerHead, kWhole };
  Matrix<const float> qkv;  // [rows, (num_heads + 2 * num_kv_heads) * head_dim]: q, k, v
  int32_t num_heads = 0;
  Norm norm = Norm::kNone;
  const float* q_norm = nullptr;  // kPerHead: [head_dim]; kWhole: [num_heads * head_dim]
  const float* k_norm = nullptr;  // kPerHead: [head_dim]; kWhole: [num_kv_heads * head_dim]
  float eps = 0.0F;
  float clip = std::numeric_limits<float>::infinity();
  const float* cos_sin = nullptr;      // [positions, rotary_dim]: rotary_dim / 2 cosines, then as many sines
  int32_t rotary_dim = 0;              // dimension i turns with i + rotary_dim / 2 (transformers' rotate_half)
  std::span<const int32_t> positions;  // [rows]
  std::span<const int64_t> slots;      // [rows]: block * block_tokens + offset; negative: K and V are not kept
  KvLayer kv;
  Matrix<Bf16> q;  // [rows, num_heads * head_dim]
};

// A run of rows that belong to one sequence: rows [row_begin, row_begin + num_rows) stand at positions [num_cached,
// num_cached + num_rows) and see all positions up to their own. `blocks` cover positions [0, num_cached + num_rows).
struct AttentionSpan {
  int32_t row_begin = 0;
  int32_t num_rows = 0;
  int32_t num_cached = 0;
  const int32_t* blocks = nullptr;
};

// Causal grouped-query attention over paged KV; softmax in fp32. Decode and prefill rows take the same path in the same
// K order, split at fixed positions, so that neither batching nor chunking changes a bit.
struct Attention {
  Matrix<const Bf16> q;  // [rows, num_heads * head_dim]
  int32_t num_heads = 0;
  KvLayer kv;
  std::span<const AttentionSpan> spans;
  float scale = 0.0F;
  Matrix<Bf16> out;  // [rows, num_heads * head_dim]
};

// logits = gate x; scores; choice of top_k, ties to the lower expert; weights. fp32. Equals transformers' Mixtral,
// Qwen2-MoE, Qwen3-MoE and OLMoE routers, and DeepSeek-V3's when groups and correction_bias are set.
struct Route {
  enum class Score : uint8_t { kSoftmax, kSigmoid };
  Matrix<const Bf16> x;  // [rows, hidden]
  LinearWeights gate;    // out = number of experts
  Score score = Score::kSoftmax;
  int32_t top_k = 0;
  bool renormalize = false;
  float scaling = 1.0F;
  int32_t num_groups = 1;
  int32_t groups_kept = 1;
  const float* correction_bias = nullptr;  // [experts] or null
  bool shared = false;                     // a shared expert takes column top_k of weights
  LinearWeights shared_gate;               // out = 1: sigmoid(x . w) is that column; weight null: 1
  Matrix<int32_t> experts;                 // [rows, top_k], descending score
  Matrix<float> weights;                   // [rows, top_k + shared]
};

// Sorts (row, choice) pairs by expert, ascending within each. pair = row * choices + choice.
struct Group {
  Matrix<const int32_t> experts;  // [rows, top_k]
  int32_t num_experts = 0;
  int32_t choices = 1;         // >= top_k: with a shared expert, one more
  int32_t* offsets = nullptr;  // [num_experts + 1]: where an expert's pairs begin
  int32_t* pairs = nullptr;    // [rows * top_k]
  // The same once more in mapped memory, for the host; null: not wanted.
  int32_t* host_offsets = nullptr;
  int32_t* host_pairs = nullptr;
};

// y[pair] = down(bf16(silu(gate x[pair / choices]) * up x[pair / choices])) for each pair of each expert that has a
// blob. Dense FFNs and shared experts are one expert that every row chose. Writes no other row of y and no other row of
// scratch, so that an expert's pairs may be split from others' over calls and lanes.
struct ExpertFfn {
  Matrix<const Bf16> x;  // [rows, hidden]
  BlobShape shape;       // of every blob
  // Table: [num_experts] addresses of blobs that this lane can read; null: this call leaves the expert out.
  std::span<const std::byte* const> blobs;
  const int32_t* offsets = nullptr;  // [num_experts + 1], as Group writes them
  const int32_t* pairs = nullptr;    // [offsets[num_experts]]
  int32_t pairs_max = 0;             // offsets[num_experts] is at most this
  int32_t choices = 1;
  Matrix<Bf16> scratch;  // [>= pairs_max, >= intermediate]; row i belongs to pairs[i]
  Matrix<float> y;       // [rows * choices, hidden]
};

// residual[row] += sum over choices, in order, of weights[row][choice] * y[row * choices + choice]. A choice whose
// expert has a blob in `host_blobs` was computed on the host: its row of host_y is taken instead.
struct Combine {
  Matrix<const float> y;        // [rows * choices, hidden]
  Matrix<const float> weights;  // [rows, choices]; data null: all ones
  int32_t choices = 1;
  Matrix<float> residual;                        // [rows, hidden]
  Matrix<const float> host_y;                    // [rows * choices, hidden], mapped; data null: none
  Matrix<const int32_t> experts;                 // [rows, top_k]; with host_y
  std::span<const std::byte* const> host_blobs;  // table: [num_experts]; with host_y
};

// How a row's token is chosen. Candidates are a prefix of the tokens by descending logit, ties by ascending id: those
// whose weight, exp((logit - largest) / temperature), is at least min_p; of them the best top_k; of those the shortest
// prefix that holds the share top_p of their weights, and always one token.
inline constexpr float kTemperatureMin = 1e-5F;
struct SampleRow {
  float temperature = 0.0F;  // below kTemperatureMin: the largest logit, ties to the lower id
  int32_t top_k = 0;         // 0: all
  float top_p = 1.0F;
  float min_p = 0.0F;
  double uniform = 0.0;  // in [0, 1): how far into the candidates' weights the token lies
};

// tokens[row]: where the sum of the candidates' weights passes `uniform` of all, in the order of the prefix when top_k
// or top_p cuts, else in order of id. -1: a logit is NaN or +infinity, or a draw has nothing but -infinity. Weights are
// fp32; how their sums are rounded is the device's, so that a draw within rounding of a token's edge may give its
// neighbour.
struct Sample {
  Matrix<const float> logits;       // [rows, vocab]
  std::span<const SampleRow> rows;  // table: [rows]
  int32_t* tokens = nullptr;        // [rows], mapped
};

// The largest shapes any call will have: ops take their workspaces once, at start.
struct OpLimits {
  int32_t rows = 0;
  int32_t hidden = 0;
  int32_t intermediate = 0;
  int32_t num_heads = 0;
  int32_t head_dim = 0;
  int32_t context_tokens = 0;
  int32_t num_experts = 0;
  int32_t choices = 1;
  int32_t vocab = 0;
};

// The kernels of a device. Each call enqueues on `stream`; on the host device it has run when it returns. Pointers are
// what the device can read; tables (tokens, positions, slots, spans, blobs, sample rows) are written by the host in
// kMapped memory. Nothing allocates after reserve(), but for what a library keeps of a weight shape when it first meets
// it with many rows. Sums in fp32, inputs of products in bf16. Serving thread only.
class Ops {
 public:
  virtual ~Ops() = default;
  // Once, before the first op. Errors: kResourceExhausted.
  virtual Status reserve(const OpLimits& limits) = 0;
  // out[r] = table[tokens[r]]. table: [vocab, hidden]. REQUIRES: 0 <= token < vocab.
  virtual void embed(std::span<const int32_t> tokens, Matrix<const Bf16> table, Matrix<float> out, Stream& stream) = 0;
  // out[r] = bf16(x[rows[r]] * weight / sqrt(mean(x^2) + eps)); rows empty: all of x. LlamaRMSNorm.
  virtual void rms_norm(Matrix<const float> x, std::span<const int32_t> rows, const float* weight, float eps,
                        Matrix<Bf16> out, Stream& stream) = 0;
  // y = x W^T + bias, or y += when accumulate.
  virtual void linear(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y,
                      Stream& stream) = 0;
  virtual void rope_append(const RopeAppend& args, Stream& stream) = 0;
  virtual void attention(const Attention& args, Stream& stream) = 0;
  virtual void route(const Route& args, Stream& stream) = 0;
  virtual void group(const Group& args, Stream& stream) = 0;
  virtual void expert_ffn(const ExpertFfn& args, Stream& stream) = 0;
  virtual void combine(const Combine& args, Stream& stream) = 0;
  virtual void sample(const Sample& args, Stream& stream) = 0;
  // to = from, by a kernel: activations that cross between device and mapped memory, which must not queue behind the
  // packets of a copy engine.
  virtual void move(Matrix<const Bf16> from, Matrix<Bf16> to, Stream& stream) = 0;
};

// Attention of the host lane, cut into tasks so that other work of the host goes in between. Its results have the bits
// of Ops::attention. Belongs to one half of one pass; serving thread only.
class HostAttention {
 public:
  virtual ~HostAttention() = default;
  // args, its spans and their blocks stay until done(). REQUIRES: done(). Does not allocate once OpLimits are reserved.
  virtual void begin(const Attention& args) = 0;
  // Runs tasks for about slice_us, at least one. REQUIRES: !done().
  virtual void run(double slice_us) = 0;
  virtual bool done() const = 0;
};

}  // namespace moed
