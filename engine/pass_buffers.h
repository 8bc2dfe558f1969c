#pragma once

#include <cstdint>
#include <span>

#include "base/status.h"
#include "engine/hybrid_engine.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "model/config.h"

namespace moed {

// A run of a pass's rows in its buffers: what one half works on. Does not own.
struct RowViews {
  Matrix<float> residual;             // [rows, hidden]
  Matrix<Bf16> normed;                // [rows, hidden]
  Matrix<float> qkv;                  // [rows, q_size + 2 * kv_size]
  Matrix<Bf16> q;                     // [rows, q_size]
  Matrix<Bf16> attention;             // [rows, q_size]
  Matrix<int32_t> experts;            // [rows, top_k]
  Matrix<float> expert_weights;       // [rows, choices_max]
  float* expert_outputs = nullptr;    // room for [rows * choices_max, hidden]
  Bf16* expert_scratch = nullptr;     // room for the widest FFN of these rows
  int32_t* pairs = nullptr;           // [rows * choices_max]
  const int32_t* identity = nullptr;  // [rows]: 0, 1, 2, ...; the pairs of an FFN that is every row's only choice
  int32_t* tokens = nullptr;          // [rows]
  int32_t* positions = nullptr;       // [rows]
  int64_t* slots = nullptr;           // [rows]
};

// The activations and tables of one pass, taken at start and used by one pass after another. Activations lie in device
// memory, what the host writes or reads in mapped memory. Serving thread only.
class PassBuffers {
 public:
  // Errors: kResourceExhausted with the bytes asked for.
  static StatusOr<PassBuffers> allocate(const ModelConfig& model, const EngineConfig& config, Device& device);
  // What allocate() takes.
  static int64_t bytes(const ModelConfig& model, const EngineConfig& config);

  // REQUIRES: 0 <= begin, begin + count <= rows_max.
  RowViews rows(int32_t begin, int32_t count) const;
  AttentionSpan* spans() const { return spans_; }        // [sequences_max]
  int32_t* block_table() const { return block_table_; }  // [block_table_entries()]
  int64_t block_table_entries() const { return block_table_entries_; }

  // Elements of scratch that one row of the widest FFN needs.
  static int64_t scratch_elements(const ModelConfig& model);
  // Outputs that a row sends to combine, over all layers the most.
  static int32_t choices_max(const ModelConfig& model);

 private:
  class Carver;
  void carve(const ModelConfig& model, const EngineConfig& config, Carver& device, Carver& mapped);

  Buffer device_memory_;
  Buffer mapped_memory_;
  RowViews all_;
  AttentionSpan* spans_ = nullptr;
  int32_t* block_table_ = nullptr;
  int32_t* identity_ = nullptr;  // [rows_max]
  int64_t block_table_entries_ = 0;
  int64_t scratch_elements_ = 0;
  int32_t choices_max_ = 0;
};

}  // namespace moed
