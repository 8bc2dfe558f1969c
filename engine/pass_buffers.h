#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "base/status.h"
#include "engine/hybrid_engine.h"
#include "kernels/device.h"
#include "kernels/ops.h"
#include "model/config.h"

namespace moed {

// A run of a pass's rows in its buffers: what one half works on. Does not own. Activations lie in device memory.
struct RowViews {
  Matrix<float> residual;           // [rows, hidden]
  Matrix<Bf16> normed;              // [rows, hidden]
  Matrix<float> qkv;                // [rows, q_size + 2 * kv_size]
  Matrix<Bf16> q;                   // [rows, q_size]
  Matrix<Bf16> attention;           // [rows, q_size]
  Matrix<int32_t> experts;          // [rows, top_k]
  Matrix<float> expert_weights;     // [rows, choices_max]
  float* expert_outputs = nullptr;  // room for [rows * choices_max, hidden]
  Bf16* expert_scratch = nullptr;   // room for the widest FFN of these rows
  int32_t* pairs = nullptr;         // [rows * top_k]
  // What the next layer's router says of this layer's rows; null where the device is the host.
  Matrix<int32_t> next_experts;   // [rows, top_k]
  Matrix<float> next_weights;     // [rows, choices_max]
  int32_t* next_pairs = nullptr;  // [rows * top_k]
  // What the host lane reads and writes, in mapped memory; null where the device is the host.
  Matrix<Bf16> host_q;            // [rows, q_size]
  Matrix<Bf16> host_attention;    // [rows, q_size]
  Matrix<Bf16> host_normed;       // [rows, hidden]
  float* host_outputs = nullptr;  // room for [rows * choices_max, hidden]
  Bf16* host_scratch = nullptr;   // room for the experts of these rows
  int32_t* host_pairs = nullptr;  // [rows * top_k]
  // Tables that never change, in device memory.
  const int32_t* identity = nullptr;      // [rows]: 0, 1, 2, ...; the pairs of an FFN that is every row's only choice
  const int32_t* shared_pairs = nullptr;  // [rows]: the pairs of the shared expert, the last choice of every row
  // Tables of the pass, in mapped memory.
  int32_t* tokens = nullptr;     // [rows]
  int32_t* positions = nullptr;  // [rows]
  int64_t* slots = nullptr;      // [rows]
};

// Tables of one half, whatever its rows.
struct HalfTables {
  int32_t* offsets = nullptr;              // device, [num_experts + 1]: as Group writes them
  int32_t* host_offsets = nullptr;         // mapped, the same for the host; null where the device is the host
  int32_t* next_offsets = nullptr;         // as offsets, of RowViews::next_experts
  int32_t* next_host_offsets = nullptr;    // as host_offsets
  int32_t* whole_offsets = nullptr;        // mapped, [2]: 0 and the half's rows; offsets of an FFN that every row chose
  const std::byte** host_blobs = nullptr;  // mapped, [num_experts]: experts that the host computed, for Combine
};

// The activations and tables of one pass, taken at start and used by one pass after another. Activations lie in device
// memory, what the host writes or reads in mapped memory. Serving thread only.
class PassBuffers {
 public:
  static constexpr int kHalvesMax = 2;
  // Errors: kResourceExhausted with the bytes asked for.
  static StatusOr<PassBuffers> allocate(const ModelConfig& model, const EngineConfig& config, Device& device);
  // What allocate() takes.
  static EngineBytes bytes(const ModelConfig& model, const EngineConfig& config, bool device_is_host);

  // REQUIRES: 0 <= begin, begin + count <= rows_max.
  RowViews rows(int32_t begin, int32_t count) const;
  const HalfTables& half(int32_t index) const { return halves_.at(index); }
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
  // What the host lane needs beside a device.
  void carve_mirrors(const ModelConfig& model, const EngineConfig& config, Carver& device, Carver& mapped);
  // REQUIRES: carved. Waits until they are in device memory.
  Status write_constants(int32_t rows, Device& device);

  Buffer device_memory_;
  Buffer mapped_memory_;
  RowViews all_;
  std::array<HalfTables, kHalvesMax> halves_;
  AttentionSpan* spans_ = nullptr;
  int32_t* block_table_ = nullptr;
  int32_t* identity_ = nullptr;      // [rows_max]
  int32_t* shared_pairs_ = nullptr;  // [rows_max]
  int64_t block_table_entries_ = 0;
  int64_t scratch_elements_ = 0;
  int64_t expert_elements_ = 0;  // of host_scratch, one row
  int32_t choices_max_ = 0;
  int32_t top_k_ = 0;
};

}  // namespace moed
