#include "plan/memory_budget.h"

#include <algorithm>
#include <cstdio>

namespace moed {
namespace {

constexpr int64_t kBf16Bytes = 2;
constexpr int64_t kFloatBytes = 4;
constexpr int64_t kAddressBytes = 8;
constexpr int64_t kTensorAlignmentBytes = 64;
// A slot of the ring begins on a multiple of this.
constexpr int64_t kSlotAlignmentBytes = 256;
constexpr int64_t kGiB = int64_t{1} << 30;
constexpr int64_t kNumPasses = 2;
// Code, tokenizer, connections, kernels' workspaces and the C++ heap.
constexpr int64_t kProcessBytes = int64_t{384} << 20;
// Left to the rest of the machine when KV takes what remains: the larger of these.
constexpr int64_t kReserveBytes = int64_t{512} << 20;
constexpr int64_t kReserveShare = 8;
// KV by default: so many full contexts, or what is left if that is less.
constexpr int64_t kContextsDefault = 16;
// Logits are computed for so many rows at a time: where the host chooses tokens, and where the device draws them.
constexpr int64_t kLogitRows = 64;
constexpr int64_t kDrawnLogitRows = 256;
// Of a row's logits in tables: its index, how its token is drawn, the token.
constexpr int64_t kTableBytes = 64;
// Tables of the experts' addresses: one a layer, and those of the calls that are under way.
constexpr int64_t kTablesUnderWay = 64;
// A context below this (or below the model's own) serves nobody.
constexpr int64_t kContextMin = 256;

int64_t padded(int64_t bytes, int64_t alignment = kTensorAlignmentBytes) {
  return (bytes + alignment - 1) / alignment * alignment;
}
int64_t matrix_bytes(int64_t rows, int64_t columns) { return padded(rows * columns * kBf16Bytes); }
// Norms and biases are kept in fp32.
int64_t vector_bytes(int64_t elements) { return padded(elements * kFloatBytes); }

std::string gib(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f", static_cast<double>(bytes) / static_cast<double>(kGiB));
  return text;
}

int64_t attention_bytes(const ModelConfig& config) {
  const AttentionConfig& attention = config.attention;
  const int64_t hidden = config.hidden_size, q = config.q_size(), kv = config.kv_size();
  int64_t bytes = matrix_bytes(q + 2 * kv, hidden) + matrix_bytes(hidden, q) + 2 * vector_bytes(hidden);
  if (attention.qkv_bias) bytes += vector_bytes(q + 2 * kv);
  if (attention.output_bias) bytes += vector_bytes(hidden);
  if (attention.qk_norm == AttentionConfig::QkNorm::kPerHead) bytes += 2 * vector_bytes(attention.head_dim);
  if (attention.qk_norm == AttentionConfig::QkNorm::kWhole) bytes += vector_bytes(q) + vector_bytes(kv);
  return bytes;
}

int64_t resident_ffn_bytes(const ModelConfig& config, LayerKind kind) {
  const int64_t hidden = config.hidden_size;
  if (kind == LayerKind::kDense) return matrix_bytes(int64_t{3} * config.dense_intermediate_size, hidden);
  const MoeConfig& moe = config.moe;
  int64_t bytes = matrix_bytes(moe.num_experts, hidden);
  if (moe.router.correction_bias) bytes += vector_bytes(moe.num_experts);
  if (moe.shared_intermediate_size > 0) bytes += matrix_bytes(int64_t{3} * moe.shared_intermediate_size, hidden);
  if (moe.shared_gate) bytes += matrix_bytes(1, hidden);
  return bytes;
}

// Rows, tables and logits of two passes of pass_rows_max rows, and the rope table of one context.
int64_t activation_bytes(const ModelConfig& config, const BudgetLimits& limits, int64_t context_tokens,
                         int64_t logit_rows) {
  const int64_t hidden = config.hidden_size, q = config.q_size(), kv = config.kv_size();
  int64_t choices = 1, intermediate = 0;
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    const bool dense = config.layers[layer] == LayerKind::kDense;
    choices = std::max<int64_t>(choices, config.ffn_choices(layer));
    intermediate =
        std::max<int64_t>({intermediate, dense ? config.dense_intermediate_size : config.moe.intermediate_size,
                           dense ? 0 : config.moe.shared_intermediate_size});
  }
  const int64_t floats = (q + 2 * kv) + hidden + choices * hidden;  // qkv, residual, FFN outputs
  const int64_t halves = hidden + 2 * q + choices * intermediate;   // norm, q and attention's output, scratch
  const int64_t tables = 4 * kFloatBytes * (choices + 1) + kFloatBytes * config.moe.num_experts + 64;
  const int64_t row_bytes = floats * kFloatBytes + halves * kBf16Bytes + tables;
  const int64_t blocks_a_context = (context_tokens + limits.block_tokens - 1) / limits.block_tokens;
  const int64_t sequence_bytes = blocks_a_context * kFloatBytes + 64;
  const int64_t logit_bytes = std::min<int64_t>(logit_rows, limits.pass_rows_max) *
                              (config.vocab_size * kFloatBytes + hidden * kBf16Bytes + kTableBytes);
  const int64_t pass_bytes = limits.pass_rows_max * row_bytes + limits.sequences_max * sequence_bytes + 4096;
  const int64_t expert_tables = (config.num_layers + kTablesUnderWay) * (config.moe.num_experts + 1) * kAddressBytes;
  return kNumPasses * pass_bytes + logit_bytes + expert_tables + context_tokens * config.rope.rotary_dim * kFloatBytes;
}

Status check_limits(const ModelConfig& config, const BudgetLimits& limits, const MachineMemory& machine) {
  if (!(limits.kv_gib >= 0.0)) return invalid_argument("kv_gib must not be negative or NaN", "kv_gib");
  if (limits.pass_rows_max < 1) return invalid_argument("pass_rows_max must be at least 1", "pass_rows_max");
  if (limits.sequences_max < 1) return invalid_argument("sequences_max must be at least 1", "sequences_max");
  if (limits.block_tokens < 1) return invalid_argument("block_tokens must be at least 1", "block_tokens");
  if (limits.max_model_len < 0) return invalid_argument("max_model_len must not be negative", "max_model_len");
  if (limits.max_model_len > config.max_positions) {
    return invalid_argument("max_model_len " + std::to_string(limits.max_model_len) + " is above the model's " +
                                std::to_string(config.max_positions) + " (max_position_embeddings)",
                            "max_model_len");
  }
  if (!(limits.device_kv_gib >= 0.0)) {
    return invalid_argument("memory.device_kv_gib must not be negative or NaN", "memory.device_kv_gib");
  }
  if (machine.device_bytes == 0 && (limits.experts_on_device || limits.kv != KvPlacement::kHost)) {
    return invalid_argument("neither experts nor KV can lie on a device without memory of its own", "placement.policy");
  }
  return Status();
}

Status too_small(const MemoryBudget& budget, const std::string& why) {
  return Status(StatusCode::kResourceExhausted, "not enough memory" + why + ": " + budget.describe());
}

int64_t blocks_of(int64_t tokens, const BudgetLimits& limits) {
  return (tokens + limits.block_tokens - 1) / limits.block_tokens;
}

// KV of pool kHost, when all else is known.
Status give_host_kv(const ModelConfig& config, const BudgetLimits& limits, int64_t context_tokens, int64_t context_min,
                    MemoryBudget& budget) {
  const int64_t block_bytes = config.kv_bytes_per_token() * limits.block_tokens;
  const int64_t reserve = std::max(kReserveBytes, budget.free_bytes / kReserveShare);
  if (limits.kv_gib > 0.0) {
    // Beyond any machine, but safe to multiply.
    const double kv_gib = std::min(limits.kv_gib, 1e6);
    budget.kv_blocks = static_cast<int64_t>(kv_gib * static_cast<double>(kGiB)) / block_bytes;
  } else {
    const int64_t left = budget.free_bytes - budget.total_bytes() - reserve;
    const int64_t contexts = std::min<int64_t>(limits.sequences_max, kContextsDefault);
    budget.kv_blocks = std::clamp<int64_t>(left / block_bytes, 0, contexts * blocks_of(context_tokens, limits));
  }
  budget.kv_bytes = budget.kv_blocks * block_bytes;
  const int64_t kv_tokens = budget.kv_blocks * limits.block_tokens;
  if (kv_tokens >= context_min) return budget.total_bytes() > budget.free_bytes ? too_small(budget, "") : Status();
  const int64_t context_blocks = blocks_of(context_min, limits);
  if (limits.kv_gib > 0.0) {
    const auto context_gib = static_cast<double>(context_blocks * block_bytes) / static_cast<double>(kGiB);
    return invalid_argument("kv_gib " + std::to_string(limits.kv_gib) + " holds " + std::to_string(kv_tokens) +
                                " tokens; one context of " + std::to_string(context_min) + " needs " +
                                std::to_string(context_gib) + " GiB",
                            "kv_gib");
  }
  budget.kv_bytes = context_blocks * block_bytes;
  budget.kv_blocks = context_blocks;
  return too_small(budget, " for one context of " + std::to_string(context_min) + " tokens, with " + gib(reserve) +
                               " GiB left to the machine");
}

DeviceDemand device_demand(const ModelConfig& config, const BudgetLimits& limits, const MemoryBudget& budget,
                           int64_t context_tokens, int64_t context_min) {
  const int64_t num_experts = num_routed_experts(config);
  return {.dense_weight_bytes = budget.dense_weight_bytes,
          .activation_bytes = activation_bytes(config, limits, context_tokens, kDrawnLogitRows),
          .block_bytes = config.kv_bytes_per_token() * limits.block_tokens,
          .staging_block_bytes = config.kv_bytes_per_token() / config.num_layers * limits.block_tokens,
          .context_blocks = blocks_of(context_tokens, limits),
          .useful_blocks = blocks_of(context_min, limits),
          .contexts_max = std::min<int64_t>(limits.sequences_max, kContextsDefault),
          .kv = limits.kv,
          .kv_gib = limits.device_kv_gib,
          .expert_bytes = num_experts > 0 ? padded(budget.expert_weight_bytes / num_experts, kSlotAlignmentBytes) : 0,
          .num_experts = limits.experts_on_device ? num_experts : 0,
          .all_resident = limits.all_experts_resident,
          .num_resident = limits.num_resident,
          .passing_slots = limits.passing_slots,
          .ring_slots = limits.ring_slots};
}

}  // namespace

