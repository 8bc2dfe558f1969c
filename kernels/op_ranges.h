#pragma once

#include <cstdint>
#include <span>
#include <variant>

#include "base/function_ref.h"
#include "kernels/ops.h"

namespace moed {

// A call of each op as a value: what a device that runs behind the host keeps in its queues. RopeAppend, Attention,
// Route, Group, ExpertFfn, Combine and Sample are their own. Tables (positions, spans, blobs...) stay where they are:
// ops.h asks that mapped memory be left alone until the op has run.
struct EmbedCall {
  std::span<const int32_t> tokens;
  Matrix<const Bf16> table;
  Matrix<float> out;
};
struct RmsNormCall {
  Matrix<const float> x;
  std::span<const int32_t> rows;
  const float* weight = nullptr;
  float eps = 0.0F;
  Matrix<Bf16> out;
};
struct LinearCall {
  Matrix<const Bf16> x;
  LinearWeights weights;
  bool accumulate = false;
  Matrix<float> y;
};
struct MoveCall {
  Matrix<const Bf16> from;
  Matrix<Bf16> to;
};
using OpCall = std::variant<EmbedCall, RmsNormCall, LinearCall, RopeAppend, Attention, Route, Group, ExpertFfn, Combine,
                            MoveCall, Sample>;

// "embed", "rms_norm"...
const char* op_name(const OpCall& call);
void run_op(OpCall& call, Ops& ops, Stream& stream);

// Told of all memory that a call touches, each range once.
class RangeVisitor {
 public:
  using Runs = FunctionRef<void(FunctionRef<void(int64_t offset_bytes, int64_t bytes)>)>;
  virtual ~RangeVisitor() = default;
  // The op touches runs of bytes, counted from `base`, which the visitor may replace. Runs that follow one another in
  // memory and in order come as one; none is empty. Pointers that an op may leave out come only when they are set.
  virtual void range(const char* name, Access access, const void*& base, Runs runs) = 0;
  // A table that the host wrote in mapped memory. Those that a table of spans points to cannot be replaced. A visitor
  // that replaces a blob must have replaced the table "blobs", which comes before, by one that may be written: the new
  // address goes there.
  virtual void table(const char* name, const void*& data, int64_t bytes) = 0;
};
// REQUIRES: the tables are there, for they say which rows, slots and blocks the op touches.
void visit_ranges(OpCall& call, RangeVisitor& visitor);

// Ops that keep each call as a value and leave the rest to enqueue().
class QueuedOps : public Ops {
 public:
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

 private:
  virtual void enqueue(OpCall call, Stream& stream) = 0;
};

}  // namespace moed
