#include "kernels/op_ranges.h"

#include <algorithm>
#include <utility>

namespace moed {
namespace {

using Run = FunctionRef<void(int64_t offset_bytes, int64_t bytes)>;

// Joins runs that follow one another.
class Joiner {
 public:
  explicit Joiner(Run out) : out_(out) {}
  void add(int64_t begin, int64_t bytes) {
    if (bytes == 0) return;
    if (begin != end_) {
      flush();
      begin_ = begin;
    }
    end_ = begin + bytes;
  }
  void flush() {
    if (end_ > begin_) out_(begin_, end_ - begin_);
    begin_ = end_ = 0;
  }

 private:
  Run out_;
  int64_t begin_ = 0;
  int64_t end_ = 0;
};

// `emit` gets a function (first element, elements) that names a run.
template <class T, class Emit>
void name(RangeVisitor& visitor, const char* what, Access access, T*& base, Emit&& emit) {
  const void* address = base;
  visitor.range(what, access, address, [&](Run run) {
    Joiner joiner(run);
    emit([&](int64_t first, int64_t count) { joiner.add(first * int64_t{sizeof(T)}, count * int64_t{sizeof(T)}); });
    joiner.flush();
  });
  base = static_cast<T*>(const_cast<void*>(address));
}

template <class T>
void name_rows(RangeVisitor& visitor, const char* what, Access access, Matrix<T>& matrix, int64_t rows) {
  name(visitor, what, access, matrix.data, [&](auto&& run) {
    for (int64_t row = 0; row < rows; ++row) run(row * matrix.stride, matrix.cols);
  });
}

template <class T>
void name_vector(RangeVisitor& visitor, const char* what, T*& data, int64_t count) {
  if (data != nullptr) name(visitor, what, Access::kRead, data, [&](auto&& run) { run(0, count); });
}

void name_weights(RangeVisitor& visitor, LinearWeights& weights) {
  name_vector(visitor, "weight", weights.weight, int64_t{weights.in} * weights.out);
  name_vector(visitor, "bias", weights.bias, weights.out);
}

template <class T>
void name_table(RangeVisitor& visitor, const char* what, std::span<const T>& table) {
  const void* data = table.data();
  visitor.table(what, data, static_cast<int64_t>(table.size_bytes()));
  table = {static_cast<const T*>(data), table.size()};
}

// The layer's pool, then the staging pool if there is one. `emit` gets a function (block, first token, tokens) that
// names K and V of all heads, and is called for each pool.
template <class Emit>
void name_kv(RangeVisitor& visitor, Access access, KvLayer& kv, Emit&& emit) {
  for (Bf16** pool : {&kv.base, &kv.staging}) {
    if (*pool == nullptr) continue;
    name(visitor, "kv", access, *pool, [&](auto&& run) {
      emit([&](int32_t block, int32_t begin, int32_t count) {
        if (kv.is_staged(block) != (pool == &kv.staging)) return;
        for (const bool values : {false, true}) {
          for (int32_t head = 0; head < kv.num_kv_heads; ++head) {
            const Bf16* first = values ? kv.v(block, head) : kv.k(block, head);
            run(first - *pool + int64_t{begin} * kv.head_dim, int64_t{count} * kv.head_dim);
          }
        }
      });
    });
  }
}

void visit(EmbedCall& call, RangeVisitor& visitor) {
  name_table(visitor, "tokens", call.tokens);
  name(visitor, "table", Access::kRead, call.table.data, [&](auto&& run) {
    for (const int32_t token : call.tokens) run(token * call.table.stride, call.table.cols);
  });
  name_rows(visitor, "out", Access::kWrite, call.out, static_cast<int64_t>(call.tokens.size()));
}

void visit(RmsNormCall& call, RangeVisitor& visitor) {
  if (!call.rows.empty()) name_table(visitor, "rows", call.rows);
  const int64_t rows = call.rows.empty() ? call.x.rows : static_cast<int64_t>(call.rows.size());
  name(visitor, "x", Access::kRead, call.x.data, [&](auto&& run) {
    for (int64_t row = 0; row < rows; ++row) {
      run((call.rows.empty() ? row : call.rows[row]) * call.x.stride, call.x.cols);
    }
  });
  name_vector(visitor, "weight", call.weight, call.x.cols);
  name_rows(visitor, "out", Access::kWrite, call.out, rows);
}

void visit(LinearCall& call, RangeVisitor& visitor) {
  name_rows(visitor, "x", Access::kRead, call.x, call.x.rows);
  name_weights(visitor, call.weights);
  name_rows(visitor, "y", call.accumulate ? Access::kUpdate : Access::kWrite, call.y, call.x.rows);
}

void visit(RopeAppend& call, RangeVisitor& visitor) {
  const int32_t rows = call.qkv.rows;
  name_table(visitor, "positions", call.positions);
  name_table(visitor, "slots", call.slots);
  name_rows(visitor, "qkv", Access::kRead, call.qkv, rows);
  if (call.norm != RopeAppend::Norm::kNone) {
    const bool whole = call.norm == RopeAppend::Norm::kWhole;
    name_vector(visitor, "q_norm", call.q_norm, int64_t{call.kv.head_dim} * (whole ? call.num_heads : 1));
    name_vector(visitor, "k_norm", call.k_norm, int64_t{call.kv.head_dim} * (whole ? call.kv.num_kv_heads : 1));
  }
  name(visitor, "cos_sin", Access::kRead, call.cos_sin, [&](auto&& run) {
    for (int32_t row = 0; row < rows; ++row) {
      run(int64_t{call.positions[row]} * call.rotary_dim, call.rotary_dim);
    }
  });
  name_kv(visitor, Access::kWrite, call.kv, [&](auto&& run) {
    const int32_t block_tokens = call.kv.block_tokens;
    for (int32_t row = 0, count = 0; row < rows; row += count) {
      const int64_t slot = call.slots[row];
      const auto offset = static_cast<int32_t>(slot % block_tokens);
      count = 1;
      if (slot < 0) continue;
      while (row + count < rows && offset + count < block_tokens && call.slots[row + count] == slot + count) ++count;
      run(static_cast<int32_t>(slot / block_tokens), offset, count);
    }
  });
  name_rows(visitor, "q", Access::kWrite, call.q, rows);
}

void visit(Attention& call, RangeVisitor& visitor) {
  const int32_t block_tokens = call.kv.block_tokens;
  const auto num_blocks = [&](const AttentionSpan& span) {
    return (span.num_cached + span.num_rows + block_tokens - 1) / block_tokens;
  };
  name_table(visitor, "spans", call.spans);
  for (const AttentionSpan& span : call.spans) {
    const void* blocks = span.blocks;
    visitor.table("blocks", blocks, num_blocks(span) * int64_t{sizeof(*span.blocks)});
  }
  const auto name_span_rows = [&](const char* what, Access access, auto& matrix) {
    name(visitor, what, access, matrix.data, [&](auto&& run) {
      for (const AttentionSpan& span : call.spans) {
        for (int32_t row = 0; row < span.num_rows; ++row) run((span.row_begin + row) * matrix.stride, matrix.cols);
      }
    });
  };
  name_span_rows("q", Access::kRead, call.q);
  name_kv(visitor, Access::kRead, call.kv, [&](auto&& run) {
    for (const AttentionSpan& span : call.spans) {
      const int32_t tokens = span.num_cached + span.num_rows;
      for (int32_t i = 0; i < num_blocks(span); ++i) {
        run(span.blocks[i], 0, std::min(block_tokens, tokens - i * block_tokens));
      }
    }
  });
  name_span_rows("out", Access::kWrite, call.out);
}

void visit(Route& call, RangeVisitor& visitor) {
  name_rows(visitor, "x", Access::kRead, call.x, call.x.rows);
  name_weights(visitor, call.gate);
  name_vector(visitor, "correction_bias", call.correction_bias, call.gate.out);
  if (call.shared) name_weights(visitor, call.shared_gate);
  name_rows(visitor, "experts", Access::kWrite, call.experts, call.x.rows);
  name_rows(visitor, "weights", Access::kWrite, call.weights, call.x.rows);
}

void visit(Group& call, RangeVisitor& visitor) {
  const auto name_out = [&](const char* what, int32_t*& data, int64_t count) {
    if (data != nullptr) name(visitor, what, Access::kWrite, data, [&](auto&& run) { run(0, count); });
  };
  const int64_t num_pairs = int64_t{call.experts.rows} * call.experts.cols;
  name_rows(visitor, "experts", Access::kRead, call.experts, call.experts.rows);
  name_out("offsets", call.offsets, call.num_experts + 1);
  name_out("pairs", call.pairs, num_pairs);
  name_out("host_offsets", call.host_offsets, call.num_experts + 1);
  name_out("host_pairs", call.host_pairs, num_pairs);
}

// Which rows of scratch and y it writes only the pairs say, and they may be where no host can read them.
void visit(ExpertFfn& call, RangeVisitor& visitor) {
  name_table(visitor, "blobs", call.blobs);
  for (const std::byte* const& blob : call.blobs) {
    const std::byte* address = blob;
    name_vector(visitor, "blob", address, call.shape.bytes());
    if (address != blob) const_cast<const std::byte*&>(blob) = address;
  }
  name_rows(visitor, "x", Access::kRead, call.x, call.x.rows);
  name_vector(visitor, "offsets", call.offsets, static_cast<int64_t>(call.blobs.size()) + 1);
  name_vector(visitor, "pairs", call.pairs, call.pairs_max);
  Matrix<Bf16> scratch = call.scratch;
  scratch.cols = call.shape.intermediate;
  name_rows(visitor, "scratch", Access::kWrite, scratch, call.pairs_max);
  call.scratch.data = scratch.data;
  name_rows(visitor, "y", Access::kUpdate, call.y, call.y.rows);
}

void visit(Combine& call, RangeVisitor& visitor) {
  const int64_t rows = call.residual.rows;
  name_rows(visitor, "y", Access::kRead, call.y, rows * call.choices);
  if (call.weights.data != nullptr) {
    Matrix<const float> used = call.weights;
    used.cols = call.choices;
    name_rows(visitor, "weights", Access::kRead, used, rows);
    call.weights.data = used.data;
  }
  if (call.host_y.data != nullptr) {
    name_table(visitor, "host_blobs", call.host_blobs);
    name_rows(visitor, "experts", Access::kRead, call.experts, rows);
    name_rows(visitor, "host_y", Access::kRead, call.host_y, rows * call.choices);
  }
  name_rows(visitor, "residual", Access::kUpdate, call.residual, rows);
}

void visit(MoveCall& call, RangeVisitor& visitor) {
  name_rows(visitor, "from", Access::kRead, call.from, call.from.rows);
  name_rows(visitor, "to", Access::kWrite, call.to, call.from.rows);
}

void visit(Sample& call, RangeVisitor& visitor) {
  const auto rows = static_cast<int64_t>(call.rows.size());
  name_table(visitor, "sample rows", call.rows);
  name_rows(visitor, "logits", Access::kRead, call.logits, rows);
  name(visitor, "tokens", Access::kWrite, call.tokens, [&](auto&& run) { run(0, rows); });
}

void run(EmbedCall& call, Ops& ops, Stream& stream) { ops.embed(call.tokens, call.table, call.out, stream); }
void run(RmsNormCall& call, Ops& ops, Stream& stream) {
  ops.rms_norm(call.x, call.rows, call.weight, call.eps, call.out, stream);
}
void run(LinearCall& call, Ops& ops, Stream& stream) {
  ops.linear(call.x, call.weights, call.accumulate, call.y, stream);
}
void run(RopeAppend& call, Ops& ops, Stream& stream) { ops.rope_append(call, stream); }
void run(Attention& call, Ops& ops, Stream& stream) { ops.attention(call, stream); }
void run(Route& call, Ops& ops, Stream& stream) { ops.route(call, stream); }
void run(Group& call, Ops& ops, Stream& stream) { ops.group(call, stream); }
void run(ExpertFfn& call, Ops& ops, Stream& stream) { ops.expert_ffn(call, stream); }
void run(Combine& call, Ops& ops, Stream& stream) { ops.combine(call, stream); }
void run(MoveCall& call, Ops& ops, Stream& stream) { ops.move(call.from, call.to, stream); }
void run(Sample& call, Ops& ops, Stream& stream) { ops.sample(call, stream); }

}  // namespace

const char* op_name(const OpCall& call) {
  static constexpr const char* kNames[] = {"embed", "rms_norm",   "linear",  "rope_append", "attention", "route",
                                           "group", "expert_ffn", "combine", "move",        "sample"};
  static_assert(std::size(kNames) == std::variant_size_v<OpCall>);
  return kNames[call.index()];
}

void run_op(OpCall& call, Ops& ops, Stream& stream) {
  std::visit([&](auto& one) { run(one, ops, stream); }, call);
}

void visit_ranges(OpCall& call, RangeVisitor& visitor) {
  std::visit([&](auto& one) { visit(one, visitor); }, call);
}

void QueuedOps::embed(std::span<const int32_t> tokens, Matrix<const Bf16> table, Matrix<float> out, Stream& stream) {
  enqueue(EmbedCall{tokens, table, out}, stream);
}

void QueuedOps::rms_norm(Matrix<const float> x, std::span<const int32_t> rows, const float* weight, float eps,
                         Matrix<Bf16> out, Stream& stream) {
  enqueue(RmsNormCall{x, rows, weight, eps, out}, stream);
}

void QueuedOps::linear(Matrix<const Bf16> x, const LinearWeights& weights, bool accumulate, Matrix<float> y,
                       Stream& stream) {
  enqueue(LinearCall{x, weights, accumulate, y}, stream);
}

void QueuedOps::rope_append(const RopeAppend& args, Stream& stream) { enqueue(args, stream); }

void QueuedOps::attention(const Attention& args, Stream& stream) { enqueue(args, stream); }

void QueuedOps::route(const Route& args, Stream& stream) { enqueue(args, stream); }

void QueuedOps::group(const Group& args, Stream& stream) { enqueue(args, stream); }

void QueuedOps::expert_ffn(const ExpertFfn& args, Stream& stream) { enqueue(args, stream); }

void QueuedOps::combine(const Combine& args, Stream& stream) { enqueue(args, stream); }

void QueuedOps::sample(const Sample& args, Stream& stream) { enqueue(args, stream); }

void QueuedOps::move(Matrix<const Bf16> from, Matrix<Bf16> to, Stream& stream) { enqueue(MoveCall{from, to}, stream); }

}  // namespace moed