std::string MemoryBudget::describe() const {
  return "need " + gib(total_bytes()) + " GiB: weights " + gib(dense_weight_bytes + expert_weight_bytes) +
         " (experts " + gib(expert_weight_bytes) + "), KV " + gib(kv_bytes) + " (" + std::to_string(kv_blocks) +
         " blocks), activations " + gib(activation_bytes) + ", process " + gib(process_bytes) +
         (emulated_bytes > 0 ? ", emulated device " + gib(emulated_bytes) : "") + "; free " + gib(free_bytes) + " (" +
         free_source + ")";
}

int64_t dense_weight_bytes(const ModelConfig& config) {
  const int64_t table = matrix_bytes(config.vocab_size, config.hidden_size);
  int64_t bytes = table + (config.tied_embeddings ? 0 : table) + vector_bytes(config.hidden_size);
  for (const LayerKind kind : config.layers) bytes += attention_bytes(config) + resident_ffn_bytes(config, kind);
  return bytes;
}

int64_t expert_weight_bytes(const ModelConfig& config) {
  const int64_t expert = int64_t{3} * config.moe.intermediate_size * config.hidden_size * kBf16Bytes;
  return expert * num_routed_experts(config);
}

int64_t num_routed_experts(const ModelConfig& config) {
  return std::count(config.layers.begin(), config.layers.end(), LayerKind::kMoe) * int64_t{config.moe.num_experts};
}

