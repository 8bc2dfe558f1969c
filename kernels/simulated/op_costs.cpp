#include "kernels/simulated/op_costs.h"

#include <algorithm>
#include <variant>

namespace moed {
namespace {

class Counter {
 public:
  Counter(FunctionRef<bool(const void*)> is_device, int64_t tile_rows) : is_device_(is_device), tile_rows_(tile_rows) {}

  template <class T>
  void reads(const T* data, int64_t count) {
    add(data, count * int64_t{sizeof(T)}, cost.host_read_bytes);
  }
  template <class T>
  void writes(const T* data, int64_t count) {
    add(data, count * int64_t{sizeof(T)}, cost.host_write_bytes);
  }
  template <class T>
  void updates(const T* data, int64_t count) {
    reads(data, count);
    writes(data, count);
  }
  void products(int64_t rows, int64_t in, int64_t out) {
    const int64_t whole = (rows + tile_rows_ - 1) / tile_rows_ * tile_rows_;
    cost.flops += 2.0 * static_cast<double>(whole) * static_cast<double>(in) * static_cast<double>(out);
  }
  void weights(const LinearWeights& linear) {
    reads(linear.weight, int64_t{linear.in} * linear.out);
    if (linear.bias != nullptr) reads(linear.bias, linear.out);
  }

  OpCost cost;

 private:
  void add(const void* data, int64_t bytes, int64_t& of_host) {
    (is_device_(data) ? cost.device_bytes : of_host) += bytes;
  }

