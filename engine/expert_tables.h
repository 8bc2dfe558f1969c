#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/function_ref.h"
#include "base/status.h"
#include "kernels/device.h"
#include "model/weights.h"
#include "offload/expert_store.h"

namespace moed {

// Tables of blob addresses in mapped memory, as ExpertFfn and Combine want them. Serving thread only; allocates at
// construction alone.
class ExpertTables {
 public:
  using Table = std::span<const std::byte*>;
  // weights, experts and device outlive it. Errors: kResourceExhausted with the bytes asked for.
  static StatusOr<ExpertTables> make(const ModelConfig& model, const DenseViews& weights, const ExpertStore& experts,
                                     Device& device);
  // What make() takes.
  static int64_t bytes(const ModelConfig& model);

  // The dense FFN or the shared expert of a layer, one blob; constant.
  std::span<const std::byte* const> dense(int32_t layer) const { return {base_ + layer, 1}; }
  // All experts of a layer where the host reads them; constant. REQUIRES: a layer of kind kMoe.
  std::span<const std::byte* const> store(int32_t layer) const;
  // A table for one call on the device, all null. used() follows once the call is enqueued; many calls later the table
  // comes round again. `wait` waits for an event of the stream.
  Table take(FunctionRef<void(Event&)> wait);
  void used(Stream& stream);

 private:
  // So many calls may be enqueued before the host waits for the first of them.
  static constexpr int32_t kCalls = 32;
  struct Call {
    std::unique_ptr<Event> read;
    bool pending = false;
  };

  ExpertTables() = default;
  Table cleared(int64_t index);

  Device* device_ = nullptr;
  Buffer memory_;
  const std::byte** base_ = nullptr;  // [num_layers]; then tables of num_experts: MoE layers, calls
  int32_t num_layers_ = 0;
  int32_t num_experts_ = 0;
  int32_t num_moe_layers_ = 0;
  std::vector<int32_t> moe_index_;  // [num_layers]: among MoE layers; -1 for dense ones
  std::array<Call, kCalls> calls_;
  int32_t next_ = 0;
};

}  // namespace moed