StatusOr<MemoryBudget> memory_budget(const ModelConfig& config, const BudgetLimits& limits,
                                     const MachineMemory& machine) {
  MOED_RETURN_IF_ERROR(check_limits(config, limits, machine));
  const int64_t context_tokens = limits.max_model_len > 0 ? limits.max_model_len : config.max_positions;
  // What was asked for by name must fit whole; by default, a context that is of use to somebody.
  const int64_t context_min = limits.max_model_len > 0 ? context_tokens : std::min(context_tokens, kContextMin);
  MemoryBudget budget{.dense_weight_bytes = dense_weight_bytes(config),
                      .expert_weight_bytes = expert_weight_bytes(config),
                      .activation_bytes = activation_bytes(config, limits, context_tokens, kLogitRows),
                      .process_bytes = kProcessBytes,
                      .free_bytes = machine.host_free_bytes,
                      .free_source = machine.source};
  if (machine.device_bytes > 0) {
    const DeviceDemand demand = device_demand(config, limits, budget, context_tokens, context_min);
    MOED_ASSIGN_OR_RETURN(budget.device, device_budget(demand, machine.device_bytes));
    if (machine.device_is_host) budget.emulated_bytes = budget.device.total_bytes();
  }
  if (limits.kv != KvPlacement::kDevice) {
    MOED_RETURN_IF_ERROR(give_host_kv(config, limits, context_tokens, context_min, budget));
  } else if (budget.total_bytes() > machine.host_free_bytes) {
    return too_small(budget, "");
  }
  const int64_t kv_tokens = std::max(budget.kv_blocks, budget.device.kv_blocks) * limits.block_tokens;
  budget.max_model_len = static_cast<int32_t>(std::min(context_tokens, kv_tokens));
  return budget;
}

}  // namespace moed