  FunctionRef<bool(const void*)> is_device_;
  const int64_t tile_rows_;
};

void count(const EmbedCall& call, Counter& counter) {
  const auto rows = static_cast<int64_t>(call.tokens.size());
  counter.reads(call.tokens.data(), rows);
  counter.reads(call.table.data, rows * call.table.cols);
  counter.writes(call.out.data, rows * call.out.cols);
}

void count(const RmsNormCall& call, Counter& counter) {
  const int64_t rows = call.rows.empty() ? call.x.rows : static_cast<int64_t>(call.rows.size());
  if (!call.rows.empty()) counter.reads(call.rows.data(), rows);
  counter.reads(call.x.data, rows * call.x.cols);
  counter.reads(call.weight, call.x.cols);
  counter.writes(call.out.data, rows * call.out.cols);
}

void count(const LinearCall& call, Counter& counter) {
  const int64_t rows = call.x.rows;
  counter.reads(call.x.data, rows * call.x.cols);
  counter.weights(call.weights);
  if (call.accumulate) counter.reads(call.y.data, rows * call.y.cols);
  counter.writes(call.y.data, rows * call.y.cols);
  counter.products(rows, call.weights.in, call.weights.out);
}

void count(const RopeAppend& call, Counter& counter) {
  const int64_t rows = call.qkv.rows;
  const bool whole = call.norm == RopeAppend::Norm::kWhole;
  counter.reads(call.positions.data(), rows);
  counter.reads(call.slots.data(), rows);
  counter.reads(call.qkv.data, rows * call.qkv.cols);
  if (call.norm != RopeAppend::Norm::kNone) {
    counter.reads(call.q_norm, int64_t{call.kv.head_dim} * (whole ? call.num_heads : 1));
    counter.reads(call.k_norm, int64_t{call.kv.head_dim} * (whole ? call.kv.num_kv_heads : 1));
  }
  counter.reads(call.cos_sin, rows * call.rotary_dim);
  const auto kept = std::count_if(call.slots.begin(), call.slots.end(), [](int64_t slot) { return slot >= 0; });
  counter.writes(call.kv.base, int64_t{2} * kept * call.kv.num_kv_heads * call.kv.head_dim);
  counter.writes(call.q.data, rows * call.q.cols);
}

void count(const Attention& call, Counter& counter) {
  const int64_t kv_row = int64_t{2} * call.kv.num_kv_heads * call.kv.head_dim;
  counter.reads(call.spans.data(), static_cast<int64_t>(call.spans.size()));
  for (const AttentionSpan& span : call.spans) {
    const int64_t rows = span.num_rows;
    const int64_t tokens = span.num_cached + rows;
    counter.reads(span.blocks, (tokens + call.kv.block_tokens - 1) / call.kv.block_tokens);
    counter.reads(call.q.data, rows * call.q.cols);
    counter.reads(call.kv.base, tokens * kv_row);
    counter.writes(call.out.data, rows * call.out.cols);
    const int64_t attended = rows * span.num_cached + rows * (rows + 1) / 2;
    counter.cost.attention_flops +=
        4.0 * static_cast<double>(attended) * call.num_heads * static_cast<double>(call.kv.head_dim);
  }
}

void count(const Route& call, Counter& counter) {
  const int64_t rows = call.x.rows;
  counter.reads(call.x.data, rows * call.x.cols);
  counter.weights(call.gate);
  counter.products(rows, call.gate.in, call.gate.out);
  if (call.correction_bias != nullptr) counter.reads(call.correction_bias, call.gate.out);
  if (call.shared && call.shared_gate.weight != nullptr) counter.weights(call.shared_gate);
  counter.writes(call.experts.data, rows * call.experts.cols);
  counter.writes(call.weights.data, rows * call.weights.cols);
}

void count(const Group& call, Counter& counter) {
  const int64_t num_pairs = int64_t{call.experts.rows} * call.experts.cols;
  counter.reads(call.experts.data, num_pairs);
  counter.writes(call.offsets, call.num_experts + 1);
  counter.writes(call.pairs, num_pairs);
  if (call.host_offsets != nullptr) counter.writes(call.host_offsets, call.num_experts + 1);
  if (call.host_pairs != nullptr) counter.writes(call.host_pairs, num_pairs);
}

void count(const ExpertFfn& call, Counter& counter) {
  const int64_t hidden = call.shape.hidden;
  const int64_t intermediate = call.shape.intermediate;
  const auto num_experts = static_cast<int64_t>(call.blobs.size());
  counter.reads(call.blobs.data(), num_experts);
  counter.reads(call.offsets, num_experts + 1);
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int64_t rows = call.offsets[expert + 1] - call.offsets[expert];
    if (call.blobs[expert] == nullptr || rows == 0) continue;
    counter.reads(call.pairs, rows);
    counter.reads(call.blobs[expert], call.shape.bytes());
    counter.reads(call.x.data, rows * hidden);
    counter.updates(call.scratch.data, rows * intermediate);
    counter.writes(call.y.data, rows * hidden);
    counter.products(rows, hidden, 3 * intermediate);
  }
}

void count(const Combine& call, Counter& counter) {
  const int64_t rows = call.residual.rows;
  const int64_t hidden = call.residual.cols;
  int64_t device_rows = rows * call.choices;
  if (call.weights.data != nullptr) counter.reads(call.weights.data, rows * call.choices);
  if (call.host_y.data != nullptr) {
    counter.reads(call.host_blobs.data(), static_cast<int64_t>(call.host_blobs.size()));
    counter.reads(call.experts.data, rows * call.experts.cols);
    int64_t host_rows = 0;
    for (int64_t row = 0; row < rows; ++row) {
      for (int32_t choice = 0; choice < call.experts.cols; ++choice) {
        host_rows += call.host_blobs[call.experts.row(row)[choice]] != nullptr ? 1 : 0;
      }
    }
    counter.reads(call.host_y.data, host_rows * hidden);
    device_rows -= host_rows;
  }
  counter.reads(call.y.data, device_rows * hidden);
  counter.updates(call.residual.data, rows * hidden);
}

void count(const MoveCall& call, Counter& counter) {
  counter.reads(call.from.data, int64_t{call.from.rows} * call.from.cols);
  counter.writes(call.to.data, int64_t{call.from.rows} * call.to.cols);
}

void count(const Sample& call, Counter& counter) {
  const auto rows = static_cast<int64_t>(call.rows.size());
  counter.reads(call.rows.data(), rows);
  counter.reads(call.logits.data, rows * call.logits.cols);
  counter.writes(call.tokens, rows);
}

}  // namespace

OpCost op_cost(const OpCall& call, FunctionRef<bool(const void*)> is_device, int64_t tile_rows) {
  Counter counter(is_device, tile_rows);
  std::visit([&](const auto& one) { count(one, counter); }, call);
  return counter.cost;
}

}  // namespace moed
