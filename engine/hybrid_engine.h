#pragma once

#include <memory>

#include "engine/engine.h"
#include "kernels/device.h"
#include "model/weights.h"
#include "offload/expert_store.h"
#include "offload/ring.h"

namespace moed {

struct EngineConfig {
  int32_t rows_max = 512;       // of one pass
  int32_t sequences_max = 256;  // of one pass
  int32_t max_model_len = 0;    // tokens of one context: positions that the rope table covers
  int64_t kv_blocks = 0;        // of pool kHost
  int32_t block_tokens = 16;
  // On a device with memory of its own:
  int64_t device_kv_blocks = 0;  // of pool kDevice
  int64_t staging_blocks = 0;  // of device memory for the KV of prompts whose pool is kHost; 0: their attention runs on
                               // the host
  RingConfig ring;             // num_slots 0: no expert ever runs on the device
};

// The engine that runs the model. All memory is taken here: two passes' activations, the KV pools, tables, and on a
// device with memory of its own the dense weights and the slots of the ring. model, weights, experts and device must
// outlive it. Errors: kInvalidArgument naming the field, kResourceExhausted with the bytes asked for.
StatusOr<std::unique_ptr<Engine>> make_engine(const Model& model, const DenseWeights& weights,
                                              const ExpertStore& experts, Device& device, const EngineConfig& config);

// Bytes of device memory, and of pinned or mapped host memory; on the host device their sum is what counts.
struct EngineBytes {
  int64_t device_bytes = 0;
  int64_t host_bytes = 0;
  int64_t total() const { return device_bytes + host_bytes; }
};

// Activations and tables that make_engine() takes for both passes; KV pools, staging, dense weights and the ring are
// beside it.
EngineBytes engine_activations(const ModelConfig& model, const EngineConfig& config, bool device_is_host);

// Their sum on the host device; memory_budget's activation_bytes is at least this.
int64_t engine_activation_bytes(const ModelConfig& model, const EngineConfig& config);

}  // namespace moed
