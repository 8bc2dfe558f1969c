#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/huge_pages.h"
#include "base/status.h"
#include "kernels/blob.h"
#include "model/architectures.h"
#include "model/load_tensors.h"
#include "model/tensor_source.h"
#include "offload/host_pins.h"

namespace moed {

// All routed experts in host memory, each one blob, layer by layer, packed once at load: what CPU kernels read in place
// and what copies to a device start from. Immutable after load; any thread may read.
class ExpertStore {
 public:
  // progress (may be empty) is called from the calling thread with the bytes that arrived since its last call. Errors
  // as TensorSource::read and HugePages::allocate.
  // With several memory nodes its pages lie on them in turn where the kernel permits; else a line in the log says so.
  // pins, where given, gets the store's memory, piece by piece while later ones are read; it dies before the store.
  static StatusOr<ExpertStore> load(const Model& model, const TensorSource& source,
                                    const std::function<void(int64_t)>& progress, HostPins* pins = nullptr);
  // Pins all of it, in pieces that end with an expert.
  void pin(HostPins& pins) const;
  // REQUIRES: a routed expert of this model.
  BlobView blob(ExpertId id) const;
  BlobShape shape() const { return shape_; }
  int64_t bytes() const { return arena_.size(); }
  // What pin() pins.
  int64_t blobs_bytes() const { return blobs_bytes_; }

 private:
  int64_t piece_bytes(const HostPins& pins) const;
  Status read(const TensorSource& source, std::span<const TensorLoad> loads,
              const std::function<void(int64_t)>& progress, HostPins* pins);

  HugePages arena_;
  BlobShape shape_;
  int64_t stride_bytes_ = 0;  // from blob to blob
  int32_t num_experts_ = 0;
  int64_t blobs_bytes_ = 0;
  std::vector<int32_t> moe_index_;  // [num_layers]: among MoE layers; -1 for dense ones
};

}  // namespace moed
