#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "base/huge_pages.h"
#include "base/status.h"
#include "kernels/blob.h"
#include "model/architectures.h"
#include "model/tensor_source.h"

namespace moed {

// All routed experts in host memory, each one blob, layer by layer, packed once at load: what CPU kernels read in place
// and what copies to a device start from. Immutable after load; any thread may read.
class ExpertStore {
 public:
  // progress (may be empty) is called from the calling thread with the bytes that arrived since its last call. Errors
  // as TensorSource::read and HugePages::allocate.
  static StatusOr<ExpertStore> load(const Model& model, const TensorSource& source,
                                    const std::function<void(int64_t)>& progress);
  // REQUIRES: a routed expert of this model.
  BlobView blob(ExpertId id) const;
  BlobShape shape() const { return shape_; }
  int64_t bytes() const { return arena_.size(); }

 private:
  HugePages arena_;
  BlobShape shape_;
  int32_t num_experts_ = 0;
  std::vector<int32_t> moe_index_;  // [num_layers]: among MoE layers; -1 for dense ones
};

}  // namespace moed
